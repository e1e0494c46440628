# SPDX-License-Identifier: Apache-2.0
"""The engine: a trained STLM in one file of C, from Python.

    python -m modeling_stlm.inference.export examples/checkpoints/stlm-3m stlm-3m.gguf --type q8

    engine = Engine("stlm-3m.gguf")
    engine.generate("The history of", max_new_tokens=100)            # bytes
    model.generate(**inputs, custom_generate=engine)                 # ids, with the options of `generate`

`stlm.c` does the work; nothing here runs per layer. Rows of a batch are independent to the last bit: a text has the same
logits alone, in a batch, in one piece or byte by byte.

Shapes: B rows, T bytes, V vocabulary.
"""

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode

from modeling_stlm.inference.export import check, fingerprint


FOLDER = Path(__file__).parent  # of the compiled library
ERROR_SIZE = 256
MAX_SNAPSHOTS = 256
Text = bytes | str


class _About(ctypes.Structure):
    _fields_ = [
        ("isa", ctypes.c_char_p),
        ("source", ctypes.c_char_p),
        ("vocab_size", ctypes.c_int32),
        ("bos_id", ctypes.c_int32),
        ("num_ends", ctypes.c_int32),
        ("ends", ctypes.POINTER(ctypes.c_int32)),
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
        ImportError: if it was not built.
    """
    files = sorted(path for suffix in ("so", "pyd", "dylib") for path in FOLDER.glob(f"_stlm*.{suffix}"))
    if not files:
        raise ImportError(
            f"the engine is not built: {FOLDER} has no _stlm library. It is compiled when the package is installed on a "
            "machine with a C compiler (gcc, clang): install one and install the package again with `--force-reinstall --no-deps "
            "--no-cache-dir`, or run `python setup.py build_ext --inplace` in a checkout"
        )
    library = ctypes.CDLL(str(files[0]))
    pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for name, result, *arguments in (
        ("stlm_load", pointer, text, ctypes.c_size_t, text, text),
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
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Snapshot:
    """The state of a row after some byte, for [`Rows.rewind`]."""

    def __init__(self, rows: "Rows", row: int):
        library = rows.engine._library
        self.handle = library.stlm_take(rows._handle, row)
        if not self.handle:
            raise MemoryError("not enough memory for a snapshot")
        self.rows = rows  # keeps the model alive
        weakref.finalize(self, library.stlm_drop, self.handle)


class Rows:
    """B rows of text, empty at first, and the states of the model after them. Not for several threads at once."""

    def __init__(self, engine: "Engine", num_rows: int):
        if num_rows < 1:
            raise ValueError(f"num_rows={num_rows} must be at least 1")
        self.engine, self.num_rows, library = engine, num_rows, engine._library
        self._handle = library.stlm_open(engine._handle, num_rows)
        if not self._handle:
            raise MemoryError(f"not enough memory for {num_rows} rows")
        weakref.finalize(self, library.stlm_close, self._handle)

    def _check(self, status: int) -> None:
        if status:
            raise ValueError(self.engine._library.stlm_error(self._handle).decode(errors="replace"))

    def _joined(self, texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        if len(texts) != self.num_rows:
            raise ValueError(f"{len(texts)} texts for {self.num_rows} rows")
        counts = np.array([len(text) for text in texts], np.int32)
        return counts, np.concatenate([_int32(text) for text in texts])

    def length(self, row: int) -> int:
        """Bytes and special tokens that `row` has read."""
        return self.engine._library.stlm_length(self._handle, self._row(row))

    def patch_ends(self, row: int) -> list[int]:
        """Bytes and special tokens up to the end of every patch of `row` that is complete."""
        count = ctypes.c_int()
        ends = self.engine._library.stlm_patches(self._handle, self._row(row), ctypes.byref(count))
        return ends[: count.value]

    def _row(self, row: int) -> int:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        return row

    def read(self, texts: Sequence[Sequence[int]]) -> None:
        """Every row reads its text, bytes or ids of any length, also none."""
        counts, ids = self._joined(texts)
        self._check(self.engine._library.stlm_read(self._handle, counts.ctypes.data, ids.ctypes.data))

    def score(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """As [`Rows.read`]; the natural logarithm of the probability that each id had, float32."""
        counts, ids = self._joined(texts)
        scores = np.empty(len(ids), np.float32)
        status = self.engine._library.stlm_score(self._handle, counts.ctypes.data, ids.ctypes.data, scores.ctypes.data)
        self._check(status)
        return np.split(scores, np.cumsum(counts)[:-1])

    def logits(self) -> np.ndarray:
        """Logits of the next id of every row: (B, V) float32."""
        logits = np.empty((self.num_rows, self.engine.vocab_size), np.float32)
        self._check(self.engine._library.stlm_logits(self._handle, logits.ctypes.data))
        return logits

    def write(self, sampling: _Sampling, seeds: np.ndarray, active: np.ndarray, count: int) -> np.ndarray:
        """Up to `count` more ids of the rows that are `active` (B,) uint8: (B, count) int32, -1 past the end of a row."""
        ids = np.empty((self.num_rows, count), np.int32)
        pointers = seeds.ctypes.data, active.ctypes.data
        self._check(self.engine._library.stlm_write(self._handle, sampling, *pointers, count, ids.ctypes.data))
        return ids

    def take(self, row: int = 0) -> Snapshot:
        return Snapshot(self, self._row(row))

    def rewind(self, snapshot: Snapshot, row: int = 0) -> None:
        """Back to an earlier state of `row`, which must still begin with the text that it had then.

        Raises:
            ValueError: if it does not.
        """
        self._check(self.engine._library.stlm_rewind(self._handle, self._row(row), snapshot.handle))


class Engine:
    """A model in one file, ready to write and to score text on the CPU.

    Args:
        path (`str` or `Path`): file that [`export_gguf`] wrote.
        isa (`str`, *optional*): `"scalar"`, `"simd128"` (SSE2 or NEON), `"avx2"` or `"avx512"`; the best of this CPU, or
            `STLM_ISA` of the environment, if left out. The results are the same.

    Raises:
        ValueError: in words, for a damaged, foreign or newer file.
        ImportError: if the engine was not built.
    """

    def __init__(self, path: str | Path, isa: str | None = None):
        self.path, self._library = Path(path), load_library()
        data, error = self.path.read_bytes(), ctypes.create_string_buffer(ERROR_SIZE)
        isa = os.environ.get("STLM_ISA", "") if isa is None else isa
        self._handle = self._library.stlm_load(data, len(data), isa.encode(), error)
        if not self._handle:
            raise ValueError(f"{path}: {error.value.decode(errors='replace')}")
        weakref.finalize(self, self._library.stlm_free, self._handle)
        about = self._library.stlm_describe(self._handle).contents
        self.isa, self.vocab_size, self.bos_token_id = about.isa.decode(), about.vocab_size, about.bos_id
        self.eos_token_ids = about.ends[: about.num_ends]
        self._ends = (ctypes.c_int32 * about.num_ends)(*self.eos_token_ids)
        self._source = about.source.decode()
        self._known = weakref.WeakKeyDictionary()  # models that were compared, with the versions of their weights
        self._typing = threading.Lock()
        self._typed: tuple[Rows, list[tuple[bytes, Snapshot]]] | None = None  # of `complete`

    # Text

    def _ids(self, text: Text) -> list[int]:
        """The bytes of `text`; the token that begins documents if there are none."""
        return list(_bytes(text)) or [self.bos_token_id]

    def _start(
        self,
        prompts: Sequence[Text],
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> tuple[Rows, _Sampling, np.ndarray, np.ndarray]:
        """Rows that have read the prompts, and what [`Rows.write`] takes."""
        for name, value, is_allowed in (
            ("temperature", temperature, temperature > 0),  # for the likeliest bytes: do_sample=False
            ("top_k", top_k, top_k >= 0),
            ("top_p", top_p, 0 < top_p <= 1),
            ("min_p", min_p, 0 <= min_p <= 1),
            ("repetition_penalty", repetition_penalty, repetition_penalty > 0),
        ):
            if not is_allowed:
                raise ValueError(f"{name}={value} is out of its range")
        temperature = temperature if do_sample else 0.0
        sampling = _Sampling(temperature, top_p, min_p, repetition_penalty, top_k, len(self._ends), self._ends)
        rows = Rows(self, len(prompts))
        rows.read([self._ids(prompt) for prompt in prompts])
        seeds = (np.arange(len(prompts)) + seed).astype(np.uint64)
        return rows, sampling, seeds, np.ones(len(prompts), np.uint8)

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
        options = do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed
        rows, sampling, seeds, active = self._start(prompts, *options)
        pieces = []
        while max_new_tokens > 0 and active.any():  # in pieces, between which Python can be interrupted
            count = min(max_new_tokens, 64)
            pieces.append(rows.write(sampling, seeds, active, count))
            max_new_tokens -= count
        written = [_written(ids) for ids in np.concatenate([np.empty((len(prompts), 0), np.int32), *pieces], axis=1)]
        return written[0] if is_one else written

    def stream(self, prompt: Text, max_new_tokens: int = 256, **options) -> Iterator[bytes]:
        """As [`Engine.generate`] of one prompt, with its `options`, byte by byte."""
        rows, sampling, seeds, active = self._start([prompt], **options)
        for _ in range(max_new_tokens):
            if byte := _written(rows.write(sampling, seeds, active, 1)[0]):  # no special token
                yield byte
            if not active[0]:
                return

    def score(self, text: Text, context: Text = b"") -> np.ndarray:
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
                self._typed = rows, [(b"", rows.take())]
            rows, snapshots = self._typed
            while not text.startswith(snapshots[-1][0]):
                snapshots.pop()
            known, snapshot = snapshots[-1]
            rows.rewind(snapshot)
            if text != known or not text:
                rows.read([text[len(known) :] or [self.bos_token_id]])
            if text != known:
                snapshots.append((text, rows.take()))
                del snapshots[1 : max(1, len(snapshots) - MAX_SNAPSHOTS)]
            sampling = _Sampling(0.0, 1.0, 0.0, 1.0, 0, len(self._ends), self._ends)
            return _written(rows.write(sampling, np.zeros(1, np.uint64), np.ones(1, np.uint8), max_new_tokens)[0])

    # generate(custom_generate=engine)

    def _check(self, model: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict) -> None:
        """Raise a `ValueError` unless the file is that of `model` and its options are known here."""
        check(model)
        # What writes through `tensor.data` is not noticed after the first call.
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in model.parameters()]
        if self._known.get(model) != versions:
            if fingerprint(model) != self._source:
                raise ValueError(f"{self.path} was exported from a model with other weights: export this one")
            self._known[model] = versions
        cache = model_kwargs.get("cache")
        mode = generation_config.get_generation_mode()
        refused = {
            f"generation mode {mode.value}": mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
            "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
            "a filled cache": cache is not None and int(cache.get_seq_length()) > 0,
            "dropout (call eval())": model.training
            and (model.config.hidden_dropout or model.config.attention_dropout),
            "output_attentions": generation_config.output_attentions,
            "output_hidden_states": generation_config.output_hidden_states,
        }
        if names := [name for name, is_asked in refused.items() if is_asked]:
            raise ValueError(f"the engine does not know {', '.join(names)}: leave out custom_generate")

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **model_kwargs,
    ) -> torch.LongTensor | GenerateDecoderOnlyOutput:
        """The sampling loop of `generate`, with the engine in place of the model, which computes as one in float32.

        `tokenizer` is for stop strings, of which `generate` makes stopping criteria.

        Raises:
            ValueError: for a model with other weights than the file, and for what the engine cannot do, by name.
        """
        self._check(model, generation_config, model_kwargs)
        device, mask = input_ids.device, model_kwargs.get("attention_mask")
        given = input_ids.cpu().numpy()
        valid = np.ones(given.shape, bool) if mask is None else mask.cpu().numpy() != 0
        positions = model_kwargs.get("position_ids")
        if positions is not None and positions.shape[-1] == given.shape[1]:
            steps = np.diff(np.broadcast_to(positions.cpu().numpy(), given.shape))
            if (steps[valid[:, 1:] & valid[:, :-1]] != 1).any():
                raise ValueError("position_ids restart, but a row of the engine is one document")
        rows = Rows(self, len(given))
        rows.read([ids[is_valid] for ids, is_valid in zip(given, valid)])
        pad, kept = generation_config._pad_token_tensor, generation_config.return_dict_in_generate
        keeps_scores, keeps_logits = kept and generation_config.output_scores, kept and generation_config.output_logits
        all_scores, all_logits = () if keeps_scores else None, () if keeps_logits else None
        has_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        unfinished = torch.ones(len(given), dtype=torch.long, device=device)
        while True:
            logits = torch.from_numpy(rows.logits()).to(device)
            scores = logits.clone() if keeps_logits else logits
            for processor in logits_processor:  # the list itself would look at the signature of each
                scores = processor(input_ids, scores)
            if keeps_scores:
                all_scores += (scores,)
            if keeps_logits:
                all_logits += (logits,)
            if generation_config.do_sample:
                ids = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                ids = scores.argmax(-1)
            if has_end:
                ids = ids * unfinished + pad * (1 - unfinished)
            input_ids = torch.cat([input_ids, ids[:, None]], dim=1)
            if streamer is not None:
                streamer.put(ids.cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, all_scores)
            if not unfinished.any():
                break
            rows.read(ids[:, None].cpu().numpy())
        if streamer is not None:
            streamer.end()
        if kept:
            return GenerateDecoderOnlyOutput(sequences=input_ids, scores=all_scores, logits=all_logits)
        return input_ids


def _bytes(text: Text) -> bytes:
    return text.encode() if isinstance(text, str) else bytes(memoryview(text))  # which refuses a number


def _int32(text: Sequence[int]) -> np.ndarray:
    return np.frombuffer(text, np.uint8).astype(np.int32) if isinstance(text, bytes) else np.asarray(text, np.int32)


def _written(ids: np.ndarray) -> bytes:
    """The bytes among `ids` (T,)."""
    return bytes(ids[(ids >= 0) & (ids < 256)].astype(np.uint8))
