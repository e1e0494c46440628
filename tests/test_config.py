# SPDX-License-Identifier: Apache-2.0
"""The configuration: strict, derived values consistent, errors that say what to do."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_stlm import STLMConfig

from .tiny import SHARING, TEXT, ids_of, tiny_config, tiny_model


PRESETS = ["stlm-3m", "stlm-10m", "stlm-10m-wide", "stlm-50m", "stlm-100m"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name, tmp_path):
    config = STLMConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_json_string() == config.to_json_string()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "layer_types" not in saved, "processes without this code would refuse our kinds of layers"


def test_presets_work_with_auto_classes_and_overrides():
    model = AutoModelForCausalLM.from_config(STLMConfig.from_preset("stlm-3m", num_trunk_layers=3))
    assert type(model).__name__ == "STLMForCausalLM" and model.config.num_trunk_layers == 3


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"stlm-100m.*stlm-3m"):
        STLMConfig.from_preset("stlm-7b")


@pytest.mark.parametrize(
    ("sharing", "depth", "unique", "expected"),
    [
        ("none", 3, 3, [0, 1, 2]),
        ("immediate", 6, 4, [0, 1, 1, 2, 2, 3]),
        ("immediate", 7, 4, [0, 1, 1, 1, 2, 2, 3]),
        ("cycle", 5, 2, [0, 1, 0, 1, 0]),
        ("middle", 6, 4, [0, 1, 2, 2, 2, 3]),
        ("middle", 4, 1, [0, 0, 0, 0]),
        ("ffn", 5, 3, [0, 1, 1, 1, 2]),
        ("ffn", 2, 2, [0, 1]),
        ("immediate", 1, 1, [0]),
    ],
)
def test_layer_sharing_schedules(sharing, depth, unique, expected):
    config = tiny_config(layer_sharing=sharing, num_trunk_layers=depth, num_unique_trunk_layers=unique)
    assert [feed_forward for _, feed_forward in config.trunk_schedule] == expected
    attention = [attention for attention, _ in config.trunk_schedule]
    assert attention == (list(range(depth)) if sharing == "ffn" else expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"byte_mixers": ["conv"]}, "1 entries for 3 byte layers"),
        ({"num_local_encoder_layers": 0}, "must be at least 1"),
        ({"num_unique_trunk_layers": 1}, "needs 2 to 2 of them"),
        ({"layer_sharing": "middle", "num_unique_trunk_layers": 9}, "needs 1 to 2 of them"),
        ({"layer_sharing": "ffn", "num_trunk_layers": 4, "num_unique_trunk_layers": 2}, "needs 3 to 4 of them"),
        ({"trunk_num_key_value_heads": 3}, "must be a multiple"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 7}, "must be even"),
        ({"trunk_head_dim": 7}, "must be even"),
        ({"max_patch_bytes": 0}, "max_patch_bytes=0 must be at least 1"),
        ({"attention_window_bytes": 0}, "attention_window_bytes=0 must be at least 1"),
        ({"trunk_window_patches": 0}, "trunk_window_patches=0 must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"trunk_head_dim": 0}, "trunk_head_dim=0 must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ({"num_trunk_layers": 0}, "num_trunk_layers=0 must be at least 1"),
        ({"ngram_orders": [1, 2]}, r"ngram_orders=\[1, 2\] .* must be at least 2"),
        ({"context_ngram_orders": [0]}, r"context_ngram_orders=\[0\] must be different lengths from 1 to 6"),
        ({"context_ngram_orders": [7, 2]}, r"context_ngram_orders=\[7, 2\] must be different lengths from 1 to 6"),
        ({"context_ngram_orders": [2, 2]}, r"context_ngram_orders=\[2, 2\] must be different lengths from 1 to 6"),
        ({"context_ngram_places": 0}, "context_ngram_places=0 must be at least 1"),
        ({"ngram_embedding_size": 0}, "ngram_embedding_size=0 must be at least 1"),
        ({"sharing_lora_rank": -1}, "sharing_lora_rank=-1 must be at least 0"),
        ({"ngram_word_bytes": 1}, "must be at least 2 .*0 for none"),
        ({"ngram_word_bytes": -1}, "must be at least 2 .*0 for none"),
        ({"patching": "vocabulary"}, "got 0 pieces"),
        ({"patching": "vocabulary", "patch_vocabulary": " "}, "got 0 pieces"),
        ({"patching": "learned", "patch_bytes": 12}, "less than max_patch_bytes=12"),
        ({"patching": "vocabulary", "patch_vocabulary": "a b", "max_patch_bytes": 1}, "at least 2, got 1"),
    ],
)
def test_contradictions_are_named(fields, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**fields)


def test_the_number_of_cache_slots_follows_the_depth():
    saved = tiny_config(layer_sharing="cycle", num_trunk_layers=2, num_unique_trunk_layers=1).to_dict()
    assert tiny_config(**(saved | {"num_trunk_layers": 6})).num_hidden_layers == 3 + 1 + 6


def test_a_depth_that_is_set_later_is_that_of_the_model(tmp_path):
    model = tiny_model(**SHARING["middle"])
    model.save_pretrained(tmp_path / "saved")
    deeper = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", num_trunk_layers=6)
    config = AutoConfig.from_pretrained(tmp_path / "saved")
    config.num_trunk_layers = 6
    assert config.num_hidden_layers < AutoModelForCausalLM.from_config(config).config.num_hidden_layers == 3 + 1 + 6
    runs = []
    for block in deeper.model.trunk.attention_blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    ids = torch.tensor([ids_of(TEXT[:60])])
    logits = deeper(ids).logits
    assert len(runs) == 6 and (logits - model(ids).logits).abs().max() > 0.01
    deeper.save_pretrained(tmp_path / "deeper")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "deeper")(ids).logits, logits)
    for fields, message in (
        ({"num_trunk_layers": 1}, "num_unique_trunk_layers="),
        ({"num_local_encoder_layers": 3}, "byte_mixers has 3 entries for 4 byte layers"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **fields)
    assert AutoModelForCausalLM.from_config(tiny_config(output_attentions=True)).config.output_attentions
    # Derived, whatever is given.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", num_hidden_layers=3)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "16"),
        ("patching", "words"),
        ("byte_mixers", ["conv", "mamba", "conv"]),
        ("layer_sharing", "loop"),
        ("classifier_pooling", "max"),
    ],
)
def test_types_and_choices_are_checked(field, value):
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        tiny_config(**{field: value})
