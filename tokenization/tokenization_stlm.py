# SPDX-License-Identifier: Apache-2.0
"""Byte tokenizer: the id of a byte is the byte, special tokens start at 256.

Behind the usual interface stands one `tokenizers` JSON without merges, so offsets, overflow windows, padding and chat
templates come from the library, and a saved folder loads through `AutoTokenizer` where this package is not installed.
Byte strings that are not UTF-8, and long ones, go through `encode_bytes` and `decode_bytes`.
"""

import copy
from collections.abc import Iterable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode


BYTE_PIECES = {byte: bytes([byte]) for byte in range(256)}
BYTE_VOCABULARY = {character: byte for byte, character in bytes_to_unicode().items()}  # as ByteLevel writes bytes
CHAT_MARKERS = ["<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<mask>", *CHAT_MARKERS]  # ids from 256 on

# ChatML, text only. What the assistant says, including its end marker, counts as generated. Whatever the template cannot
# express raises an error instead of being dropped silently.
CHAT_TEMPLATE = r"""{%- macro text_of(message, name) %}
    {%- set content = message['content'] %}
    {%- if message['tool_calls'] %}
        {{- raise_exception(name ~ " has tool_calls, which this chat template does not support") }}
    {%- elif content is string %}
        {{- content }}
    {%- elif not content or content is mapping or content is not iterable %}
        {{- raise_exception(name ~ " has no content: expected a string or a list of text parts") }}
    {%- else %}
        {%- for part in content %}
            {%- if part['type'] != 'text' or part['text'] is not string %}
                {{- raise_exception(name ~ " has a content part of type '" ~ part['type']
                    ~ "': this model reads text only, expected {'type': 'text', 'text': '...'}") }}
            {%- endif %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools or documents %}
    {{- raise_exception("this chat template supports neither tools nor documents: write them into a message") }}
{%- endif %}
{%- for message in messages %}
    {%- set text = text_of(message, "message " ~ loop.index0 ~ " (role '" ~ message['role'] ~ "')") %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- text + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- text + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def byte_level_words(add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    """Cutting into words changes no id; it gives `word_ids()` and `char_to_word()` something to count."""
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)


def byte_level_backend() -> Tokenizer:
    """A `tokenizers` model whose vocabulary is the 256 bytes, ids equal to values, and the special tokens."""
    backend = Tokenizer(models.BPE(vocab=BYTE_VOCABULARY, merges=[]))
    backend.pre_tokenizer = byte_level_words(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    separator = "<eos>", backend.token_to_id("<eos>")
    backend.post_processor = processors.TemplateProcessing("$A", "$A <eos> $B:1", special_tokens=[separator])
    return backend


class STLMTokenizer(TokenizersBackend):
    r"""
    Byte tokenizer of STLM. `encode(a + b) == encode(a) + encode(b)` for all strings without special tokens inside. No
    special token is added by itself, but for `<eos>` between the texts of a pair.

    Args:
        add_prefix_space (`bool`, *optional*): put a space before every text that does not start with one.
        kwargs: as for every tokenizer of the library: `padding_side`, `model_max_length` (in bytes), `chat_template`...

    Example:

    ```python
    >>> from tokenization_stlm import STLMTokenizer
    >>> tokenizer = STLMTokenizer()
    >>> tokenizer("Zoë")
    {'input_ids': [90, 111, 195, 171], 'attention_mask': [1, 1, 1, 1]}
    >>> tokenizer.decode_bytes(tokenizer.encode_bytes(b"\xff\x00 not UTF-8"))
    b'\xff\x00 not UTF-8'

    ```
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, tokenizer_file: str | None = None, **kwargs):
        if tokenizer_file is None and "tokenizer_object" not in kwargs:
            defaults = {
                "tokenizer_object": byte_level_backend(),
                "pad_token": "<pad>",
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "mask_token": "<mask>",
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
                "padding_side": self.padding_side,  # saved, for where the tokenizer loads without this class
            }
            kwargs = defaults | kwargs
        super().__init__(tokenizer_file=tokenizer_file, **kwargs)
        if "add_prefix_space" in kwargs:
            self.backend_tokenizer.pre_tokenizer = byte_level_words(kwargs["add_prefix_space"])
        if self.backend_tokenizer.get_vocab(with_added_tokens=False) != BYTE_VOCABULARY:
            raise ValueError(
                f"STLMTokenizer expects the 256 bytes as vocabulary, ids equal to values, got {self.vocab_size} other "
                "tokens: load this tokenizer as a PreTrainedTokenizerFast"
            )
        # The other special tokens have roles that the library knows.
        extra = self.extra_special_tokens
        self.extra_special_tokens = [*(token for token in CHAT_MARKERS if token not in extra), *extra]

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict:
        """The library would take the JSON apart and rebuild it for a class with an `__init__`; ours takes it whole."""
        return kwargs

    def train_new_from_iterator(self, *args, **kwargs) -> PreTrainedTokenizerFast:
        """Train a byte-level BPE tokenizer with the same special tokens. It is a plain tokenizer: its ids are not bytes."""
        plain = copy.copy(self)
        plain.__class__ = PreTrainedTokenizerFast  # the library returns an instance of the same class
        return plain.train_new_from_iterator(*args, **kwargs)

    def encode_bytes(self, data: bytes | bytearray | memoryview | str) -> np.ndarray:
        """Ids of any byte string, or of the UTF-8 bytes of a string; special and added tokens are not looked for.

        About a hundred times as fast as `encode`: the way for corpora and for single long documents.

        Returns:
            `np.ndarray` of shape `(T,)`, int64.
        """
        if isinstance(data, str):
            data = data.encode("utf-8")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> bytes:
        """The exact bytes behind `token_ids`, also where they are not UTF-8. Added tokens are written as their text.

        Args:
            token_ids: ids, as a list, array or tensor of one axis.
            skip_special_tokens: leave special tokens out; otherwise they are written as their text, too.

        Raises:
            ValueError: if an id is negative or not in the vocabulary.
        """
        pieces = self._pieces(skip_special_tokens)
        try:
            return b"".join([pieces[token_id] for token_id in map(int, token_ids)])
        except KeyError as error:
            expected = f"expected 0 to {len(self) - 1}"
            raise ValueError(f"id {error.args[0]} is not in the vocabulary: {expected}") from None

    def _pieces(self, skip_special_tokens: bool) -> dict[int, bytes]:
        """The bytes of every id in the vocabulary."""
        return BYTE_PIECES | {
            token_id: b"" if token.special and skip_special_tokens else token.content.encode("utf-8")
            for token_id, token in self.added_tokens_decoder.items()
        }

    def _decode(self, token_ids, skip_special_tokens: bool = False, **kwargs) -> str:
        if len(self) == len(BYTE_PIECES) + len(SPECIAL_TOKENS):
            return super()._decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        # The ByteLevel decoder of the library mistakes letters such as `\u00fc` in added tokens for bytes.
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        pieces = self._pieces(skip_special_tokens)
        # Ids without a token, such as reserved ones, are skipped, as in the library.
        return b"".join([pieces.get(token_id, b"") for token_id in ids]).decode("utf-8", errors="replace")


__all__ = ["STLMTokenizer"]
