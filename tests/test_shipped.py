# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoints load ready to use: in float32, and without a length of their own."""

import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    pipeline,
)

import modeling_stlm

from .tiny import ids_of


assert modeling_stlm.__all__  # imported for its registrations
CHECKPOINTS = Path(__file__).parents[1] / "examples" / "checkpoints"
ENCODER = CHECKPOINTS / "stlm-3m-encoder"
SHIPPED = [CHECKPOINTS / "stlm-3m", CHECKPOINTS / "stlm-10m-wide"]


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


@torch.no_grad()
def test_text_that_repeats_is_copied(shipped):
    text = (CHECKPOINTS.parent / "data" / "shakespeare.txt").read_bytes()

    def bits_of_second_halves(model) -> float:
        bits = []
        for start in range(0, 20_000, 4000):
            half = [*text[start : start + 1500]]
            ids = torch.tensor([[model.config.bos_token_id, *half, *half]])
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            bits.append(-log_probs.gather(1, ids[0, 1:, None])[len(half) :].mean() / math.log(2))
        return float(sum(bits) / len(bits))

    longest = bits_of_second_halves(AutoModelForCausalLM.from_pretrained(shipped))
    last = bits_of_second_halves(AutoModelForCausalLM.from_pretrained(shipped, match_doublings=0))
    assert longest < 0.35 and longest < last / 2


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


def test_the_shipped_encoder_serves_every_head_and_sentence_transformers():
    with safe_open(ENCODER / "model.safetensors", "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"BF16"}
    for auto in (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        model = auto.from_pretrained(ENCODER)
        assert model.dtype == torch.float32 and not model.config.is_causal
    encoder = SentenceTransformer(str(ENCODER), device="cpu")
    assert encoder.dtype == torch.float32 and encoder.tokenizer.chat_template is None
    texts = [
        "The cat sat on the mat.",
        "A kitten is a young cat.",
        "Share prices fell.",
        "The stock market lost two percent.",
    ]
    vectors = encoder.encode(texts)
    similar = encoder.similarity(vectors, vectors)
    assert min(similar[0, 1], similar[2, 3]) > similar[:2, 2:].max()
    noisy = [
        "the cta sat on teh mat",
        "A KITTEN IS A YOUNG CAT.",
        "Share pricess fel",
        "The stock markt lost two percnt.",
    ]
    assert encoder.similarity(encoder.encode(noisy), vectors).argmax(1).tolist() == [0, 1, 2, 3]


def test_the_shipped_encoder_fills_masks():
    assert pipeline("fill-mask", str(ENCODER))("It is the larg<mask>st city.", top_k=1)[0]["token_str"] == "e"
    ids = torch.tensor(ids_of("The river flows from the mountains through the city to the sea."))
    places = torch.arange(len(ids))
    masked = ids.repeat(len(ids), 1).masked_fill(torch.eye(len(ids), dtype=torch.bool), 259)
    with torch.no_grad():
        logits = AutoModelForMaskedLM.from_pretrained(ENCODER)(masked).logits
    assert (logits[places, places].argmax(-1) == ids).float().mean() > 0.5
