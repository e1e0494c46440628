# SPDX-License-Identifier: Apache-2.0
"""Bad and odd input: a clear error with nothing lost, or a defined result."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_stlm import STLMTokenizer

from . import reference
from .tiny import MIXERS, TEXT, assert_equal, batch, ids_of, tiny_model


# minimaxir/big-list-of-naughty-strings, MIT licence
with gzip.open(Path(__file__).parent / "data" / "naughty_strings.jsonl.gz", "rt", encoding="utf-8") as lines:
    NAUGHTY = [json.loads(line)["text"] for line in lines]
IDS = torch.tensor([ids_of(TEXT)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 3, 16)}, "exactly one"),
        ({"input_ids": torch.tensor([[65, 320]])}, "between 65 and 320, expected 0 to 319"),
        ({"input_ids": torch.tensor([[65, -100]])}, "between -100 and 65, expected 0 to 319"),
        ({"input_ids": torch.tensor([[65.0]])}, "dtype torch.float32, expected integers"),
        ({"input_ids": torch.tensor([[True]])}, "dtype torch.bool, expected integers"),
        ({"input_ids": torch.zeros(0, 5, dtype=torch.long)}, r"shape \(0, 5\), expected \(rows, bytes\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"shape \(2, 0\), expected"),
        ({"input_ids": torch.tensor([65, 66])}, r"shape \(2,\), expected"),
        ({"inputs_embeds": torch.zeros(1, 3, 15)}, r"shape \(1, 3, 15\), expected \(rows, bytes, 16\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\), expected"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, IDS.shape[1])}, "attention_mask has shape"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 4, 4)}, "Masks with more axes have no meaning"),
        ({"input_ids": IDS, "position_ids": torch.arange(3)[None]}, r"position_ids has shape \(1, 3\), expected"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_bad_arguments_are_named_and_leave_a_cache_usable(arguments, message, cached):
    model = tiny_model()
    cache = DynamicCache(config=model.config) if cached else None
    with pytest.raises(ValueError, match=message):
        model(**arguments, cache=cache)
    with torch.no_grad():
        assert_equal(model(IDS, cache=cache).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@torch.no_grad()
def test_bytes_may_come_in_any_integer_type(dtype):
    model = tiny_model()
    ids = torch.tensor([ids_of("Some text, é.")])
    assert torch.equal(model(ids.to(dtype)).logits, model(ids).logits)
    cache = model(ids.to(dtype), use_cache=True).cache
    step = model(ids[:, :1].to(dtype), cache=cache).logits
    assert_equal(step, model(torch.cat([ids, ids[:, :1]], dim=1)).logits[:, -1:])


@pytest.mark.parametrize("options", MIXERS.values(), ids=MIXERS)
@torch.no_grad()
def test_a_row_of_padding_alone_is_finite_and_changes_no_other_row(options):
    model = tiny_model(**options)
    inputs = batch([ids_of("some words"), [], ids_of("x")], "left")
    for use_cache in (False, True):
        logits = model(**inputs, use_cache=use_cache).logits
        assert torch.isfinite(logits).all()
        assert_equal(logits[0], model(torch.tensor([ids_of("some words")])).logits[0])
    inputs = {"input_ids": torch.full((2, 3), 256), "attention_mask": torch.zeros(2, 3, dtype=torch.long)}
    assert torch.isfinite(model(**inputs).logits).all()


EMPTY = {"max_new_tokens": 5, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": None}
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 2},
    "drawn": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@torch.no_grad()
def test_an_empty_prompt_in_a_batch_is_refused(way):
    model = tiny_model(use_cache=True)
    inputs = batch([ids_of("some words"), [], ids_of("x")], "left")
    for kwargs in (inputs, {"input_ids": inputs["input_ids"]}):  # the library finds padding without a mask, too
        with pytest.raises(ValueError, match=r"row 1 is empty, nothing but padding.* Begin it with bos_token"):
            model.generate(**kwargs, **EMPTY, **way)


@torch.no_grad()
def test_bos_in_a_batch_generates_what_no_input_does():
    model, inputs = tiny_model(use_cache=True), batch([ids_of("some words"), [257]], "left")
    together = model.generate(**inputs, **EMPTY, do_sample=False)
    assert torch.equal(together[1, -6:], model.generate(**EMPTY, do_sample=False)[0])
    # A row may have nothing new if it has something before it.
    ids = torch.cat([inputs["input_ids"], torch.tensor([[65], [256]])], 1)
    mask, cache = (ids != 256).long(), model(**inputs).cache
    assert model.generate(ids, attention_mask=mask, cache=cache, **EMPTY, do_sample=False).shape == (2, 16)


@torch.no_grad()
def test_nan_stays_in_its_row():
    model = tiny_model()
    embeds = model.get_input_embeddings()(IDS.expand(2, -1)).clone()
    embeds[1, 4] = float("nan")
    logits = model(inputs_embeds=embeds).logits
    assert_equal(logits[:1], model(IDS).logits)
    assert logits[1, 4:].isnan().any(-1).all()


@torch.no_grad()
def test_a_text_may_be_longer_than_the_config_promises():
    model = tiny_model(max_position_embeddings=32)
    long = torch.tensor([ids_of(TEXT)])
    assert long.shape[1] > 100
    assert_equal(model(long).logits[0], reference.logits(model, ids_of(TEXT)))


def test_damaged_checkpoints_raise(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # it maps the file into memory

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header|metadata"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

    save_file(tensors | {"model.final_norm.weight": torch.ones(17)}, weights, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)

    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_unique_trunk_layers": 99}))
    with pytest.raises(Exception, match="num_unique_trunk_layers=99"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config)[:-20])
    with pytest.raises(OSError, match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# Naughty strings, and any strings


def test_naughty_strings_come_back_through_the_tokenizer():
    tokenizer = STLMTokenizer()
    assert len(NAUGHTY) > 500
    for text in NAUGHTY:
        ids = tokenizer(text)["input_ids"]
        assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text
    padded = tokenizer(NAUGHTY, padding=True)
    assert tokenizer.batch_decode(padded["input_ids"], skip_special_tokens=True) == NAUGHTY


@torch.no_grad()
def test_naughty_strings_pool_as_the_reference_says():
    model = tiny_model()
    for text in NAUGHTY:
        if text:
            ids = ids_of(text)
            boundaries = model.model(torch.tensor([ids]), output_boundaries=True).boundaries[0]
            assert boundaries.tolist() == reference.boundaries(ids, model.config)


@torch.no_grad()
def test_naughty_strings_side_by_side_in_a_cache_equal_the_rows_alone():
    model = tiny_model(**MIXERS["both"])
    texts = sorted((ids_of(text) for text in NAUGHTY if text), key=len)[100:400:12]
    inputs = batch(texts, "left")
    cache, logits = DynamicCache(config=model.config), []
    for first in range(0, inputs["input_ids"].shape[1], 17):
        end = min(first + 17, inputs["input_ids"].shape[1])
        chunk = inputs["input_ids"][:, first:end]
        logits.append(model(chunk, attention_mask=inputs["attention_mask"][:, :end], cache=cache).logits)
    logits = torch.cat(logits, 1)
    for row, mask, ids in zip(logits, inputs["attention_mask"], texts):
        assert_equal(row[mask == 1], model(torch.tensor([ids])).logits[0])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.integers(0, 319), max_size=40), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(0, 12),
)
@torch.no_grad()
def test_any_ids_in_any_chunks_with_any_crop_equal_one_call(rows, side, sizes, removed):
    model = FUZZED
    inputs = batch(rows, side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    num_bytes = ids.shape[1]
    if not num_bytes:
        return
    expected = model(ids, attention_mask=mask).logits
    cache, parts, first = DynamicCache(config=model.config), [], 0
    while first < num_bytes:
        end = min(first + sizes[len(parts) % len(sizes)], num_bytes)
        parts.append(model(ids[:, first:end], attention_mask=mask[:, :end], cache=cache).logits)
        first = end
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(torch.cat(parts, 1)[mask == 1], expected[mask == 1], atol=1e-5 * scale, rtol=0)
    removed = min(removed, num_bytes - 1)
    if removed:
        cache.crop(-removed)
        again = model(ids[:, -removed:], attention_mask=mask, cache=cache).logits
        valid = mask[:, -removed:] == 1
        torch.testing.assert_close(again[valid], expected[:, -removed:][valid], atol=1e-5 * scale, rtol=0)


FUZZED = tiny_model(**MIXERS["both"])
