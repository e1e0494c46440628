# SPDX-License-Identifier: Apache-2.0
"""The engine: a trained STLM in C without dependencies, from Python.

    python -m modeling_stlm.inference.export examples/checkpoints/stlm-3m stlm-3m.gguf --type q8

    engine = Engine("stlm-3m.gguf")
    engine.generate("The history of", max_new_tokens=100)            # bytes
    model.generate(**inputs, custom_generate=engine)                 # ids, with the options of `generate`

`stlm.c` does the work; nothing here runs per layer. Rows of a batch are independent to the last bit: a text has the same
logits alone, in a batch, in one piece or byte by byte.

Imports no torch, and numpy only where arrays are returned: the command `stlm` is there in tens of milliseconds.

Shapes: B rows, T bytes, V vocabulary.
"""

import ctypes
import mmap
import os
import threading
import weakref
from array import array
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index


TYPE_CHECKING = False  # what type checkers take for true; the import of typing takes some milliseconds
if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation import BaseStreamer


FOLDER = os.path.dirname(__file__)  # of the compiled library
VERSION = 3  # STLM_VERSION of stlm.h
ERROR_SIZE = 256
PIECE = 64  # bytes that C writes before Python can be interrupted
MAX_SNAPSHOT_BYTES = 1 << 21  # of `complete`
MAX_INT32 = 2**31 - 1
Text = bytes | str


class _About(ctypes.Structure):
    _fields_ = [
        ("isa", ctypes.c_char_p),
        ("source", ctypes.c_char_p),
        ("vocab_size", ctypes.c_int32),
        ("bos_id", ctypes.c_int32),
        ("num_ends", ctypes.c_int32),
        ("ends", ctypes.POINTER(ctypes.c_int32)),
        ("snapshot_size", ctypes.c_size_t),
    ]


class _Sampling(ctypes.Structure):
    _fields_ = [
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("repetition_penalty", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("num_ends", ctypes.c_int32),
        ("ends", ctypes.POINTER(ctypes.c_int32)),
    ]


def load_library() -> ctypes.CDLL:
    """The compiled `stlm.c` in `FOLDER`.

    Raises:
        ImportError: if it was not built, or from other sources than these.
    """
    suffixes = (".so", ".pyd", ".dylib")
    names = sorted(name for name in os.listdir(FOLDER) if name.startswith("_stlm") and name.endswith(suffixes))
    if not names:
        raise ImportError(
            f"the engine is not built: {FOLDER} has no _stlm library. It is compiled when the package is installed on a "
            "machine with a C compiler (gcc, clang): install one and install the package again with `--force-reinstall --no-deps "
            "--no-cache-dir`, or run `python setup.py build_ext --inplace` in a checkout"
        )
    file = os.path.join(FOLDER, names[0])
    library = ctypes.CDLL(file)
    found = library.stlm_version() if hasattr(library, "stlm_version") else 1
    if found != VERSION:
        raise ImportError(
            f"{file} has version {found} of the interface, expected {VERSION}: it was compiled from other sources. "
            "Install the package again, or run `python setup.py build_ext --inplace --force` in a checkout"
        )
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, *arguments in (
        ("stlm_load", pointer, pointer, ctypes.c_size_t, text, text),
        ("stlm_free", None, pointer),
        ("stlm_describe", ctypes.POINTER(_About), pointer),
        ("stlm_open", pointer, pointer, number),
        ("stlm_close", None, pointer),
        ("stlm_length", number, pointer, number),
        ("stlm_patches", ctypes.POINTER(ctypes.c_int32), pointer, number, ctypes.POINTER(number)),
        ("stlm_error", text, pointer),
        ("stlm_read", number, pointer, pointer, pointer),
        ("stlm_score", number, pointer, pointer, pointer, pointer),
        ("stlm_logits", number, pointer, pointer),
        ("stlm_write", number, pointer, ctypes.POINTER(_Sampling), pointer, pointer, number, pointer),
        ("stlm_take", pointer, pointer, number),
        ("stlm_rewind", number, pointer, number, pointer),
        ("stlm_drop", None, pointer),
        ("stlm_encoder", pointer, pointer),
        ("stlm_decoder", pointer, pointer, pointer, ctypes.c_size_t),
        ("stlm_coder_close", None, pointer),
        ("stlm_encode", number, pointer, pointer, text, number, pointer),
        ("stlm_decode", number, pointer, pointer, pointer),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def mapped(file: "BinaryIO") -> ctypes.Array:
    """The bytes of a file, without a copy."""
    size = os.fstat(file.fileno()).st_size
    return (ctypes.c_char * size).from_buffer(
        mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else bytearray()
    )


class Snapshot:
    """The state of a row after some byte, for [`Rows.rewind`]."""

    def __init__(self, rows: "Rows", row: int):
        library, (part, index_in_part) = rows.engine._library, rows._place(row)
        self.length = rows.length(row)
        self.handle = library.stlm_take(part.handle, index_in_part)
        if not self.handle:
            raise MemoryError("not enough memory for a snapshot")
        self.rows = rows  # keeps the model alive
        _free_with(self, library.stlm_drop, self.handle)


# Rows `first` to `end`, which is not included: a batch of their own in C.
_Part = namedtuple("_Part", "handle first end")


class Rows:
    """B rows of text, empty at first, and the states of the model after them. Not for several threads at once.

    With `engine.num_threads` they are so many parts, each a batch of its own that C computes on a thread. Threads wait for
    each other at the end of a call only, so the more bytes it reads or writes the better.
    """

    def __init__(self, engine: "Engine", num_rows: int):
        num_rows = index(num_rows)
        if not 1 <= num_rows <= MAX_INT32:
            raise ValueError(f"num_rows={num_rows} must be at least 1 and at most {MAX_INT32}")
        self.engine, self.num_rows, library = engine, num_rows, engine._library
        self._parts: list[_Part] = []
        count = min(engine.num_threads, num_rows)
        for i in range(count):
            first, end = num_rows * i // count, num_rows * (i + 1) // count
            handle = library.stlm_open(engine._handle, end - first)
            if not handle:
                raise MemoryError(f"not enough memory for {num_rows} rows")
            _free_with(self, library.stlm_close, handle)
            self._parts.append(_Part(handle, first, end))

    def _call(self, call: Callable[[_Part], int], part: _Part) -> None:
        if call(part):
            raise ValueError(self.engine._library.stlm_error(part.handle).decode(errors="replace"))

    def _run(self, call: Callable[[_Part], int]) -> None:
        """`call` every part, each on a thread: C runs without the lock of Python.

        Returns or raises when all threads are done, also when somebody interrupts. What they use lives as long: a thread
        holds `self` and what `call` refers to, of which addresses alone keep nothing.
        """
        if len(self._parts) == 1:
            self._call(call, self._parts[0])
            return
        futures = []
        try:
            for part in self._parts:
                futures.append(self.engine._pool.submit(self._call, call, part))
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.exception()  # waits

    def _place(self, row: int) -> tuple[_Part, int]:
        """The part of `row`, and its index there."""
        if not 0 <= (row := index(row)) < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        part = next(part for part in self._parts if row < part.end)
        return part, row - part.first

    def _joined(self, texts: Sequence[Sequence[int]]) -> tuple[array, array, list[int]]:
        """Length of every text, all ids after each other, and where those of every row begin."""
        if len(texts) != self.num_rows:
            raise ValueError(f"{len(texts)} texts for {self.num_rows} rows")
        counts, ids, starts = array("i"), array("i"), []
        for row, text in enumerate(texts):
            starts.append(len(ids))
            try:
                ids.extend(iter(text))
            except (OverflowError, TypeError) as error:
                raise ValueError(f"row {row}: expected bytes or ids below 2**31, {error}") from None
            counts.append(len(ids) - starts[row])
        if ids and not 0 <= min(ids) <= max(ids) < self.engine.vocab_size:
            at = next(at for at, i in enumerate(ids) if not 0 <= i < self.engine.vocab_size)
            row = max(row for row, start in enumerate(starts) if start <= at)
            expected = f"expected 0 to {self.engine.vocab_size - 1}"
            raise ValueError(f"id {at - starts[row]} of row {row} is {ids[at]}, {expected}")
        return counts, ids, starts

    def _refuse_empty(self, rows: Iterable[int]) -> None:
        for row in rows:
            if not self.length(row):
                raise ValueError(f"row {row} is empty: there is nothing to predict its first id from")

    def length(self, row: int) -> int:
        """Bytes and special tokens that `row` has read."""
        part, index_in_part = self._place(row)
        return self.engine._library.stlm_length(part.handle, index_in_part)

    def patch_ends(self, row: int) -> list[int]:
        """Bytes and special tokens up to the end of every patch of `row` that is complete."""
        count, (part, index_in_part) = ctypes.c_int(), self._place(row)
        ends = self.engine._library.stlm_patches(part.handle, index_in_part, ctypes.byref(count))
        return ends[: count.value]

    def read(self, texts: Sequence[Sequence[int]]) -> None:
        """Every row reads its text, bytes or ids of any length, also none."""
        counts, ids, starts = self._joined(texts)
        read = self.engine._library.stlm_read
        self._run(lambda part: read(part.handle, _address(counts, part.first), _address(ids, starts[part.first])))

    def score(self, texts: Sequence[Sequence[int]]) -> list["np.ndarray"]:
        """As [`Rows.read`]; the natural logarithm of the probability that each id had, float32."""
        import numpy as np

        counts, ids, starts = self._joined(texts)
        self._refuse_empty(row for row, count in enumerate(counts) if count)
        scores, score = np.empty(len(ids), np.float32), self.engine._library.stlm_score

        def call(part: _Part) -> int:
            at = starts[part.first]
            pointers = _address(counts, part.first), _address(ids, at), scores.ctypes.data + scores.itemsize * at
            return score(part.handle, *pointers)

        self._run(call)
        return np.split(scores, starts[1:])

    def logits(self) -> "np.ndarray":
        """Logits of the next id of every row: (B, V) float32."""
        import numpy as np

        self._refuse_empty(range(self.num_rows))
        logits = np.empty((self.num_rows, self.engine.vocab_size), np.float32)
        step, call = logits.strides[0], self.engine._library.stlm_logits
        self._run(lambda part: call(part.handle, logits.ctypes.data + step * part.first))
        return logits

    def write(
        self, samplings: Sequence[_Sampling], seeds: Sequence[int], active: bytearray, count: int
    ) -> list[list[int]]:
        """Up to `count` more ids of the rows r with `active[r]`, those of each row.

        A row whose text ended is no longer active. `seeds` are from 0 to 2**64 - 1.

        Raises:
            ValueError: if a sequence is not as long as there are rows, or if an active row has read nothing.
        """
        size = self.num_rows
        if not len(samplings) == len(seeds) == len(active) == size:
            raise ValueError(
                f"got {len(samplings)} samplings, {len(seeds)} seeds and {len(active)} flags, expected {size}: one for each row"
            )
        self._refuse_empty(row for row, is_active in enumerate(active) if is_active)
        ids = array("i", bytes(4 * size * count))
        options, numbers = (_Sampling * size)(*samplings), array("Q", seeds)
        flags = (ctypes.c_uint8 * size).from_buffer(active)

        def call(part: _Part) -> int:
            first = part.first
            pointers = ctypes.byref(options[first]), _address(numbers, first), ctypes.addressof(flags) + first
            write = self.engine._library.stlm_write
            return write(part.handle, *pointers, count, _address(ids, first * count))

        self._run(call)
        return [[i for i in ids[row * count : (row + 1) * count] if i >= 0] for row in range(size)]

    def take(self, row: int = 0) -> Snapshot:
        return Snapshot(self, row)

    def rewind(self, snapshot: Snapshot, row: int = 0) -> None:
        """Back to an earlier state of `row`, which must still begin with the text that it had then.

        Raises:
            ValueError: if it does not.
        """
        part, index_in_part = self._place(row)
        if self.engine._library.stlm_rewind(part.handle, index_in_part, snapshot.handle):
            raise ValueError(f"row {row} does not begin with the {snapshot.length} bytes of the snapshot")


class Engine:
    """A model in one file, ready to write and to score text on the CPU.

    Args:
        path (`str` or `Path`): file that [`export_gguf`] wrote.
        isa (`str`, *optional*): `"scalar"`, `"simd128"` (SSE2 or NEON), `"avx2"` or `"avx512"`; the best of this CPU, or
            `STLM_ISA` of the environment, if left out. The results are the same.
        num_threads (`int`, defaults to 1): rows of a batch are shared out among so many threads. The results are the same.

    Raises:
        ValueError: in words, for a damaged, foreign or newer file.
        ImportError: if the engine was not built.
    """

    def __init__(self, path: "str | Path", isa: str | None = None, num_threads: int = 1):
        if index(num_threads) < 1:
            raise ValueError(f"num_threads={num_threads} must be at least 1")
        self.path, self._library = path, load_library()
        self._file = open(path, "rb")
        weakref.finalize(self, self._file.close)
        self._stamp = _stamp(self._file)
        data, error = mapped(self._file), ctypes.create_string_buffer(ERROR_SIZE)
        isa = os.environ.get("STLM_ISA", "") if isa is None else isa
        self._handle = self._library.stlm_load(data, len(data), isa.encode(), error)
        if not self._handle:
            raise ValueError(f"{path}: {error.value.decode(errors='replace')}")
        _free_with(self, self._library.stlm_free, self._handle)
        self.num_threads = index(num_threads)
        if num_threads > 1:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(num_threads, "stlm")
        about = self._library.stlm_describe(self._handle).contents
        self.isa, self.vocab_size, self.bos_token_id = about.isa.decode(), about.vocab_size, about.bos_id
        self.eos_token_ids = about.ends[: about.num_ends]
        self._ends = (ctypes.c_int32 * about.num_ends)(*self.eos_token_ids)
        self._sources = about.source.decode().split()  # digests of the exported model, as it was and as it is stored
        self.snapshot_size = about.snapshot_size  # bytes
        self._known = weakref.WeakKeyDictionary()  # models that were compared, with the versions of their weights
        self._typing = threading.Lock()
        self._typed: tuple[Rows, bytes, list[Snapshot]] | None = None  # of `complete`: a row, its text, states in it

    def digest(self) -> bytes:
        """SHA-256 of the file that was loaded, also if another has its name since.

        Raises:
            ValueError: if it was overwritten since.
        """
        import hashlib

        if _stamp(self._file) != self._stamp:
            raise ValueError(f"{self.path} was overwritten after it was loaded: load it again")
        return hashlib.sha256(mapped(self._file)).digest()

    # Text

    def _ids(self, text: Text) -> list[int]:
        """The bytes of `text`; the token that begins documents if there are none."""
        return list(_bytes(text)) or [self.bos_token_id]

    def sampling(
        self,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> _Sampling:
        """What [`Rows.write`] takes for a row.

        Raises:
            ValueError: for an option that is out of its range.
        """
        for name, value, is_allowed, expected in (
            ("temperature", temperature, temperature > 0, "above 0 to sample"),  # the likeliest bytes: do_sample=False
            ("top_k", top_k, index(top_k) >= 0, "at least 0"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("min_p", min_p, 0 <= min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
        ):
            if not is_allowed:
                raise ValueError(f"{name}={value} is out of its range: expected a number {expected}")
        temperature, top_k = temperature if do_sample else 0.0, min(index(top_k), self.vocab_size)
        return _Sampling(temperature, top_p, min_p, repetition_penalty, top_k, len(self._ends), self._ends)

    def _start(
        self, prompts: Sequence[Text], sampling: _Sampling, seed: int
    ) -> tuple[Rows, list[_Sampling], list[int]]:
        """Rows that have read the prompts, and what [`Rows.write`] takes."""
        rows = Rows(self, len(prompts))
        rows.read([self._ids(prompt) for prompt in prompts])
        return rows, [sampling] * len(prompts), [(index(seed) + row) % 2**64 for row in range(len(prompts))]

    def generate(
        self,
        prompt: Text | Sequence[Text],
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> bytes | list[bytes]:
        """The bytes that follow `prompt`, without it; a list for a list of prompts, which are written together.

        Options as in `generate` of the library, off by default. Row r draws with `seed + r`: it is what it would be
        alone. Special tokens are left out of the bytes, and those that end a text end it.
        """
        is_one = isinstance(prompt, (bytes, bytearray, str))
        prompts = [prompt] if is_one else prompt
        sampling = self.sampling(do_sample, temperature, top_k, top_p, min_p, repetition_penalty)
        written = self._write(*self._start(prompts, sampling, seed), max_new_tokens)
        return written[0] if is_one else written

    def _write(self, rows: Rows, samplings: list[_Sampling], seeds: list[int], max_new_tokens: int) -> list[bytes]:
        active, left, written = bytearray(b"\1" * rows.num_rows), index(max_new_tokens), [b""] * rows.num_rows
        while left > 0 and any(active):
            pieces = rows.write(samplings, seeds, active, min(left, PIECE))
            written = [text + _written(piece) for text, piece in zip(written, pieces)]
            left -= PIECE
        return written

    def stream(self, prompt: Text, max_new_tokens: int = 256, seed: int = 0, **options) -> Iterator[bytes]:
        """As [`Engine.generate`] of one prompt, with its `options`, byte by byte."""
        rows, samplings, seeds = self._start([prompt], self.sampling(**options), seed)
        active = bytearray(b"\1")
        for _ in range(index(max_new_tokens)):
            if byte := _written(rows.write(samplings, seeds, active, 1)[0]):  # no special token
                yield byte
            if not active[0]:
                return

    def score(self, text: Text, context: Text = b"") -> "np.ndarray":
        """Natural logarithm of the probability of every byte of `text` after `context`: (T,) float32.

        Without a context, after the token that begins documents.
        """
        rows = Rows(self, 1)
        rows.read([self._ids(context)])
        return rows.score([_bytes(text)])[0]

    def complete(self, text: Text, max_new_tokens: int = 32) -> bytes:
        """The likeliest bytes after `text`, for completion while somebody types.

        Only what differs from the last calls is read: one more byte or one less costs no more than that byte.
        """
        text = _bytes(text)
        with self._typing:  # the row is one for all calls
            if self._typed is None:
                rows = Rows(self, 1)
                self._typed = rows, b"", [rows.take()]
            rows, last, snapshots = self._typed
            while text[: snapshots[-1].length] != last[: snapshots[-1].length]:
                snapshots.pop()
            rows.rewind(snapshots[-1])
            known = snapshots[-1].length
            if text[known:] or not text:
                rows.read([text[known:] or [self.bos_token_id]])
            if text[known:]:
                snapshots.append(rows.take())
                most = max(1, MAX_SNAPSHOT_BYTES // self.snapshot_size)
                del snapshots[1 : max(1, len(snapshots) - most)]
            self._typed = rows, text, snapshots
            return self._write(rows, [self.sampling()], [0], max_new_tokens)[0]

    def __call__(
        self,
        model: "PreTrainedModel",
        input_ids: "torch.LongTensor",
        streamer: "BaseStreamer | None" = None,  # named, for `generate` passes on only what is in the signature
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        **options,
    ):
        """What `generate(custom_generate=engine)` calls: see [`write_with`]."""
        from modeling_stlm.inference.custom_generate import write_with  # imports torch, and the package

        return write_with(self, model, input_ids, streamer=streamer, tokenizer=tokenizer, **options)


def _bytes(text: Text) -> bytes:
    return text.encode() if isinstance(text, str) else bytes(memoryview(text))  # which refuses a number


def _free_with(owner: object, free, handle: int) -> None:
    """Free `handle` with `owner`; not at the end of the process, when a thread may still be computing with it."""
    weakref.finalize(owner, free, handle).atexit = False


def _stamp(file: "BinaryIO") -> tuple[int, int]:
    """Size, and time of the last change."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _address(numbers: array, at: int = 0) -> int:
    return numbers.buffer_info()[0] + numbers.itemsize * at


def _written(ids: Sequence[int]) -> bytes:
    """The bytes among `ids`."""
    return bytes(i for i in ids if i < 256)
