# SPDX-License-Identifier: Apache-2.0
"""What this package uses of transformers beyond its public API. A failure here says what a release changed."""

import inspect

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, cache_utils
from transformers.models.auto import modeling_auto

from modeling_stlm import STLMConfig
from modeling_stlm.generation_stlm import DRAFTS_AFTER_A_CACHE_FIXED_IN, STLMGenerationMixin

from .tiny import TEXT, ids_of, tiny_model


PROMPT = torch.tensor([ids_of(TEXT)[:50]])
OPTIONS = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}


def test_the_methods_of_generate_that_are_extended_are_still_there_and_called():
    model, called = tiny_model(use_cache=True), []

    class Spy(type(model)):
        def _prepare_generation_config(self, *args, **kwargs):
            called.append("_prepare_generation_config")
            return super()._prepare_generation_config(*args, **kwargs)

        def _get_logits_processor(self, *args, **kwargs):
            called.append("_get_logits_processor")
            return super()._get_logits_processor(*args, **kwargs)

        def _extract_generation_mode_kwargs(self, *args, **kwargs):
            called.append("_extract_generation_mode_kwargs")
            return super()._extract_generation_mode_kwargs(*args, **kwargs)

        def _assisted_decoding(self, *args, inputs_tensor=None, **kwargs):
            called.append("_assisted_decoding")
            return super()._assisted_decoding(*args, inputs_tensor=inputs_tensor, **kwargs)

        def _get_candidate_generator(self, *args, **kwargs):
            called.append("_get_candidate_generator")
            return super()._get_candidate_generator(*args, **kwargs)

    model.__class__ = Spy
    model.generate(PROMPT, **OPTIONS, prompt_lookup_num_tokens=3)
    extended = {name for name in vars(STLMGenerationMixin) if name.startswith("_") and not name.startswith("__")}
    assert set(called) == extended, "transformers no longer calls a method that STLMGenerationMixin extends"


def test_generate_still_looks_at_the_signature_of_forward_in_every_step():
    source = inspect.getsource(GenerationMixin.prepare_inputs_for_generation)
    assert "inspect.signature(self.forward)" in source, (
        "prepare_inputs_for_generation no longer inspects forward: drop `forward.__signature__` in modeling_stlm.py"
    )


def test_slots_are_still_registered_by_their_layer_type():
    config = STLMConfig()
    for table in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING):
        assert set(config.layer_types) <= set(table), "CacheLayerMixin no longer registers classes by `_layer_type`"


def test_class_names_are_still_looked_up_in_the_tables_of_the_auto_classes():
    for name in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"):
        table = getattr(modeling_auto, name, None)
        assert table is not None and "stlm" in table, f"{name} moved: Trainer and pipelines look class names up there"


def test_drafts_after_a_filled_cache_are_refused_while_the_library_gets_them_wrong():
    model = tiny_model(use_cache=True)
    cache = DynamicCache(config=model.config)
    ids = model.generate(PROMPT, cache=cache, **OPTIONS | {"max_new_tokens": 8})
    ids = torch.cat([ids, torch.tensor([ids_of(" and go on")])], 1)
    expected = model.generate(ids, **OPTIONS)
    if DRAFTS_AFTER_A_CACHE_FIXED_IN is None:
        with pytest.raises(ValueError, match="start with an empty cache"):
            model.generate(ids, cache=cache, prompt_lookup_num_tokens=4, **OPTIONS)

    class Unchecked(type(model)):
        _get_candidate_generator = GenerationMixin._get_candidate_generator

    model.__class__ = Unchecked
    got = model.generate(ids, cache=cache, prompt_lookup_num_tokens=4, **OPTIONS)
    is_right = torch.equal(got, expected)
    assert is_right == (DRAFTS_AFTER_A_CACHE_FIXED_IN is not None), (
        "transformers has fixed drafts after a filled cache: set DRAFTS_AFTER_A_CACHE_FIXED_IN in generation_stlm.py"
    )
