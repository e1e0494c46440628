# SPDX-License-Identifier: Apache-2.0
"""What is added to the embedding of a byte: the n-grams that end at it, and what followed them the last times.

Shapes: B rows, T bytes of this call, C ids of context before it, S bytes of a row so far, D byte width.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.import_utils import is_torchdynamo_compiling, is_torchdynamo_exporting

from .batching_stlm import STLMBatch
from .cache_stlm import STLMPatchStateSlot
from .configuration_stlm import STLMConfig
from .patching_stlm import LEAD4, MISSING, NUM_KINDS, SPACE, SPECIAL, WORD, Constants, byte_kinds


HASH_BASE, HASH_PRIME = 65599, 2**31 - 1
DIGITS, BEYOND_DIGITS = 512, 2**60  # base of the numbers that stand for grams, and a bit beyond all of theirs
MATCH_LENGTHS = 6  # classes: a match of at least n, 2 n, ... bytes
MAX_GRAM_BYTES = 6  # whose digits a number holds
MAX_COMPARED_BYTES = 16  # up to which comparing with all earlier bytes is faster than sorting them


GRAMS = Constants(
    back=torch.arange(MAX_GRAM_BYTES - 1, -1, -1, device="cpu"),  # of each digit, oldest first, from the last one
    weights=DIGITS ** torch.arange(MAX_GRAM_BYTES - 1, -1, -1, device="cpu"),
)


class STLMNgramEmbedding(nn.Module):
    """Embeddings of the hashed n-grams that end at each byte, and of the word so far (BLT, arXiv:2412.09871, 3.2.1).

    An n-gram hashes to the sum of `(byte + 1) * HASH_BASE**i`, i = 0 for its oldest byte, modulo the prime. A word ends
    with the first space-like byte after it; special tokens end one, too.
    """

    def __init__(self, config: STLMConfig):
        super().__init__()
        lengths = [*config.ngram_orders, *([config.ngram_word_bytes] if config.ngram_word_bytes else [])]
        width, size = config.hidden_size, config.ngram_embedding_size
        self.num_rows, self.longest, self.has_words = config.ngram_rows, max(lengths), config.ngram_word_bytes > 0
        self.ngram_tables = nn.Embedding(len(lengths) * config.ngram_rows, size or width)
        self.ngram_proj = nn.Linear(len(lengths) * size, width, bias=False) if size else None
        # Columns of the weights: oldest byte first, zero for bytes that a shorter n-gram does not look at.
        weights = [[0] * (self.longest - n) + [pow(HASH_BASE, i, HASH_PRIME) for i in range(n)] for n in lengths]
        before, kind = torch.arange(NUM_KINDS, device="cpu")[:, None], torch.arange(NUM_KINDS, device="cpu")
        self.constants = Constants(
            weights=torch.tensor(weights, device="cpu"),
            offsets=torch.arange(len(lengths), device="cpu") * config.ngram_rows,
            kinds=byte_kinds(),
            word_ends=((kind == SPACE) & (before >= WORD) & (before <= LEAD4)) | (kind == SPECIAL),
        )

    def forward(self, context: torch.Tensor, batch: STLMBatch) -> torch.Tensor:
        """Embeddings (B, T, D) at the last T of `context (B, C + T)`, C at least the longest n-gram."""
        tables = self.constants.on(context.device)
        context = context[:, context.shape[1] - batch.num_bytes - self.longest :]
        grams = (
            context[:, 1:].unfold(1, self.longest, 1) + 1
        )  # (B, T, n): oldest first, 0 for bytes that are not there
        if batch.positions is not None:
            back = torch.arange(self.longest - 1, -1, -1, device=context.device)
            grams = grams.masked_fill(batch.positions[..., None] < back, 0)
        terms = grams[:, :, None] * tables["weights"]  # (B, T, tables, n)
        if self.has_words:  # the last table
            terms[:, :, -1] *= self._word_so_far(context, batch, tables)
        # ExecuTorch sums integers in float32, so exported graphs add them up in pairs.
        digest = (_sum_by_pairs(terms) if is_torchdynamo_exporting() else terms.sum(-1)) % HASH_PRIME
        ngrams = self.ngram_tables(digest % self.num_rows + tables["offsets"])  # (B, T, tables, size)
        return ngrams.sum(-2) if self.ngram_proj is None else self.ngram_proj(ngrams.flatten(-2))

    def _word_so_far(self, context, batch: STLMBatch, tables) -> torch.Tensor:
        """Which of the last n bytes up to each byte, oldest first, belong to its word: (B, T, n) bool."""
        kind = tables["kinds"][context.clamp(max=256)]
        kind_before, kind = kind[:, :-1], kind[:, 1:]
        if batch.positions is not None:  # there is no byte before the start of a document
            starts = F.pad(batch.positions == 0, (self.longest - 1, 0))
            kind_before = kind_before.masked_fill(starts, MISSING)
        ended = tables["word_ends"][kind_before, kind]
        before = (ended.cumsum(1) - ended.long()).unfold(1, self.longest, 1)  # word ends up to the byte before each
        return before == before[..., -1:]


def _sum_by_pairs(terms: torch.Tensor) -> torch.Tensor:
    """`terms.sum(-1)` by additions alone."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        rest = terms[..., 2 * half :]
        terms = terms[..., :half] + terms[..., half : 2 * half]
        if rest.shape[-1]:
            terms = torch.cat([terms, rest], dim=-1)
    return terms[..., 0]


def _last_digits(grams: torch.Tensor, n: int) -> torch.Tensor:
    """The number that the last n digits of each of `grams` stand for."""
    # A mask is faster on a CPU, but not every exporter knows it.
    return grams % DIGITS**n if is_torchdynamo_exporting() else grams & (DIGITS**n - 1)


class ByteHistory(NamedTuple):
    """All bytes of each row so far, for embeddings that look up earlier places of the last ones."""

    grams: torch.Tensor  # (B, S) int64 the last `longest` bytes up to each one, and how many of them are there
    index: torch.Tensor  # (B, T) which of its row each byte of this call is
    start: torch.Tensor | None  # (B, T) at which its document starts; None: all at 0
    longest: int

    @classmethod
    def of(
        cls,
        context: torch.Tensor,
        batch: STLMBatch,
        num_past: torch.Tensor,
        slot: STLMPatchStateSlot | None,
        longest: int,
    ) -> "ByteHistory":
        """
        The digits of a gram are 0 for a byte that is not there, and the id plus one, 257 for every special token.

        Args:
            context (`torch.LongTensor` of shape `(B, C + T)`): C at least `longest` - 1.
            num_past (`torch.LongTensor` of shape `(B,)`): valid bytes of each row before this call.
            slot (`STLMPatchStateSlot`, *optional*): keeps the grams of earlier calls.
            longest (`int`): at most `MAX_GRAM_BYTES`.
        """
        index = num_past[:, None] + torch.arange(batch.num_bytes, device=context.device)
        start = None if batch.positions is None else index - batch.positions
        digits = context[:, context.shape[1] - batch.num_bytes - longest + 1 :].clamp(-1, 256) + 1
        digits = digits.unfold(1, longest, 1)  # (B, T, n) oldest byte first
        tables = GRAMS.on(context.device)
        back, weights = (tables[name][MAX_GRAM_BYTES - longest :] for name in ("back", "weights"))
        if batch.positions is not None:
            digits = digits.masked_fill(batch.positions[..., None] < back, 0)
        terms = digits * weights
        grams = _sum_by_pairs(terms) if is_torchdynamo_exporting() else terms.sum(-1)
        num_present = torch.where(digits > 0, longest, back).amin(-1)  # after the last one that is not there
        grams = grams + num_present * DIGITS**longest
        if slot is not None:
            grams = slot.append("grams", grams, index)
        if grams.shape[1] == 1:  # a first byte, which nothing follows
            grams = F.pad(grams, (0, 1))
        return cls(grams, index, start, longest)

    def last_bytes(self, n: int) -> torch.Tensor:
        """A number (B, S) for the last n bytes up to each one; where one of them is not there, it has no equal."""
        place = torch.arange(self.grams.shape[1], device=self.grams.device)
        return torch.where(self.grams >= n * DIGITS**self.longest, _last_digits(self.grams, n), -3 - place)

    def last_equal(self, known: torch.Tensor, n: int, doublings: int = 0) -> list[torch.Tensor]:
        """The last earlier place (B, T) with the same n bytes; then with twice, four times, ... as many. -1 if none.

        Args:
            known (`torch.LongTensor` of shape `(B, S)`): `last_bytes(n)`.
        """
        places, longer = last_equal(known, known.gather(1, self.index), self.index, n, doublings), 0
        if self.start is None:
            return places
        for i, place in enumerate(places):
            places[i] = place.masked_fill(place < self.start + longer, -1)
            longer = 2 * longer + n  # bytes that the next one has more than a gram
        return places

    def last_places(self, orders: list[int]) -> torch.Tensor:
        """The last earlier place (B, T, orders) with the same n bytes for each n of `orders`; -1 if none."""
        if self.index.shape[1] > 1 or self.start is not None or is_torchdynamo_exporting():
            return torch.stack([self.last_equal(self.last_bytes(n), n)[0] for n in orders], dim=-1)
        # For one byte, in half of the time for three of `orders`.
        value = self.grams.gather(1, self.index)  # (B, 1)
        differ = self.grams ^ value | BEYOND_DIGITS  # (B, S)
        place = torch.arange(self.grams.shape[1], device=value.device)
        # The lowest bit that differs: below it, all digits are the same.
        lowest = torch.where(place < self.index, differ & -differ, 0)
        # A gram in which a byte is not there is equal to none.
        least = [torch.where(value >= n * DIGITS**self.longest, DIGITS**n, 2 * BEYOND_DIGITS) for n in orders]
        return torch.where(lowest[:, None] >= torch.stack(least, dim=1), place, -1).amax(-1)[:, None]

    def byte_after(self, place: torch.Tensor) -> torch.Tensor:
        """The id plus one, 257 for special tokens, of the byte after each `place (B, ...)`; 0 for -1."""
        after = (place.clamp(min=0) + 1).flatten(1)
        return _last_digits(self.grams.gather(1, after).view_as(place), 1) * (place >= 0)


class STLMMatchEmbedding(nn.Module):
    """Embeddings of the byte that followed the last place where the same bytes stood, and of how long the match is.

    For each byte, the last earlier place of its document where the same `match_bytes` bytes ended, as in the match models
    of data compression (Mahoney, "Adaptive weighing of context models for lossless data compression", 2005). With
    `match_doublings`, a place where twice, four times, ... as many are the same goes before one that came later, as the
    longest of several match models does there. It needs no matrix product and lets a model copy. While generating, each
    byte is compared with all earlier ones.
    """

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.num_bytes, self.doublings = config.match_bytes, config.match_doublings
        self.following = nn.Embedding(258, config.hidden_size)  # 0: no match, or no byte
        self.length = nn.Embedding(1 + MATCH_LENGTHS, config.hidden_size)
        self.constants = Constants(back=self.num_bytes * torch.arange(1, MATCH_LENGTHS, device="cpu"))

    def forward(self, history: ByteHistory) -> torch.Tensor:
        """Embeddings (B, T, D)."""
        known = history.last_bytes(self.num_bytes)
        last, *longer = history.last_equal(known, self.num_bytes, self.doublings)
        for place in longer:
            last = torch.where(place >= 0, place, last)
        return self.following(history.byte_after(last)) + self.length(self._length(history, known, last))

    def _length(self, history: ByteHistory, known: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Class of length, 1 to `MATCH_LENGTHS`, of the match of each byte with that at `last` (B, T); 0 for -1."""
        back = self.constants.on(known.device)["back"]  # where the grams before end
        # No gram before the start of a row is complete: what is cut off here is not equal.
        here, there = (history.index[..., None] - back).clamp(min=1), (last[..., None] - back).clamp(min=0)
        same = known.gather(1, here.flatten(1)) == known.gather(1, there.flatten(1))
        same = same.view_as(here)  # (B, T, classes - 1)
        if history.start is not None:
            same = same & (there >= history.start[..., None])
        return (1 + F.pad(same.long(), (0, 1)).argmin(-1)) * (last >= 0)  # the first that is not


class STLMContextNgramEmbedding(nn.Module):
    """Embeddings of the bytes that followed the last places where the same n bytes stood in the document, for several n.

    N-gram heads ("In-Context Language Learning: Architectures and Algorithms", arXiv:2401.12973) over bytes, with an
    embedding of what is found in place of its hidden state, and the last places in place of all: the mean over the
    places, summed over the n-grams. A match embedding follows one long match; these are short, and tell how the document
    goes on most of the time.
    """

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.orders, self.num_places = config.context_ngram_orders, config.context_ngram_places
        self.following = nn.Embedding(
            258 * len(self.orders), config.hidden_size
        )  # 0 of each 258: no place, or no byte
        ids = torch.arange(258 * len(self.orders), device="cpu")
        self.constants = Constants(ids=ids, offsets=ids[::258].contiguous())

    def forward(self, history: ByteHistory, slot: STLMPatchStateSlot | None) -> torch.Tensor:
        """Embeddings (B, T, D). The slot keeps the last place before each byte of earlier calls."""
        places = [history.last_places(self.orders) + 1]  # (B, T, orders), 0 for none, for which 0 is kept, too
        if slot is None:
            known = F.pad(places[0], (0, 0, 1, 0))  # (B, 1 + S, orders)
        else:
            known = slot.append("places", places[0], history.index, num_before=1)
        for _ in range(1, self.num_places):
            places.append(known.gather(1, places[-1]))
        tables = self.constants.on(known.device)
        rows = (history.byte_after(torch.stack(places, dim=2) - 1) + tables["offsets"]).flatten(2)
        if rows.shape[1] == 1 or is_torchdynamo_exporting():
            return self.following(rows).sum(2) / self.num_places
        # Training adds up the gradients of a bag eight times as fast. Called and not read: adapters take part in it.
        table = self.following(tables["ids"])
        return F.embedding_bag(rows.flatten(0, 1), table, mode="sum").unflatten(0, rows.shape[:2]) / self.num_places


def last_equal(
    known: torch.Tensor, values: torch.Tensor, index: torch.Tensor, step: int = 1, doublings: int = 0
) -> list[torch.Tensor]:
    """The last place before `index (B, T)` where `known (B, S)` is `values (B, T)`, which it is at `index`; -1 if none.

    Then, for each doubling, the last place where twice as many of `known`, `step` places apart, are the same.
    """
    find = _last_by_comparing if compares(values.shape[1]) else _last_by_sorting
    return find(known, values, index, step, doublings)


def compares(num_bytes: int) -> bool:
    """Whether so many new bytes are compared with all earlier ones, and these not sorted."""
    if is_torchdynamo_exporting() or num_bytes == 1:  # ExecuTorch has no sort
        return True
    return not is_torchdynamo_compiling() and num_bytes <= MAX_COMPARED_BYTES


def _last_by_comparing(known, values, index, step: int, doublings: int) -> list[torch.Tensor]:
    place = torch.arange(known.shape[1], device=known.device)
    is_equal = (known[:, None] == values[..., None]) & (place < index[..., None])  # (B, T, S)
    found = [torch.where(is_equal, place, -1).amax(-1)]
    for count in range(1, 2**doublings):
        back = count * step
        earlier = F.pad(known, (back, 0), value=-1)[:, : known.shape[1]]  # -1: no place there
        here = torch.where(index >= back, known.gather(1, (index - back).clamp(min=0)), -2)
        is_equal = is_equal & (earlier[:, None] == here[..., None])
        if count & (count + 1) == 0:  # one less than a power of two
            found.append(torch.where(is_equal, place, -1).amax(-1))
    return found


def _last_by_sorting(known, values, index, step: int, doublings: int) -> list[torch.Tensor]:
    found, num_places = [], known.shape[1]
    place = torch.arange(num_places, device=known.device)
    for doubling in range(doublings + 1):
        ordered, order = known.sort(dim=1, stable=True)
        is_same = ordered[:, 1:] == ordered[:, :-1]
        before = F.pad(torch.where(is_same, order[:, :-1], -1), (1, 0), value=-1)
        last = torch.zeros_like(order).scatter(1, order, before)
        found.append(last if values.shape == known.shape else last.gather(1, index))
        if doubling < doublings:
            # Pairs of numbers below `num_places`, as one; the second is a place where there is none before.
            rank = torch.zeros_like(order).scatter(1, order, F.pad((~is_same).cumsum(1), (1, 0)))
            back = step << doubling
            first = torch.where(place < back, num_places + place, F.pad(rank, (back, 0))[:, :num_places])
            known = rank * (2 * num_places) + first
    return found
