# SPDX-License-Identifier: Apache-2.0
"""Distillation (arXiv:1503.02531) from anything that gives next-byte probabilities, models of subwords included.

    teacher = SubwordTeacher(AutoModelForCausalLM.from_pretrained(...), AutoTokenizer.from_pretrained(...))
    store_teacher("teacher.bin", teacher, dataset)  # once: 50 bytes a position
    DistillationTrainer(model, args, train_dataset=dataset, teacher=StoredTeacher("teacher.bin")).train()

How probabilities of tokens become probabilities of bytes, exactly: [`SubwordTeacher`].

Shapes: B rows, T ids of a row, N bytes of a text, V tokens of a teacher.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_stlm.modeling_stlm import without_first_bytes


NUM_BYTES = 256
CHUNK_BYTES = 128  # of a text that a SubwordTeacher reads at once
STORED = np.dtype([("bytes", "u1", 16), ("log_probs", "<f2", 16), ("rest", "<f2")])
INDEX = np.dtype([("row", "<u8"), ("start", "<i8"), ("length", "<i8")])


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The bytes of every token that has some: all but the special ones.

    Raises:
        ValueError: if the vocabulary is neither byte-level BPE nor SentencePiece with byte fallback: some text it can
            only read as unknown.
    """
    added, vocabulary = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    alphabet = {character: bytes([byte]) for byte, character in bytes_to_unicode().items()}
    fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(NUM_BYTES)}
    # Vocabularies of byte-level BPE may lack bytes that were not in the training text, such as those of no UTF-8.
    common = {c for c, byte in alphabet.items() if b" " <= byte <= b"~" or b"\x80" <= byte <= b"\xbf"}
    is_byte_level = common <= vocabulary.keys()
    if not is_byte_level and (missing := fallback.keys() - vocabulary.keys()):
        raise ValueError(
            "a teacher needs a tokenizer that can spell all bytes: expected byte-level BPE, or the tokens <0x00> to <0xFF> "
            f"as in SentencePiece with byte fallback, but {len(missing)} of these are missing, such as {min(missing)}"
        )
    found = {}
    # Pieces last: of two tokens with the same bytes, a text is spelled with the last.
    for token, i in sorted(vocabulary.items(), key=lambda entry: entry[0] not in fallback):
        if i in added:
            found[i] = added[i].content.encode()
        elif not is_byte_level:
            found[i] = fallback.get(token) or token.replace("\u2581", " ").encode()
        elif alphabet.keys() >= set(token):
            found[i] = b"".join(alphabet[character] for character in token)
    return {i: text for i, text in found.items() if text and i not in special}


class SubwordTeacher:
    r"""Next-byte probabilities of a causal model of subwords.

    The teacher writes a text token after token: given the bytes `s` so far, it reads them as its tokenizer writes them,
    `E(s)`, and draws the next token from `p(token | E(s))`, special tokens left out. So the probability that a token
    ends right after `s`, and that the text starts with `s`, are

        ends(s)   = sum over s = r + v  of ends(r) p(v | E(r)),    ends("") = 1
        starts(s) = sum over s = r + w, w a proper start of v or v itself, of ends(r) p(v | E(r))

    and a byte `c` follows with probability `starts(s + c) / starts(s)`: the sum over all tokens that continue the bytes
    so far, over all places where a token may have started. These sum to one over `c`, and their product over a text is
    `starts(text)`, whatever the text.

    Where the model gives no probability to tokens that its tokenizer would not write, this is the probability of the text
    under the model (Exact byte-level probabilities from tokenized language models, arXiv:2410.09303). Elsewhere, the
    sum over all ways to cover a text (From language models over tokens to language models over characters,
    arXiv:2412.03719) has exponentially many histories; reading `E(s)` instead leaves one for each byte.

    All `E(s)` of a text differ in their last tokens. They run as one tree, 128 bytes at once, over the cached keys and
    values of the tokens that they share: about one token for each byte.

    Args:
        model (`PreTrainedModel`): causal, with eager or sdpa attention over all tokens before.
        tokenizer (`PreTrainedTokenizerBase`): byte-level BPE, or with a token for every byte. Must not change the text.
        start_id (`int`, *optional*): token before the text. Defaults to the one that begins, or else ends, a text.

    Raises:
        ValueError: if the tokenizer cannot spell all bytes, if there is no token to start with, or if the attention of
            the model is another.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start_id: int | None = None):
        starts = (start_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        attention, cache = model.config._attn_implementation, DynamicCache(config=model.config)
        if attention not in ("eager", "sdpa") or any(layer.is_sliding for layer in cache.layers):
            raise ValueError(
                f"expected a teacher with eager or sdpa attention to all tokens before, got {attention!r} attention in "
                f"{[type(layer).__name__ for layer in cache.layers]}"
            )
        self.model, self.tokenizer = model.eval(), tokenizer
        self.start_id = next((i for i in starts if i is not None), None)
        if self.start_id is None:
            raise ValueError(
                "the tokenizer has no token that begins or ends a text: give start_id, the token before it"
            )
        self.bytes_of = token_bytes(tokenizer)
        # Sorted by bytes: tokens with the same first bytes are neighbours, shorter ones first.
        ids = sorted(self.bytes_of, key=self.bytes_of.get)
        tokens = [self.bytes_of[i] for i in ids]
        self.ids = np.array(ids)
        self.is_special = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool)  # by id
        self.is_special[ids] = False
        self.lengths = np.array([len(token) for token in tokens])
        self.columns = np.zeros((self.lengths.max(), len(tokens)), dtype=np.uint8)  # byte of each token at each place
        for i, token in enumerate(tokens):
            self.columns[: len(token), i] = list(token)
        self.first_of = np.searchsorted(self.columns[0], np.arange(NUM_BYTES + 1))  # token of each first byte
        self.first_bytes = np.zeros(len(self.is_special), dtype=np.int64)  # by id
        self.first_bytes[ids] = self.columns[0]
        self.id_of = dict(zip(tokens, ids))
        self.spelled = {token[0] for token in tokens if len(token) == 1}
        # SentencePiece may put a space before the text: the text is then what follows it.
        self.before = b"".join(self.bytes_of.get(i, b"") for i in self._encode(["a"])[0]).removesuffix(b"a")

    @torch.no_grad()
    def next_byte_log_probs(self, text: bytes) -> torch.Tensor:
        """Natural logarithms of the probabilities of the 256 bytes at every byte of `text`: `(N, 256)`, float32, CPU.

        Row `i` predicts `text[i]` from `text[:i]`: row 0 from nothing, and nothing predicts what follows the text. So
        `rows[range(N), list(text)].sum()` is the logarithm of the probability of the text.

        Raises:
            ValueError: if the text is longer than the context of the model, if the tokenizer changes it, or if it has no
                token for a byte of it (such bytes have probability zero).
        """
        if missing := sorted(set(text) - self.spelled):
            raise ValueError(f"the text has bytes for which the teacher has no token: {bytes(missing)!r}")
        whole = self.before + text
        histories = self._histories(whole)
        rows = np.empty((len(whole), NUM_BYTES))
        active = []  # tokens that may be open: started, and not known to be complete
        ending = 1.0  # probability that a token ends here, given the bytes so far
        for i, probabilities in enumerate(self._token_probabilities(histories)):
            active = [token for token in active if i - token.start < len(token.next_bytes)]
            active.append(self._continuations(i, ending, probabilities, whole))
            row = sum(token.weight * token.next_bytes[i - token.start] for token in active)
            rows[i] = row / row.sum()
            seen = rows[i, whole[i]]
            active = [token._replace(weight=token.weight / seen) for token in active]
            ending = sum(token.weight * token.ends[i - token.start] for token in active)
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(rows[len(self.before) :])).float()

    def _continuations(self, start: int, weight: float, probabilities: np.ndarray, text: bytes) -> "OpenToken":
        """What may follow, and end, from `start` on, by the `probabilities` (V,) of the ids there."""
        next_bytes, ends = [np.bincount(self.first_bytes, weights=probabilities, minlength=NUM_BYTES)], []
        # Only the tokens with the right first byte are sorted: of these, what agrees with the text so far and goes on.
        group = slice(*self.first_of[text[start] : text[start] + 2])
        probabilities, columns, lengths = probabilities[self.ids[group]], self.columns[:, group], self.lengths[group]
        first, end = 0, len(lengths)
        for place in range(1, len(text) - start + 1):
            complete = first + np.searchsorted(lengths[first:end] > place, True)
            ends.append(probabilities[first:complete].sum())
            first = complete
            if first == end or start + place == len(text):
                break
            column = columns[place, first:end]
            next_bytes.append(np.bincount(column, weights=probabilities[first:end], minlength=NUM_BYTES))
            first, end = (first + np.searchsorted(column, text[start + place], side) for side in ("left", "right"))
        return OpenToken(start, weight, next_bytes, ends)

    def _token_probabilities(self, histories: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Probabilities (V,) of the ids after each history; zero for special tokens."""
        cache, num_cached = DynamicCache(config=self.model.config), 0
        shared = common_starts(histories)
        for first in range(0, len(histories), CHUNK_BYTES):
            last = min(first + CHUNK_BYTES, len(histories))
            # What all later histories start with stays in the cache, but for a token: none may be without a new one.
            num_kept = shared[last] - 1 if last < len(histories) else num_cached
            tree = TokenTree()
            tree.add(histories[-1][num_cached:num_kept])  # first, to be kept
            leaves = [tree.add(history[num_cached:]) for history in histories[first:last]]
            logits = self._run(tree, cache, num_cached, leaves)
            cache.crop(num_kept - num_cached - len(tree.ids))
            num_cached = num_kept
            logits = logits.masked_fill(self.is_special.to(logits.device), -torch.inf)
            yield from logits.softmax(-1, dtype=torch.float32).cpu().numpy()

    def _run(self, tree: "TokenTree", cache: DynamicCache, num_cached: int, leaves: list[int]) -> torch.Tensor:
        """Logits (n, V) after n nodes of a tree whose root comes after the cached tokens."""
        allowed, device = tree.ancestors(), self.model.device
        mask = torch.zeros(len(allowed), num_cached + len(allowed), dtype=self.model.dtype)
        mask[:, num_cached:].masked_fill_(~torch.from_numpy(allowed), torch.finfo(mask.dtype).min)
        with torch.autocast(device.type, enabled=False):  # that of a student in training
            outputs = self.model(
                torch.tensor([tree.ids], device=device),
                attention_mask=mask[None, None].to(device),
                position_ids=num_cached + torch.from_numpy(allowed.sum(1) - 1)[None].to(device),
                cache=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(leaves, device=device),
            )
        return outputs.logits[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _histories(self, text: bytes) -> list[np.ndarray]:
        """`E(text[:i])` for every byte `i`, with the token before the text in front.

        Bytes that are not, or not yet, part of a character are spelled by the longest tokens of the vocabulary, and so is
        all that follows bytes that are no character.
        """
        body = text[len(self.before) :]
        characters = body.decode(errors="surrogateescape")
        num_good = next((i for i, c in enumerate(characters) if "\udc80" <= c <= "\udcff"), len(characters))
        good = characters[:num_good]
        sizes = np.array([0, *(len(character.encode()) for character in good)])
        ends = len(self.before) + sizes.cumsum()  # where each character ends in the text
        encoded = [[], *self._encode([good[:n] for n in range(1, len(good) + 1)])] if good else [[]]
        ends[0] = 0  # what comes before the text is spelled, too
        histories = []
        for i in range(len(text)):
            n = int(np.searchsorted(ends, i, "right")) - 1
            if i == ends[n] and b"".join(self.bytes_of.get(token, b"") for token in encoded[n]) != text[:i]:
                written = self.tokenizer.convert_ids_to_tokens(encoded[n][-8:])
                raise ValueError(
                    f"expected a tokenizer that keeps every byte, but it ends {text[:i][-16:]!r} with the tokens {written}"
                )
            ids = [self.start_id, *encoded[n], *self._spell(text[ends[n] : i])]
            histories.append(np.array(ids, dtype=np.int64))
        context = getattr(self.model.config, "max_position_embeddings", None)
        if histories and context is not None and (longest := max(map(len, histories))) > context:
            raise ValueError(
                f"the teacher reads at most {context} tokens, the text of {len(body)} bytes has {longest}"
            )
        return histories

    def _spell(self, text: bytes) -> list[int]:
        """`text` in the longest tokens of the vocabulary, from the left."""
        ids = []
        while text:
            size = next(size for size in range(len(text), 0, -1) if text[:size] in self.id_of)
            ids.append(self.id_of[text[:size]])
            text = text[size:]
        return ids


class OpenToken(NamedTuple):
    """The tokens that may have started at a byte, by the number of bytes seen since then."""

    start: int
    weight: float  # probability that a token starts there, relative to that of the text so far
    next_bytes: list[np.ndarray]  # (256,) probability of a token that agrees so far and goes on with each byte
    ends: list[float]  # probability of the token that is complete after one byte more


class TokenTree:
    """Histories that share their first tokens: each token after each history stands once."""

    def __init__(self):
        self.ids, self.parents, self.nodes = [], [], {}

    def add(self, history: np.ndarray) -> int:
        """Node of the last token of `history`."""
        node = -1
        for token in history.tolist():
            parent, node = node, self.nodes.setdefault((node, token), len(self.ids))
            if node == len(self.ids):
                self.ids.append(token)
                self.parents.append(parent)
        return node

    def ancestors(self) -> np.ndarray:
        """Which nodes each node comes after, itself included: (nodes, nodes) bool."""
        found = np.eye(len(self.ids), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                found[node] |= found[parent]
        return found


def common_starts(histories: list[np.ndarray]) -> list[int]:
    """How many first tokens each history shares with all later ones."""
    shared = [len(history) for history in histories]
    for i in range(len(histories) - 2, -1, -1):
        one, other = histories[i], histories[i + 1]
        size = min(len(one), len(other))
        differs = np.flatnonzero(one[:size] != other[:size])
        shared[i] = min(shared[i + 1], differs[0] if len(differs) else size)
    return shared


class Row(NamedTuple):
    """The valid ids of a row of a batch."""

    at: np.ndarray  # (n,) where in the row
    ids: np.ndarray  # (n,)
    starts: np.ndarray  # (n,) bool: where a document starts

    def texts(self) -> Iterator[tuple[int, bytes]]:
        """Runs of bytes without a special token or the start of a document, each with the index of its first byte."""
        is_byte = self.ids < NUM_BYTES
        begins = is_byte & (self.starts | ~np.append(False, is_byte[:-1]))
        for first in np.flatnonzero(begins).tolist():
            later = np.flatnonzero((begins | ~is_byte)[first + 1 :])
            end = first + 1 + later[0] if len(later) else len(self.ids)
            yield first, self.ids[first:end].astype(np.uint8).tobytes()

    def digest(self) -> int:
        return int.from_bytes(blake2b(np.stack([self.ids, self.starts]).tobytes(), digest_size=8).digest(), "little")


def rows_of(inputs: dict[str, torch.Tensor]) -> list[Row]:
    """Rows of `input_ids (B, T)`, by the `attention_mask` and the `position_ids` if there are any, as `STLMBatch` does."""
    ids = inputs["input_ids"].cpu().numpy()
    mask, positions = (
        None if inputs.get(name) is None else inputs[name].expand(ids.shape).cpu().numpy()
        for name in ("attention_mask", "position_ids")
    )
    rows = []
    for b in range(len(ids)):
        at = np.arange(ids.shape[1]) if mask is None else np.flatnonzero(mask[b])
        starts = np.zeros(len(at), dtype=np.int64)
        if positions is not None:
            here = positions[b, at]
            starts[1:] = here[1:] == 0 if len(at) < ids.shape[1] else here[1:] != here[:-1] + 1
        rows.append(Row(at, ids[b, at].astype(np.int64), starts))
    return rows


@torch.no_grad()
def teacher_log_probs(teacher, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities `(B, T, 256)` of the byte after each position, `-inf` where the teacher gives no probabilities.

    Args:
        teacher: as of [`DistillationTrainer`].
        inputs (`dict`): `input_ids`, and `attention_mask` and `position_ids` if there are any.
    """
    ids = inputs["input_ids"]
    if isinstance(teacher, nn.Module):
        names = ("input_ids", "attention_mask", "position_ids")
        outputs = teacher(**{name: inputs[name] for name in names if name in inputs}, use_cache=False)
        return outputs.logits[..., :NUM_BYTES].float().log_softmax(-1)
    log_probs = torch.full((*ids.shape, NUM_BYTES), -torch.inf)
    for b, row in enumerate(rows_of(inputs)):
        if isinstance(teacher, StoredTeacher):
            log_probs[b, torch.from_numpy(row.at)] = teacher.row_log_probs(row)
            continue
        for first, text in row.texts():
            skipped = int(first == 0)  # no position comes before the first byte of a row
            found = teacher.next_byte_log_probs(text)[skipped:]
            before = row.at[first + skipped - 1 :][: len(found)]
            log_probs[b, torch.from_numpy(before)] = found
    return log_probs.to(ids.device)


def store_teacher(path: str | Path, teacher, dataset: Iterable[dict]) -> Path:
    """Write the probabilities that `teacher` gives for every row of `dataset`, for [`StoredTeacher`].

    Of each position the 16 most probable bytes, their log-probabilities and the mass of all others: 50 bytes. The file
    appears under its name only when it is complete. Until then each row stands in a file of its own in the folder
    `path` + `.rows`; after an interruption, the same call goes on with the rows that are missing there.

    Args:
        path: of the file; an index stands beside it, under the same name and `.index.npy`.
        teacher: as of [`DistillationTrainer`].
        dataset (`Iterable[dict]`): rows with `input_ids` (T,) and, as in training, `attention_mask` and `position_ids`.

    Raises:
        ValueError: if there are no rows, or if another teacher wrote those of the interrupted call.
    """
    path = Path(path)
    rows, partial = path.with_name(f"{path.name}.rows"), path.with_name(f"{path.name}.{os.getpid()}.partial")
    rows.mkdir(parents=True, exist_ok=True)
    index, start = {}, 0
    is_checked, unwritten = not any(rows.iterdir()), []
    try:
        with partial.open("wb") as file:
            for item in dataset:
                names = ("input_ids", "attention_mask", "position_ids")
                inputs = {name: torch.as_tensor(item[name])[None] for name in names if name in item}
                (row,) = rows_of(inputs)
                if (digest := row.digest()) in index:
                    continue
                row_path = rows / f"{digest:016x}"
                records = stored_row(row_path, len(row.ids))
                if records is None:
                    records = row_records(teacher, inputs, row)
                    unwritten.append((row_path, records))
                elif not is_checked:  # one row tells one teacher from another
                    check_same_teacher(records, row_records(teacher, inputs, row), rows)
                    is_checked = True
                while is_checked and unwritten:
                    write_row(*unwritten.pop())
                file.write(records.tobytes())
                index[digest] = (digest, start, len(records))
                start += len(records)
        if not index:
            rows.rmdir()
            raise ValueError(f"no rows to write to {path}: the dataset is empty")
        np.save(index_path(partial), np.array(sorted(index.values()), dtype=INDEX))
        index_path(partial).replace(index_path(path))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        index_path(partial).unlink(missing_ok=True)
        raise
    shutil.rmtree(rows, ignore_errors=True)  # another process may be removing them, too
    return path


def row_records(teacher, inputs: dict[str, torch.Tensor], row: Row) -> np.ndarray:
    """What is stored of the only row of `inputs`: (n,) `STORED`."""
    if isinstance(teacher, nn.Module):
        inputs = {name: value.to(teacher.device) for name, value in inputs.items()}
        teacher.eval()
    log_probs = teacher_log_probs(teacher, inputs)[0, torch.from_numpy(row.at)].cpu()
    top, found = log_probs.topk(STORED["bytes"].shape[0])
    records = np.empty(len(row.ids), dtype=STORED)
    records["bytes"], records["log_probs"] = found, top
    records["rest"] = 1 - top.double().exp().sum(-1).clamp(max=1)
    return records


def stored_row(path: Path, length: int) -> np.ndarray | None:
    """The records of a row that an interrupted call left, if they are there and whole."""
    try:
        records = np.frombuffer(path.read_bytes(), dtype=STORED)
    except (FileNotFoundError, ValueError):  # ValueError: the last record is cut
        return None
    return records if len(records) == length else None


def write_row(path: Path, records: np.ndarray) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(exist_ok=True)  # another process may have removed it
    partial.write_bytes(records.tobytes())
    partial.replace(path)


def check_same_teacher(old: np.ndarray, new: np.ndarray, rows: Path) -> None:
    """Whether the highest probabilities agree, but for what rounding in half precision may do."""
    old, new = (np.exp(records["log_probs"][:, 0].astype(np.float32)) for records in (old, new))
    if (difference := np.abs(old - new).mean()) > 0.01:
        raise ValueError(
            f"the rows in {rows} are of another teacher: its highest probabilities differ by {difference:.3f} on average, "
            "expected at most 0.01: delete that folder, or choose another path"
        )


def index_path(path: Path) -> Path:
    return path.with_name(path.name + ".index.npy")


class StoredTeacher:
    """Probabilities of a teacher, from a file of [`store_teacher`]. Rows are found by their ids, however they are padded.

    Raises:
        ValueError: if the file is empty or was not written by `store_teacher`; when asked about a row that is not in it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        index = np.load(index_path(self.path)) if index_path(self.path).is_file() else np.empty(0)
        size = self.path.stat().st_size
        expected = int(index["length"].sum()) * STORED.itemsize if index.dtype == INDEX else None
        if size == 0 or size != expected:
            raise ValueError(
                f"{self.path} is no file of teacher outputs: expected {STORED.itemsize} bytes for each position that "
                f"{index_path(self.path).name} lists, {expected or 'but there is no such list'}, got {size} bytes"
            )
        self.index, self.records = index, np.memmap(self.path, dtype=STORED, mode="r")

    def row_log_probs(self, row: Row) -> torch.Tensor:
        """Log-probabilities (n, 256) after each id of a row: 16 of them, `-inf` elsewhere. Those sum to one less the rest."""
        digest = np.uint64(row.digest())
        at = np.searchsorted(self.index["row"], digest)
        if at == len(self.index) or self.index["row"][at] != digest:
            start = bytes(i for i in row.ids[:40].tolist() if i < NUM_BYTES)
            raise ValueError(
                f"{self.path} has no outputs for the row that starts with {start!r}: write them for all rows"
            )
        _, first, length = self.index[at]
        records = self.records[first : first + length]
        top = torch.from_numpy(records["log_probs"].astype(np.float32))
        rest = torch.from_numpy(records["rest"].astype(np.float32))
        top = top.log_softmax(-1) + torch.log1p(-rest)[:, None]  # undo the rounding
        top = torch.where(rest[:, None] < 1, top, -torch.inf)  # the teacher gave no probabilities
        log_probs = torch.full((length, NUM_BYTES), -torch.inf)
        return log_probs.scatter(1, torch.from_numpy(records["bytes"].astype(np.int64)), top)


def divergence(log_probs: torch.Tensor, logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence (n,) in nats, of the bytes of `logits (n, V)` from a teacher's `log_probs (n, 256)`.

    Both are divided by `temperature` and renormalised over the 256 bytes. Bytes with `-inf` count as one: their mass is
    what is missing to one. A position where all are `-inf` has a divergence of zero.
    """
    student = (logits[:, :NUM_BYTES].float() / temperature).log_softmax(-1)
    is_known = log_probs > -torch.inf
    if temperature != 1:
        log_probs = (log_probs / temperature).log_softmax(-1).where(is_known, -torch.inf)  # nan where none is known
    probs = log_probs.exp()
    known = torch.where(is_known, probs * (log_probs - student), 0).sum(-1)
    rest = (1 - probs.sum(-1)).clamp(min=0)
    rest_of_student = student.exp().masked_fill(is_known, 0).sum(-1).clamp(min=torch.finfo().tiny)
    lumped = torch.xlogy(rest, rest) - rest * rest_of_student.log()
    return known + torch.where(is_known.all(-1), 0, lumped)


class DistillationTrainer(Trainer):
    """`Trainer` with a loss that also follows a teacher: `(1 - teacher_weight) loss + teacher_weight T^2 divergence`.

    The first is the loss of the model as it is. The divergence is that of the next byte, summed over the labels that are
    bytes and divided by the number of all labels: special tokens have only the first loss. Evaluation is that of
    `Trainer`, and checkpoints are those of the student.

    Args:
        teacher: what gives next-byte probabilities:
            a causal model of bytes with the vocabulary of the student, such as a larger STLM or an [`STLMCommittee`];
            a [`SubwordTeacher`], or any object with `next_byte_log_probs(text)`; a [`StoredTeacher`].
        teacher_weight (`float`, defaults to 0.5): between 0 and 1.
        temperature (`float`, defaults to 1): that divides the logits of both; 1 with stored outputs.

    Raises:
        ValueError: if one of these makes no sense.
    """

    def __init__(self, *args, teacher, teacher_weight: float = 0.5, temperature: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        if not 0 <= teacher_weight <= 1 or temperature <= 0:
            raise ValueError(
                f"expected teacher_weight between 0 and 1 and temperature above 0, got {teacher_weight} and {temperature}"
            )
        if isinstance(teacher, StoredTeacher) and temperature != 1:
            raise ValueError(f"temperature={temperature} needs all 256 probabilities, but 16 were stored: use 1")
        if isinstance(teacher, nn.Module):
            size, expected = teacher.config.vocab_size, self.model.config.vocab_size
            if size != expected or not teacher.can_generate():
                raise ValueError(
                    f"expected a causal teacher with the vocabulary of the student, {expected} ids, got a "
                    f"{type(teacher).__name__} with {size}: wrap a model of subwords in SubwordTeacher(model, tokenizer)"
                )
            teacher = teacher.to(self.args.device).eval()
        elif not isinstance(teacher, StoredTeacher) and not callable(getattr(teacher, "next_byte_log_probs", None)):
            raise ValueError(f"expected a teacher that gives next-byte probabilities, got a {type(teacher).__name__}")
        self.teacher, self.teacher_weight, self.temperature = teacher, teacher_weight, temperature

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("labels")  # a label smoother takes them away
        options = {"return_outputs": True, "num_items_in_batch": num_items_in_batch}
        loss, outputs = super().compute_loss(model, inputs, **options)
        if model.training and self.teacher_weight:
            labels = without_first_bytes(labels, inputs.get("attention_mask"))[:, 1:]
            counted = (labels >= 0) & (labels < NUM_BYTES)
            log_probs = teacher_log_probs(self.teacher, inputs)[:, :-1][counted]
            # Prompt tuning has virtual tokens before the labels.
            logits = outputs.logits[:, -labels.shape[1] - 1 : -1][counted]
            divergences = divergence(log_probs, logits, self.temperature)
            if num_items_in_batch is None:
                follows = divergences.sum() / (labels != -100).sum().clamp(min=1)
            else:
                scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                follows = divergences.sum() / num_items_in_batch * scale
            loss = (1 - self.teacher_weight) * loss + self.teacher_weight * self.temperature**2 * follows
        return (loss, outputs) if return_outputs else loss


__all__ = ["DistillationTrainer", "StoredTeacher", "SubwordTeacher", "store_teacher"]
