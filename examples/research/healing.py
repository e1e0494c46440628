# SPDX-License-Identifier: Apache-2.0
"""Completion while somebody types with a Llama over a BPE, healed at the token that the end of the text cuts.

The end of what was typed is in the middle of a token more often than not, and the tokens before it are then others than
those of the whole word: after " catal", of which the tokenizer makes " cat" and "al", "ogue" is unlikely where " catalogue" is
one token. Token healing (Lundberg, "The Art of Prompt Design: Prompt Boundaries and Token Healing", 2023) gives back the last
token and takes the likeliest of those that begin with its text. Here any number of tokens is given back, and until the next
ones have made up for their text, these must agree with it: begin with what is left, or be the beginning of it.

`generate(token_healing=True)` of transformers does not fit: it strips the text, so that nothing tells "the" from "the ", it makes
the ids, a trie of the vocabulary and the cache anew for each call, and it adds 10 to logits instead of leaving others out.
"""

import re
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


# A byte-level BPE, which cuts the text by the regular expression of GPT-2 first, has a token start at such a space.
BEFORE_LAST_WORD = re.compile(r".*\S(?= \S)", re.DOTALL)


class Reader:
    """Logits after ids, of which only those are read that differ from the last ones."""

    def __init__(self):
        self.forget()

    def forget(self) -> None:
        self.ids, self.known = [], []  # that were read, and the logits after each, where they were computed

    def logits(self, ids: list[int]) -> np.ndarray:
        same = next((i for i, (new, old) in enumerate(zip(ids, self.ids)) if new != old), min(len(ids), len(self.ids)))
        if same == len(ids) and self.known[same - 1] is not None:
            return self.known[same - 1]
        kept = min(same, len(ids) - 1)
        logits = self._read(ids[kept:], kept)
        self.known = [*self.known[:kept], *[None] * (len(ids) - kept - 1), logits]
        self.ids = list(ids)
        return logits

    def _read(self, ids: list[int], kept: int) -> np.ndarray:
        """Logits after `ids`, which come after the first `kept` of the ids before."""
        raise NotImplementedError


class TorchReader(Reader):
    """Through PyTorch.

    Args:
        model (`LlamaForCausalLM`): the model, or another with a cache that can be cropped.
    """

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model, self.cache = model.eval(), DynamicCache(config=model.config)

    @torch.inference_mode()
    def _read(self, ids: list[int], kept: int) -> np.ndarray:
        if too_many := self.cache.get_seq_length() - kept:
            self.cache.crop(-too_many)
        output = self.model(torch.tensor([ids]), cache=self.cache, logits_to_keep=1)
        return output.logits[0, -1].float().numpy()


class LlamaCppReader(Reader):
    """Through llama.cpp on one thread.

    Args:
        path (`Path`): file of `llamacpp.write_gguf`.
        max_ids (`int`): of a text with what is written after it.
    """

    def __init__(self, path: Path, max_ids: int = 4096):
        import llama_cpp

        super().__init__()
        self.library = llama_cpp
        llama_cpp.llama_backend_init()
        self.silent = llama_cpp.llama_log_callback(lambda *message: None)
        llama_cpp.llama_log_set(self.silent, None)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = max_ids
        settings.n_threads = settings.n_threads_batch = 1
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.batch = llama_cpp.llama_batch_init(max_ids, 0, 1)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def _read(self, ids: list[int], kept: int) -> np.ndarray:
        library, batch = self.library, self.batch
        library.llama_memory_seq_rm(library.llama_get_memory(self.context), 0, kept, -1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, kept + i, 1, 0
            batch.logits[i] = i == len(ids) - 1
        assert library.llama_decode(self.context, batch) == 0
        logits = library.llama_get_logits_ith(self.context, len(ids) - 1)
        return np.ctypeslib.as_array(logits, shape=(self.vocab_size,)).copy()


def pieces_of(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What each token of a byte-level BPE stands for, nothing for special tokens."""
    values = {character: value for value, character in bytes_to_unicode().items()}
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [b"" if i in special else bytes(values[c] for c in token) for i, token in enumerate(tokens)]


class Healed:
    """Completion as [`Engine.complete`] has it.

    Args:
        reader (`Reader`): the model.
        tokenizer (`PreTrainedTokenizerBase`): its byte-level BPE.
        give_back (`int` or `None`): tokens of the last word that are given back; all if `None`, and 0 heals nothing.
    """

    def __init__(self, reader: Reader, tokenizer: PreTrainedTokenizerBase, give_back: int | None = 1):
        self.reader, self.tokenizer, self.give_back = reader, tokenizer, give_back
        self.pieces, beginnings = pieces_of(tokenizer), {}
        for i, piece in enumerate(self.pieces):
            for end in range(1, len(piece) + 1):
                beginnings.setdefault(piece[:end], []).append(i)
        self.beginning_with = {beginning: np.array(ids) for beginning, ids in beginnings.items()}
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if piece}
        self.before = "", []  # the last word, and its tokens: most keys do not change them

    def tokens(self, text: str) -> tuple[list[int], list[int]]:
        """Those before the last word of `text`, and those of it with all that follows it."""
        match = BEFORE_LAST_WORD.match(text)
        before = match.group() if match else ""
        if before != self.before[0]:
            self.before = before, self._encode(before)
        return self.before[1], self._encode(text[len(before) :])

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def allowed(self, left: bytes) -> np.ndarray:
        """Tokens that begin with `left`, and those that are the beginning of it."""
        shorter = [self.ids[left[:end]] for end in range(1, len(left)) if left[:end] in self.ids]
        return np.append(self.beginning_with.get(left, []), shorter).astype(np.int64)

    def complete(self, text: str, max_new_bytes: int) -> bytes:
        """The likeliest tokens after `text`, cut to `max_new_bytes`."""
        before, last = self.tokens(text)
        kept = 0 if self.give_back is None else max(0, len(last) - self.give_back)
        ids, left = [self.tokenizer.bos_token_id, *before, *last[:kept]], self.pieces_joined(last[kept:])
        logits, written, num_healed = self.reader.logits(ids), b"", len(left)
        while max_new_bytes and len(written) < num_healed + max_new_bytes:
            if left:
                allowed = self.allowed(left)
                token = int(allowed[logits[allowed].argmax()])
            else:
                token = int(logits.argmax())
            if not self.pieces[token]:
                break
            written, left = written + self.pieces[token], left[len(self.pieces[token]) :]
            if len(written) < num_healed + max_new_bytes:
                ids = [*ids, token]
                logits = self.reader.logits(ids)
        return written[num_healed:][:max_new_bytes]

    def pieces_joined(self, ids: list[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)

    def generate(self, text: str, max_new_bytes: int) -> bytes:
        """As [`Healed.complete`], with nothing that was read before."""
        self.reader.forget()
        self.before = "", []
        return self.complete(text, max_new_bytes)
