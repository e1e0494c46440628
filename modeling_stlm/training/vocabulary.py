# SPDX-License-Identifier: Apache-2.0
"""A smaller vocabulary that covers nearly all of a corpus (PanGu-pi Pro, arXiv:2402.02791, on compact tokenizers).

In the paper, 48k of 100k tokens cover 97.9% of the corpus, and embedding and head shrink to half. Here it serves
`patching="vocabulary"` and the byte-level BPE tokenizers of teachers and controls.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


TEXTS_AT_ONCE = 256


@dataclass
class CompressedVocabulary:
    """
    Args:
        tokenizer (`PreTrainedTokenizerFast`): with the kept pieces only.
        kept_ids (`list[int]`): old id of each new one, so `embedding.weight[kept_ids]` are the rows of a smaller model.
        coverage (`float`): share of the corpus's tokens, as the old tokenizer made them, that were kept.
        bytes_per_token, bytes_per_token_before (`float`): of the corpus.
        num_pieces, num_pieces_before (`int`): entries of the vocabularies, added tokens included.
    """

    tokenizer: PreTrainedTokenizerFast
    kept_ids: list[int]
    coverage: float
    bytes_per_token: float
    bytes_per_token_before: float
    num_pieces: int
    num_pieces_before: int

    @property
    def patch_vocabulary(self) -> str:
        """For the field of that name of a config with `patching="vocabulary"`."""
        ids, added = self.tokenizer.get_vocab(), added_tokens(self.tokenizer)
        return " ".join(piece for piece in sorted(ids, key=ids.get) if piece not in added)

    def __str__(self) -> str:
        return (
            f"{self.num_pieces:,} of {self.num_pieces_before:,} pieces cover {self.coverage:.2%} of the corpus: "
            f"{self.bytes_per_token:.2f} bytes per token, {self.bytes_per_token_before:.2f} before"
        )


def compress_vocabulary(
    tokenizer: PreTrainedTokenizerBase, corpus: Iterable[str | bytes], coverage: float
) -> CompressedVocabulary:
    """The most frequent pieces of a byte-level BPE tokenizer that make up a share `coverage` of the corpus.

    The 256 bytes and added tokens always stay, so every text can still be spelt. So do the pieces from which a kept piece
    is merged: text whose old tokens were all kept is tokenized as before.

    Args:
        tokenizer: fast, byte-level BPE (GPT-2, Llama 3, SmolLM, `train_bpe` of the examples).
        corpus: texts; bytes are read as UTF-8. Read twice, so no iterator.
        coverage (`float`): more than 0, at most 1; with 1 all pieces that occur stay.

    Raises:
        ValueError: if the tokenizer is not byte-level BPE, if the corpus has no text, or if `coverage` is no share.
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage={coverage} must be more than 0 and at most 1")
    if isinstance(corpus, (str, bytes, Iterator)):
        raise ValueError(f"corpus is a {type(corpus).__name__}, expected texts that can be read twice, such as a list")
    state = backend_of(tokenizer)
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    always = {*bytes_to_unicode().values(), *added_tokens(tokenizer)}
    counts, num_bytes = count_tokens(tokenizer, corpus)
    if not counts.any():
        raise ValueError("the corpus has no text")

    pieces = {token_id: piece for piece, token_id in vocabulary.items()}
    frequent = np.argsort(-counts, kind="stable")
    needed = 1 + int(np.searchsorted(counts[frequent].cumsum() / counts.sum(), coverage))
    kept = {pieces[token_id] for token_id in frequent[:needed].tolist() if token_id in pieces}
    ranks = {tuple(merge): rank for rank, merge in reversed([*enumerate(merges)])}
    for piece in list(kept):
        kept |= parts_of(piece, ranks)
    everything = tokenizer.get_vocab()
    kept_ids = sorted(token_id for piece, token_id in everything.items() if piece in kept | always)

    compressed = rebuild(tokenizer, state, kept_ids)
    new_counts, _ = count_tokens(compressed, corpus)
    return CompressedVocabulary(
        tokenizer=compressed,
        kept_ids=kept_ids,
        coverage=float(counts[kept_ids].sum() / counts.sum()),
        bytes_per_token=num_bytes / int(new_counts.sum()),
        bytes_per_token_before=num_bytes / int(counts.sum()),
        num_pieces=len(kept_ids),
        num_pieces_before=len(everything),
    )


def backend_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The `tokenizer.json` of a byte-level BPE tokenizer."""
    kind = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ValueError(f"{kind} is slow, expected a fast tokenizer of byte-level BPE")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    missing = set(bytes_to_unicode().values()) - set(model.get("vocab", ()))
    if model["type"] != "BPE" or missing:
        raise ValueError(
            f"{kind} is {model['type']} without {len(missing)} of the 256 bytes, expected byte-level BPE, which has all of "
            "them"
        )
    if marks := [model[name] for name in ("continuing_subword_prefix", "end_of_word_suffix") if model[name]]:
        raise ValueError(f"{kind} marks pieces with {marks}, expected byte-level BPE, whose pieces are bytes alone")
    return state


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {str(token) for token in tokenizer.added_tokens_decoder.values()}


def count_tokens(tokenizer: PreTrainedTokenizerBase, corpus: Iterable[str | bytes]) -> tuple[np.ndarray, int]:
    """How often each id occurs in the corpus (V,), and the bytes of the corpus."""
    counts, num_bytes = np.zeros(1 + max(tokenizer.get_vocab().values()), dtype=np.int64), 0
    texts = (text if isinstance(text, str) else text.decode("utf-8") for text in corpus)
    while batch := list(islice(texts, TEXTS_AT_ONCE)):
        num_bytes += sum(len(text.encode("utf-8")) for text in batch)
        ids = [*chain.from_iterable(tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])]
        counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=len(counts))
    return counts, num_bytes


def parts_of(piece: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """The pieces that BPE passes through on its way to `piece`, itself included.

    Inside a longer text they are the same: no merge that takes part crosses the borders of the piece.
    """
    parts, seen = list(piece), set(piece)
    while known := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, i = min(known)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
        seen.add(parts[i])
    return seen


def rebuild(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], kept_ids: list[int]) -> PreTrainedTokenizerFast:
    """`tokenizer` with the tokens `kept_ids` only, numbered in that order."""
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    model = state["model"]
    model["vocab"] = {piece: new_ids[old] for piece, old in model["vocab"].items() if old in new_ids}
    model["merges"] = [
        (left, right) for left, right in model["merges"] if {left, right, left + right} <= model["vocab"].keys()
    ]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    renumber(state["post_processor"], new_ids)
    state["padding"] = state["truncation"] = None  # of the last call
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=tokenizer.model_input_names,
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        extra_special_tokens=tokenizer.extra_special_tokens,
        **tokenizer.special_tokens_map,
    )


def renumber(processor: Any, new_ids: dict[int, int]) -> None:
    """Put new ids into the special tokens of a post-processor, in place."""
    for part in processor.get("processors", [processor]) if processor else []:
        for token in part.get("special_tokens", {}).values():  # of a template
            token["ids"] = [new_ids[old] for old in token["ids"]]
        for name in ("cls", "sep"):  # of BERT and RoBERTa
            if name in part:
                part[name] = [part[name][0], new_ids[part[name][1]]]
