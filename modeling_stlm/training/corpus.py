# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk, and windows of it.

A corpus is a flat file of ids plus the starts of its documents; the file of starts also stores the number and the type of
the ids. With a byte tokenizer the file is the text itself: any file of bytes is a corpus of one document. Windows are cut
from the endless row `<bos> document <eos> <bos> ...`; documents that share a window stay apart through `position_ids`.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


def ids_are_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the vocabulary is the 256 bytes, ids equal to values, whatever the class of the tokenizer."""
    bytes_of_ids = bytes_to_unicode()
    ids = tokenizer.convert_tokens_to_ids(list(bytes_of_ids.values()))
    return tokenizer.vocab_size == len(bytes_of_ids) and ids == list(bytes_of_ids)


def write_corpus(path: str | Path, documents: Iterable[str | bytes], tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the ids of `documents` to `path` and the starts of the documents to `path` + `.starts.npy`.

    The file holds uint8 if the ids are bytes, else uint16. It appears under its name only when it is complete, also when
    several processes write it at once.

    Raises:
        ValueError: if the vocabulary needs more than 16 bits, if a document is no text, or if there is no text.
    """
    if isinstance(documents, (str, bytes)):
        raise ValueError("got one text, expected an iterable of documents, such as a list of texts")
    path = Path(path)
    dtype = dtype_of(tokenizer)
    as_bytes = dtype == np.uint8
    if not as_bytes and len(tokenizer) > 2**16:
        raise ValueError(f"a corpus holds ids of at most 16 bits, the tokenizer has {len(tokenizer)} tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_starts = starts_path(partial)
    starts = [0]
    try:
        with partial.open("wb") as file:
            for number, document in enumerate(documents, start=1):
                if not isinstance(document, (str, bytes)):
                    raise ValueError(f"document {number} is a {type(document).__name__}, expected str or bytes")
                if as_bytes:
                    ids = document.encode("utf-8") if isinstance(document, str) else document
                else:
                    text = document if isinstance(document, str) else document.decode("utf-8")
                    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=dtype)
                if len(ids):
                    file.write(ids)
                    starts.append(starts[-1] + len(ids))
        if len(starts) == 1:
            raise ValueError("there is no text: every document is empty")
        np.save(partial_starts, np.asarray(starts, dtype=np.int64).view([(dtype.name, np.int64)]))
        partial_starts.replace(starts_path(path))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        partial_starts.unlink(missing_ok=True)
        raise
    return path


def dtype_of(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """Type of the ids of a corpus."""
    return np.dtype(np.uint8 if ids_are_bytes(tokenizer) else np.uint16)


def starts_path(path: Path) -> Path:
    return path.with_name(path.name + ".starts.npy")


def read_starts(path: Path, dtype: np.dtype) -> np.ndarray:
    """Starts of the documents of a corpus with ids of `dtype`, then the number of all ids: int64.

    Raises:
        ValueError: if these are not the starts of this file, or if its ids are of another type.
    """
    size = path.stat().st_size
    if not starts_path(path).is_file():
        starts = np.array([0, size]).view([("uint8", np.int64)])
    else:
        starts = np.load(starts_path(path))
    if starts.dtype == np.int64:  # as earlier versions wrote them: without the type and the number of ids
        # A start in the second half of the file counts bytes: there are half as many ids of 16 bits.
        if 2 * starts[-1] < size:
            raise ValueError(
                f"{starts_path(path)} does not say of which type the ids of {path.name} are, as an earlier version wrote "
                f"it: delete {path} and write the corpus again"
            )
        starts = np.append(starts, size).view([("uint8", np.int64)])
    (name,) = starts.dtype.names
    starts = starts.view(np.int64)
    found = np.dtype(name).itemsize * starts[-1]
    if name != dtype.name:
        raise ValueError(
            f"{path} holds ids of type {name}, expected {dtype.name}: it was written with another tokenizer"
        )
    if size == 0 or size != found:
        raise ValueError(
            f"{path} has {size} bytes, but its documents end at byte {found}: it is empty or was changed since, write the "
            "corpus again"
        )
    return starts


class PackedWindows(Dataset):
    """Windows of `block_size` ids of a corpus, for causal language modelling.

    Items are dicts of `input_ids`, `labels` (-100 where a document starts, which nothing can predict) and `position_ids`
    (counted from the start of each document or of the window), each of shape `(block_size,)`, int64.

    A pickled instance holds the path, not the ids: worker processes open the file again.

    Args:
        path: corpus written by [`write_corpus`], or any file, which is then one document of bytes.
        tokenizer: gives `bos_token_id` and `eos_token_id`, which may be the same, and the type of the ids in the file.
        block_size (`int`): ids in a window. What is left over at the end of the corpus is dropped.

    Raises:
        ValueError: if the corpus is shorter than one window, if its ids are of another type than those of `tokenizer`, if
            its file is not the one that was written, or if `tokenizer` has no token that begins or ends a text.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, block_size: int):
        for name in ("bos_token", "eos_token"):
            if getattr(tokenizer, f"{name}_id") is None:
                raise ValueError(
                    f"documents need a token before and after them, but the tokenizer has no {name}: set it"
                )
        self.path, self.dtype = Path(path).absolute(), dtype_of(tokenizer)
        self.bos, self.eos, self.block_size = tokenizer.bos_token_id, tokenizer.eos_token_id, block_size
        self._open()
        if len(self) == 0:
            raise ValueError(
                f"{path} holds {self.packed_starts[-1]} ids with special tokens, fewer than one window of {block_size}"
            )

    def _open(self) -> None:
        self.starts = read_starts(self.path, self.dtype)
        self.ids = np.memmap(self.path, dtype=self.dtype, mode="r")
        # First id of each document in the row with `<bos>` and `<eos>`.
        self.packed_starts = self.starts + 2 * np.arange(len(self.starts))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def documents(self) -> Iterator[memoryview]:
        """The bytes of each document in the file, not copied: its text, or its ids of 16 bits."""
        for start, end in pairwise(self.starts):
            yield memoryview(self.ids[start:end]).cast("B")

    def __len__(self) -> int:
        return int(self.packed_starts[-1]) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first, end = index * self.block_size, (index + 1) * self.block_size
        input_ids, position_ids, labels = np.empty((3, self.block_size), dtype=np.int64)
        document = int(np.searchsorted(self.packed_starts, first, side="right")) - 1
        at = first
        while at < end:
            start, stop = int(self.packed_starts[document]), int(self.packed_starts[document + 1])
            upto = min(stop, end)
            here = slice(at - first, upto - first)
            input_ids[here] = labels[here] = self._document_ids(document, at - start, upto - start)
            if at == start:
                labels[at - first] = -100
            position_ids[here] = np.arange(upto - at)
            at, document = upto, document + 1
        arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _document_ids(self, document: int, first: int, end: int) -> np.ndarray:
        """Ids `first` to `end` of a document with `<bos>` before and `<eos>` after it."""
        start, stop = int(self.starts[document]), int(self.starts[document + 1])
        text = self.ids[start + max(first - 1, 0) : min(start + end - 1, stop)].astype(np.int64)
        bos = [self.bos] if first == 0 else []
        eos = [self.eos] if end == stop - start + 2 else []
        return np.concatenate([np.asarray(bos, dtype=np.int64), text, np.asarray(eos, dtype=np.int64)])
