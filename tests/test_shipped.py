# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoints load ready to use: in float32, and without a length of their own."""

from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    pipeline,
)

import modeling_stlm

from .tiny import ids_of


assert modeling_stlm.__all__  # imported for its registrations
SHIPPED = sorted((Path(__file__).parents[1] / "examples" / "checkpoints").glob("stlm-*m"))
assert len(SHIPPED) == 2


@pytest.fixture(params=SHIPPED, ids=lambda path: path.name)
def shipped(request) -> Path:
    return request.param


def test_weights_stored_in_bfloat16_load_in_float32(shipped):
    with safe_open(shipped / "model.safetensors", "pt") as stored:
        stored_dtypes = {stored.get_slice(name).get_dtype() for name in stored.keys()}
    assert stored_dtypes == {"BF16"}
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
        model = auto.from_pretrained(shipped)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config.dtype == torch.float32
    assert pipeline("text-generation", str(shipped)).model.dtype == torch.float32
    assert pipeline("text-classification", str(shipped)).model.dtype == torch.float32
    asked_for = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.bfloat16)
    assert asked_for.dtype == torch.bfloat16


def test_adapters_and_sentence_vectors_start_in_float32(shipped, tmp_path):
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(shipped), lora)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    encoder = SentenceTransformer(str(shipped), device="cpu")
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_a_length_is_that_of_the_user(shipped):
    model = AutoModelForCausalLM.from_pretrained(shipped)
    assert model.generation_config.max_new_tokens is model.generation_config.max_length is None
    prompt = torch.tensor([ids_of("The history")])
    options = {"do_sample": False, "eos_token_id": None}
    for length in ({"max_length": 30}, {"max_new_tokens": 19}):
        assert model.generate(prompt, generation_config=GenerationConfig(**length, **options)).shape[1] == 30
        assert model.generate(prompt, **length, **options).shape[1] == 30
