# SPDX-License-Identifier: Apache-2.0
"""A corpus on disk, and windows of it.

A corpus is a flat file of ids plus the starts of its documents. With a byte tokenizer the file is the text itself: any
file of bytes is a corpus of one document. Windows are cut from the endless row `<bos> document <eos> <bos> ...`;
documents that share a window stay apart through `position_ids`.
"""

import os
from collections.abc import Iterable
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
        ValueError: if the vocabulary needs more than 16 bits, or if there is no text.
    """
    path = Path(path)
    as_bytes = ids_are_bytes(tokenizer)
    if not as_bytes and len(tokenizer) > 2**16:
        raise ValueError(f"a corpus holds ids of at most 16 bits, the tokenizer has {len(tokenizer)} tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_starts = starts_path(partial)
    starts = [0]
    try:
        with partial.open("wb") as file:
            for document in documents:
                if as_bytes:
                    ids = document.encode("utf-8") if isinstance(document, str) else document
                else:
                    text = document if isinstance(document, str) else document.decode("utf-8")
                    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.uint16)
                if len(ids):
                    file.write(ids)
                    starts.append(starts[-1] + len(ids))
        if len(starts) == 1:
            raise ValueError("there is no text: every document is empty")
        np.save(partial_starts, np.asarray(starts[:-1], dtype=np.int64))
        partial_starts.replace(starts_path(path))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        partial_starts.unlink(missing_ok=True)
        raise
    return path


def starts_path(path: Path) -> Path:
    return path.with_name(path.name + ".starts.npy")


class PackedWindows(Dataset):
    """Windows of `block_size` ids of a corpus, for causal language modelling.

    Items are dicts of `input_ids`, `labels` (-100 at `<bos>`, which nothing can predict) and `position_ids` (counted
    from the start of each document or of the window), each of shape `(block_size,)`, int64.

    A pickled instance holds the path, not the ids: worker processes open the file again.

    Args:
        path: corpus written by [`write_corpus`], or any file, which is then one document of bytes.
        tokenizer: gives `bos_token_id` and `eos_token_id`, and with them the dtype of the file.
        block_size (`int`): ids in a window. What is left over at the end of the corpus is dropped.

    Raises:
        ValueError: if the corpus is shorter than one window, or was written with another kind of tokenizer.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, block_size: int):
        self.path, self.dtype = Path(path).absolute(), np.uint8 if ids_are_bytes(tokenizer) else np.uint16
        self.bos, self.eos, self.block_size = tokenizer.bos_token_id, tokenizer.eos_token_id, block_size
        self._open()
        if len(self) == 0:
            raise ValueError(
                f"{path} holds {self.packed_starts[-1]} ids with special tokens, fewer than one window of {block_size}"
            )

    def _open(self) -> None:
        starts = starts_path(self.path)
        starts = np.load(starts) if starts.is_file() else np.zeros(1, dtype=np.int64)
        num_ids, rest = divmod(self.path.stat().st_size, np.dtype(self.dtype).itemsize)
        if rest or starts[-1] >= num_ids:
            raise ValueError(
                f"{self.path} should hold ids of type {self.dtype.__name__} with the last document starting at id "
                f"{starts[-1]}, got {num_ids} ids and {rest} bytes: it is empty or was written with another tokenizer"
            )
        self.ids = np.memmap(self.path, dtype=self.dtype, mode="r")
        self.starts = np.append(starts, len(self.ids))
        # First id of each document in the row with `<bos>` and `<eos>`.
        self.packed_starts = self.starts + 2 * np.arange(len(self.starts))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if not isinstance(value, np.ndarray)}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return int(self.packed_starts[-1]) // self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        first, end = index * self.block_size, (index + 1) * self.block_size
        input_ids = np.empty(self.block_size, dtype=np.int64)
        position_ids = np.empty(self.block_size, dtype=np.int64)
        document = int(np.searchsorted(self.packed_starts, first, side="right")) - 1
        at = first
        while at < end:
            start, stop = int(self.packed_starts[document]), int(self.packed_starts[document + 1])
            upto = min(stop, end)
            here = slice(at - first, upto - first)
            input_ids[here] = self._document_ids(document, at - start, upto - start)
            position_ids[here] = np.arange(upto - at)
            at, document = upto, document + 1
        labels = np.where(input_ids == self.bos, -100, input_ids)
        arrays = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _document_ids(self, document: int, first: int, end: int) -> np.ndarray:
        """Ids `first` to `end` of a document with `<bos>` before and `<eos>` after it."""
        start, stop = int(self.starts[document]), int(self.starts[document + 1])
        text = self.ids[start + max(first - 1, 0) : min(start + end - 1, stop)].astype(np.int64)
        bos = [self.bos] if first == 0 else []
        eos = [self.eos] if end == stop - start + 2 else []
        return np.concatenate([np.asarray(bos, dtype=np.int64), text, np.asarray(eos, dtype=np.int64)])
