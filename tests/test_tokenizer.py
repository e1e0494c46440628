# SPDX-License-Identifier: Apache-2.0
"""The byte tokenizer: ids, offsets, round trips, chat, and what the library expects around them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, TokenizersBackend

from modeling_stlm import STLMTokenizer

from .tiny import TEXT


TOKENIZER = STLMTokenizer()
SPECIAL = [TOKENIZER.convert_ids_to_tokens(i) for i in range(256, len(TOKENIZER))]
plain = st.text().filter(lambda text: not any(token in text for token in SPECIAL))
CHAT = [
    {"role": "user", "content": "Hi <eos> there"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


@given(plain)
def test_ids_are_the_bytes_and_decode_to_the_text(text):
    ids = TOKENIZER(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode_bytes(text).tolist() == ids


@given(st.binary())
def test_every_byte_sequence_comes_back(data):
    ids = TOKENIZER.encode_bytes(data)
    assert ids.dtype == np.int64 and TOKENIZER.decode_bytes(ids) == data
    assert TOKENIZER.decode_bytes(torch.from_numpy(ids)) == data
    TOKENIZER.decode(ids)  # never raises


@given(plain, plain)
def test_encoding_is_prefix_stable(a, b):
    assert TOKENIZER.encode(a + b) == TOKENIZER.encode(a) + TOKENIZER.encode(b)


@given(plain)
def test_offsets_are_the_characters_of_each_byte(text):
    offsets = TOKENIZER(text, return_offsets_mapping=True)["offset_mapping"]
    expected = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
    assert offsets == expected


def test_characters_and_bytes_map_both_ways():
    encoded = TOKENIZER("Zoë 東")
    assert [encoded.char_to_token(i) for i in range(5)] == [0, 1, 2, 4, 5]
    assert encoded.token_to_chars(6).start == 4


def test_overflow_windows_cover_the_text():
    encoded = TOKENIZER(
        TEXT, truncation=True, max_length=50, stride=10, return_overflowing_tokens=True, return_offsets_mapping=True
    )
    windows = encoded["input_ids"]
    assert all(len(window) == 50 for window in windows[:-1])
    assert bytes(windows[0] + [i for window in windows[1:] for i in window[10:]]) == TEXT.encode()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side(side):
    tokenizer = STLMTokenizer(padding_side=side)
    encoded = tokenizer(["abc", "a"], padding=True)
    expected = [256, 256, 97] if side == "left" else [97, 256, 256]
    assert encoded["input_ids"][1] == expected
    assert encoded["attention_mask"][1] == [int(i != 256) for i in expected]


def test_special_tokens_are_found_unless_told_otherwise():
    assert TOKENIZER("a<eos>")["input_ids"] == [97, 258]
    assert TOKENIZER("a<eos>", split_special_tokens=True)["input_ids"] == list(b"a<eos>")
    assert TOKENIZER.decode([97, 258, 98], skip_special_tokens=True) == "ab"
    assert TOKENIZER.decode_bytes([97, 258, 98]) == b"ab"
    assert TOKENIZER.decode_bytes([97, 258], skip_special_tokens=False) == b"a<eos>"


def test_ids_outside_the_vocabulary_are_named():
    for bad in (-1, 5000):
        with pytest.raises(ValueError, match=f"id {bad} is not in the vocabulary"):
            TOKENIZER.decode_bytes([97, bad])


def test_invalid_bytes_decode_to_replacement_characters_and_nothing_else():
    assert TOKENIZER.decode(list(b"ab\xe6\x97")) == "ab�"
    assert TOKENIZER.decode(list(b"\xff\xfeok")) == "��ok"


def test_chat_template_marks_what_the_assistant_says():
    encoded = TOKENIZER.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True, tokenize=True, add_generation_prompt=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    text = TOKENIZER.decode(ids)
    assert text == (
        "<|im_start|>user\nHi <eos> there<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    said = [token for token, inside in zip(ids, mask) if inside]
    assert said == [*b"Hello", TOKENIZER.convert_tokens_to_ids("<|im_end|>")]


def test_tokens_can_be_added_up_to_the_reserved_rows():
    tokenizer = STLMTokenizer()
    assert tokenizer.add_tokens(["<tool>"]) == 1
    assert tokenizer("<tool>")["input_ids"] == [262]


def test_a_saved_folder_loads_in_full(tmp_path):
    STLMTokenizer(model_max_length=77, padding_side="right").save_pretrained(tmp_path)
    for tokenizer in (STLMTokenizer.from_pretrained(tmp_path), TokenizersBackend.from_pretrained(tmp_path)):
        assert tokenizer(TEXT)["input_ids"] == list(TEXT.encode())
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (256, 258, 77)
        assert tokenizer.padding_side == "right"
        assert tokenizer.chat_template == TOKENIZER.chat_template
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is STLMTokenizer


def test_one_long_string_is_encoded_whole():
    text = TEXT * 3000
    assert TOKENIZER(text)["input_ids"] == list(text.encode())


def test_words_that_come_split_are_joined_by_spaces_on_request(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    words = ["Hello", "wörld", "!"]
    glued = AutoTokenizer.from_pretrained(tmp_path)(words, is_split_into_words=True)
    assert bytes(glued["input_ids"]) == "Hellowörld!".encode()
    spaced = AutoTokenizer.from_pretrained(tmp_path, add_prefix_space=True)(words, is_split_into_words=True)
    assert bytes(spaced["input_ids"]) == " Hello wörld !".encode()
    assert spaced.word_ids() == [0] * 6 + [1] * 7 + [2] * 2
