# SPDX-License-Identifier: Apache-2.0
"""The byte tokenizer: ids, offsets, round trips, chat, and what the library expects around them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, TextStreamer, TokenizersBackend

from modeling_stlm import STLMTokenizer

from .tiny import TEXT


TOKENIZER = STLMTokenizer()
SHIPPED = [Path(__file__).parents[1] / "examples" / "checkpoints" / name for name in ("stlm-10m-wide", "stlm-3m")]
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


def test_the_chat_template_reads_text_parts():
    parts = [[{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}] for text in ("Hi", "Hello")]
    chat = [{"role": role, "content": content} for role, content in zip(("user", "assistant"), parts)]
    encoded = TOKENIZER.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert TOKENIZER.decode(encoded["input_ids"]) == text
    said = [token for token, inside in zip(encoded["input_ids"], encoded["assistant_masks"]) if inside]
    assert TOKENIZER.decode(said) == "Hello<|im_end|>"
    unfinished = TOKENIZER.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert unfinished == text.removesuffix("<|im_end|>\n")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({}, r"message 1 \(role 'user'\) has no content: expected a string or a list of text parts"),
        ({"content": None}, "has no content"),
        ({"content": []}, "has no content"),
        ({"content": 5}, "has no content"),
        ({"content": {"type": "text", "text": "hi"}}, "has no content"),
        (
            {"content": [{"type": "text", "text": "x"}, {"type": "image"}]},
            "content part of type 'image': .* text only",
        ),
        ({"content": [{"type": "text"}]}, "content part of type 'text': .* expected {'type': 'text', 'text'"),
        ({"content": ["hi"]}, "content part of type ''"),
        ({"content": "", "tool_calls": [{"name": "f"}]}, "has tool_calls, which this chat template does not support"),
    ],
)
def test_the_chat_template_says_what_it_cannot_express(message, error):
    with pytest.raises(TemplateError, match=error):
        TOKENIZER.apply_chat_template([CHAT[0], {"role": "user"} | message], tokenize=False)


def test_the_chat_template_refuses_tools_and_documents():
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    for options in ({"tools": [tool]}, {"documents": [{"title": "a", "text": "b"}]}):
        with pytest.raises(TemplateError, match="supports neither tools nor documents"):
            TOKENIZER.apply_chat_template(CHAT, tokenize=False, **options)
    assert TOKENIZER.apply_chat_template(CHAT, tokenize=False, tools=[]).endswith("Bye<|im_end|>\n")


def test_tokens_can_be_added_up_to_the_reserved_rows():
    tokenizer = STLMTokenizer()
    assert tokenizer.add_tokens(["<tool>"]) == 1
    assert tokenizer("<tool>")["input_ids"] == [262]


def test_added_tokens_come_back_as_their_text():
    tokenizer = STLMTokenizer()
    tokenizer.add_tokens(["<tool>", "f\u00fcr", "two words", "\u6771"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<special>"]}, replace_extra_special_tokens=False)
    text = "a <tool> f\u00fcr \u00e9 two words<special>\u6771<eos>!"
    ids = tokenizer(text)["input_ids"]
    assert {262, 263, 264, 265, 266} < set(ids)
    for skip in (True, False):
        expected = text.replace("<special>", "").replace("<eos>", "") if skip else text
        assert tokenizer.decode_bytes(ids, skip_special_tokens=skip) == expected.encode()
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
        streamed = [tokenizer.decode_bytes([i], skip_special_tokens=skip) for i in ids]
        assert b"".join(streamed) == expected.encode()
    assert tokenizer.encode_bytes(text).tolist() == list(text.encode())
    for decode in (tokenizer.decode, TOKENIZER.decode):
        assert decode([97, 300, 98, 0xE6]) == "ab\ufffd", "a reserved id has no token"
        assert decode(97) == "a" and decode([[97], [98]]) == ["a", "b"] and decode(TOKENIZER("ab")) == "ab"


class Streamed(TextStreamer):
    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


def test_added_tokens_are_streamed():
    tokenizer = STLMTokenizer()
    tokenizer.add_tokens(["<f\u00fcr>"])
    streamer = Streamed(tokenizer)
    for token_id in tokenizer("a <f\u00fcr>\u6771 b")["input_ids"]:
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert streamer.text == "a <f\u00fcr>\u6771 b"


def test_a_newly_trained_tokenizer_is_no_byte_tokenizer(tmp_path):
    trained = STLMTokenizer(model_max_length=77).train_new_from_iterator(["hello world"] * 20, 300)
    assert type(trained) is TokenizersBackend and not hasattr(trained, "decode_bytes")
    ids = trained("hello world<eos>")["input_ids"]
    assert len(ids) < 12 and ids[-1] == trained.eos_token_id and trained.decode(ids) == "hello world<eos>"
    assert trained.model_max_length == 77 and trained.all_special_tokens == TOKENIZER.all_special_tokens
    trained.save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is TokenizersBackend
    with pytest.raises(ValueError, match=r"expects the 256 bytes as vocabulary.* got \d+ other tokens"):
        STLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", [None, *SHIPPED], ids=lambda path: path.name if path else "saved")
@pytest.mark.parametrize("kind", [STLMTokenizer, TokenizersBackend])
def test_chat_markers_are_special_and_padding_is_left(tmp_path, path, kind):
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer = kind.from_pretrained(path or tmp_path)
    assert tokenizer(["ab", "c"], padding=True)["input_ids"][1] == [256, 99], "texts to be continued are padded left"
    assert sorted(tokenizer.all_special_ids) == [256, 257, 258, 259, 260, 261] and len(tokenizer) == 262
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [260, 261]
    ids = tokenizer("<bos><|im_start|>user\nhi<|im_end|><eos>")["input_ids"]
    mask = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert mask == [int(i >= 256) for i in ids]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.9)([{"input_ids": ids}] * 20)
    chosen = batch["labels"] != -100
    assert chosen.any() and (batch["labels"][chosen] < 256).all()
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"


def test_chat_markers_stay_special_in_folders_saved_before_they_were(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["extra_special_tokens"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert {260, 261} < set(AutoTokenizer.from_pretrained(tmp_path).all_special_ids)
    more = STLMTokenizer(extra_special_tokens=["<more>"])
    assert more.extra_special_tokens == ["<|im_start|>", "<|im_end|>", "<more>"]
    assert more("<more>")["input_ids"] == [262]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_the_shipped_files_are_those_of_this_tokenizer(tmp_path, path):
    TOKENIZER.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((path / name).read_text()) == json.loads((tmp_path / name).read_text())
    assert (path / "chat_template.jinja").read_text() == TOKENIZER.chat_template


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


def test_the_texts_of_a_pair_are_separated(tmp_path):
    tokenizer = STLMTokenizer()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        pair = loaded("hi", "Zoë")
        assert pair["input_ids"] == [*b"hi", 258, *"Zoë".encode()]
        assert pair.sequence_ids() == [0, 0, None, 1, 1, 1, 1]
        assert loaded("hi")["input_ids"] == [*b"hi"]
        cut = loaded("hi", "a long text", truncation="only_second", max_length=6)
        assert cut["input_ids"] == [*b"hi", 258, *b"a l"]
