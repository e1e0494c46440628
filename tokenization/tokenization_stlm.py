# SPDX-License-Identifier: Apache-2.0
"""Byte tokenizer: the id of a byte is the byte, special tokens start at 256.

Behind the usual interface stands one `tokenizers` JSON without merges, so offsets, overflow windows, padding and chat
templates come from the library, and a saved folder loads through `AutoTokenizer` where this package is not installed.
Byte strings that are not UTF-8, and long ones, go through `encode_bytes` and `decode_bytes`.
"""

from collections.abc import Iterable

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode


NUM_BYTES = 256
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<mask>", "<|im_start|>", "<|im_end|>"]  # ids from 256 on

# ChatML. Only what the assistant says, its end marker included, counts as generated.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level_words(add_prefix_space: bool) -> pre_tokenizers.PreTokenizer:
    """Cutting into words changes no id; it gives `word_ids()` and `char_to_word()` something to count."""
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)


def byte_level_backend() -> Tokenizer:
    """A `tokenizers` model whose vocabulary is the 256 bytes, ids equal to values, and the special tokens."""
    # ByteLevel writes byte b as the character bytes_to_unicode()[b].
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = byte_level_words(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return backend


class STLMTokenizer(TokenizersBackend):
    r"""
    Byte tokenizer of STLM. `encode(a + b) == encode(a) + encode(b)` for all strings without special tokens inside, and
    no special token is added by itself.

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
            }
            kwargs = defaults | kwargs
        super().__init__(tokenizer_file=tokenizer_file, **kwargs)
        if "add_prefix_space" in kwargs:
            self.backend_tokenizer.pre_tokenizer = byte_level_words(kwargs["add_prefix_space"])

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict:
        """The library would take the JSON apart and build anew for a class with an `__init__`; ours takes it whole."""
        return kwargs

    def encode_bytes(self, data: bytes | bytearray | memoryview | str) -> np.ndarray:
        """Ids of any byte string, or of the UTF-8 bytes of a string, special tokens not looked for.

        About a hundred times as fast as `encode`: the way for corpora and for single long documents.

        Returns:
            `np.ndarray` of shape `(T,)`, int64.
        """
        if isinstance(data, str):
            data = data.encode("utf-8")
        return np.frombuffer(data, dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> bytes:
        """The exact bytes behind `token_ids`, also where they are not UTF-8.

        Args:
            token_ids: ids, as a list, array or tensor of one axis.
            skip_special_tokens: leave special tokens out; otherwise they are written as their names.

        Raises:
            ValueError: if an id is negative or not in the vocabulary.
        """
        pieces = []
        for token_id in map(int, token_ids):
            if 0 <= token_id < NUM_BYTES:
                pieces.append(token_id.to_bytes(1, "big"))
            elif not NUM_BYTES <= token_id < len(self):
                raise ValueError(f"id {token_id} is not in the vocabulary: expected 0 to {len(self) - 1}")
            elif not skip_special_tokens:
                pieces.append(self.convert_ids_to_tokens(token_id).encode("utf-8"))
        return b"".join(pieces)


__all__ = ["STLMTokenizer"]
