# SPDX-License-Identifier: Apache-2.0
"""Generation that cannot write ill-formed UTF-8."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from modeling_stlm import STLMForCausalLM, STLMTokenizer
from modeling_stlm.generation_stlm import UTF8LogitsProcessor

from .tiny import batch, ids_of, tiny_config, tiny_model


def is_prefix_of_text(data: bytes) -> bool:
    """Whether some continuation makes `data` well-formed, asked of Python's decoder."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


NAMED = set(range(256, len(STLMTokenizer())))


def allowed(ids: list[int], max_length: int | None = None, vocab_size: int = 320, **options) -> set[int]:
    processor = UTF8LogitsProcessor(max_length, **options)
    scores = processor(torch.tensor([ids], dtype=torch.long), torch.zeros(1, vocab_size))
    return set(scores[0].isfinite().nonzero()[:, 0].tolist())


@given(st.text(max_size=4), st.integers(0, 3))
def test_a_byte_is_allowed_where_some_text_goes_on_with_it(text, cut):
    data = text.encode()[: max(0, len(text.encode()) - cut)]
    bytes_allowed = {byte for byte in range(256) if is_prefix_of_text(data + bytes([byte]))}
    complete = is_prefix_of_text(data + b"a")
    assert allowed(list(data)) == bytes_allowed | (NAMED if complete else set())


def test_reserved_ids_are_written_only_on_request():
    assert max(NAMED) == 261
    assert allowed([65]) - set(range(256)) == NAMED
    assert allowed([65], token_ids=[262, 319, 65]) - set(range(256)) == NAMED | {262, 319}
    for size in (256, 258, 262, 263, 319, 320):
        assert allowed([65], vocab_size=size) - set(range(256)) == {i for i in NAMED if i < size}
    assert allowed([65], vocab_size=384) - set(range(256)) == NAMED | set(range(320, 384)), "an enlarged vocabulary"
    inside = allowed([0xC3], vocab_size=384, token_ids=[262])
    assert inside == set(range(0x80, 0xC0)), "no token inside a character"
    assert allowed([65, 300], token_ids=[262]) == allowed([65], token_ids=[262]), "a prompt may hold any id"


def test_a_new_model_writes_no_reserved_id():
    model = STLMForCausalLM(tiny_config(use_cache=True))
    options = {"max_new_tokens": 40, "do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 256}
    prompts = torch.full((16, 1), 65)
    new, free = (model.generate(prompts, **options, valid_utf8=valid) for valid in (True, False))
    assert new.max() < 262 <= free.max()


@pytest.mark.parametrize("character", ["é", "東", "😀", "\ud7ff", "\ue000", "\u0800", "\U00010000", "\U0010ffff"])
def test_no_character_is_begun_that_would_be_cut_off(character):
    data = character.encode()
    for room in range(1, 5):
        begins = data[0] in allowed([65], max_length=1 + room)
        assert begins == (len(data) <= room)
    for cut in range(1, len(data)):
        assert data[cut] in allowed(list(data[:cut]), max_length=len(data))


def test_an_ill_formed_prompt_is_left_alone_and_text_starts_anew():
    for prompt in (b"\xff\xfe", b"ab\x80\x80\x80", b"\xe6\x97a", b"\xed\xa0"):
        assert {ord("a"), 0xC3} <= allowed(list(prompt)) and 0xFF not in allowed(list(prompt))
    assert allowed([0xE6, 257]) == allowed([65])
    assert allowed([0xE6, 0xC3]) == allowed([0xC3]) == set(range(0x80, 0xC0)), "a character cut off by another"


@pytest.mark.parametrize(
    "mode",
    [{"do_sample": True}, {"do_sample": True, "top_k": 2}, {"num_beams": 3}, {"temperature": 9.0, "do_sample": True}],
)
def test_a_random_model_writes_text(mode):
    model = tiny_model(use_cache=True)
    prompts = [ids_of("One. "), ids_of("東".encode()[:2]), ids_of("x")]
    inputs = batch(prompts, "left")
    settings = {"max_new_tokens": 30, "pad_token_id": 256, "eos_token_id": None} | mode
    wrong = model.generate(**inputs, **settings)
    right = model.generate(**inputs, **settings, valid_utf8=True)

    def is_text(row, prompt):
        try:
            bytes(byte for byte in row[-30 - len(prompt) :].tolist() if byte < 256).decode()
        except UnicodeDecodeError:
            return False
        return True

    assert not all(is_text(row, prompt) for row, prompt in zip(wrong, prompts)), "random bytes are no text"
    assert all(is_text(row, prompt) for row, prompt in zip(right, prompts))


def test_the_flag_is_an_option_of_a_loaded_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    new = model.generate(torch.tensor([[65] * 3]).expand(4, -1), max_new_tokens=20, do_sample=True, valid_utf8=True)
    assert all(bytes(byte for byte in row.tolist() if byte < 256).decode() for row in new)


def test_the_flag_is_saved_with_the_checkpoint(tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(valid_utf8=True, max_new_tokens=20, do_sample=True, pad_token_id=256)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    new = loaded.generate(torch.tensor([[65] * 3]).expand(4, -1))
    assert all(bytes(byte for byte in row.tolist() if byte < 256).decode() for row in new)


class LikesLongCharacters:
    """Makes `model` begin characters of four bytes whenever it may."""

    def __init__(self, model):
        bonus = torch.zeros(320)
        bonus[0xF0:0xF5] = 15
        model.lm_head.register_forward_hook(lambda module, args, logits: logits + bonus)
        self.model = model


@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampled"])
def test_drafts_of_an_assistant_may_end_inside_a_character(sampling):
    model, assistant = (LikesLongCharacters(tiny_model(use_cache=True, num_trunk_layers=n)).model for n in (2, 1))
    options = {"max_new_tokens": 24, "do_sample": sampling, "valid_utf8": True, "eos_token_id": None}
    for text in ("The trunk", "x", "Zo"):
        prompt = torch.tensor([ids_of(text)])
        found = model.generate(prompt, assistant_model=assistant, **options)[0]
        bytes(i for i in found.tolist() if i < 256).decode()
        if not sampling:
            assert torch.equal(found, model.generate(prompt, **options)[0])


def test_a_character_begun_by_the_prompt_goes_on_even_if_it_does_not_fit():
    options = {"max_new_tokens": 1, "valid_utf8": True}
    for sampling in (False, True):
        found = tiny_model().generate(torch.tensor([[0x61, 0xE2]]), do_sample=sampling, **options)[0].tolist()
        assert found[:2] == [0x61, 0xE2] and 0x80 <= found[2] < 0xC0


def test_a_forced_end_of_text_cuts_no_character():
    bias = [[[lead], 50.0] for lead in range(0xE1, 0xEC)]
    options = {"forced_eos_token_id": 258, "do_sample": False, "valid_utf8": True, "sequence_bias": bias}
    for new in (2, 3, 4, 5):
        found = tiny_model().generate(torch.tensor([ids_of("ab ")]), max_new_tokens=new, **options)[0].tolist()
        assert found[-1] == 258
        bytes(i for i in found if i < 256).decode()


def test_a_character_begun_by_a_prompt_goes_on_behind_padding():
    prompts = [ids_of("One two three"), [0xE6, 0x9D]]
    model = tiny_model()
    options = {"max_new_tokens": 6, "do_sample": False, "valid_utf8": True, "pad_token_id": 256}
    alone = model.generate(torch.tensor(prompts[1:]), **options)[0, 2:]
    for side in ("left", "right"):
        inputs = batch(prompts, side)
        assert torch.equal(model.generate(**inputs, **options)[1, inputs["input_ids"].shape[1] :], alone)
    assert is_prefix_of_text(bytes(prompts[1] + alone.tolist()))


def test_a_reserved_id_may_end_a_text():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + 100.0 * (torch.arange(320) == 300))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 300, "pad_token_id": 256, "valid_utf8": True}
    assert model.generate(torch.tensor([[65]]), **options)[0].tolist() == [65, 300]


def test_the_argument_goes_before_the_flag_of_the_checkpoint():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + 100.0 * (torch.arange(320) == 0xFF))
    model.generation_config.valid_utf8 = True
    options = {"max_new_tokens": 1, "do_sample": False}
    assert model.generate(torch.tensor([[65]]), **options)[0, -1] != 0xFF
    assert model.generate(torch.tensor([[65]]), **options, valid_utf8=False)[0, -1] == 0xFF
