# SPDX-License-Identifier: Apache-2.0
"""What is added to the embedding of a byte: the n-grams that end at it, and what followed them the last time.

Shapes: B rows, T bytes of this call, C ids of context before it, S bytes of a row so far, D byte width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.import_utils import is_torchdynamo_compiling, is_torchdynamo_exporting

from .batching_stlm import STLMBatch
from .cache_stlm import STLMPatchStateSlot
from .configuration_stlm import STLMConfig
from .patching_stlm import LEAD4, MISSING, NUM_KINDS, SPACE, SPECIAL, WORD, Constants, byte_kinds


HASH_BASE, HASH_PRIME = 65599, 2**31 - 1
LANE = 512  # a gram holds the ids of its bytes as the digits of one number
MATCH_LENGTHS = 6  # classes: a match of at least n, 2 n, ... bytes
SHORT_CALL_BYTES = 16  # up to which comparing with all earlier bytes is faster than sorting them


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


class STLMMatchEmbedding(nn.Module):
    """Embeddings of the byte that followed the last place where the same bytes stood, and of how long the match is.

    For each byte, the last earlier place of its document where the same `match_bytes` bytes ended, as in the match models
    of data compression (Mahoney, "Adaptive weighing of context models for lossless data compression", 2005, section
    2.3). It needs no arithmetic and lets a model copy. A gram of n bytes is one number, so that grams are compared
    exactly: the digits are 0 for a byte that is not there, and the id plus one, 257 for every special token. A gram is
    complete if all its bytes are there; only complete ones match.
    """

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.num_bytes = config.match_bytes
        self.following = nn.Embedding(258, config.hidden_size)  # 0: no match
        self.length = nn.Embedding(1 + MATCH_LENGTHS, config.hidden_size)

    def forward(
        self, context: torch.Tensor, batch: STLMBatch, num_past: torch.Tensor, slot: STLMPatchStateSlot | None
    ) -> torch.Tensor:
        """Embeddings (B, T, D).

        Args:
            context (`torch.LongTensor` of shape `(B, C + T)`): C at least n - 1.
            num_past (`torch.LongTensor` of shape `(B,)`): valid bytes of each row before this call.
            slot (`STLMPatchStateSlot`, *optional*): keeps the grams of earlier calls.
        """
        grams = known = self.grams(context, batch)
        index = (
            torch.arange(batch.num_bytes, device=grams.device) + num_past[:, None]
        )  # (B, T) of the bytes in their row
        if slot is not None:
            known = slot.append_grams(grams, index)  # (B, S)
        last = last_equal(known, grams, index)
        start = 0 if batch.positions is None else index - batch.positions  # of the document
        found = (grams >= LANE ** (self.num_bytes - 1)) & (last >= start)
        last = last.clamp(min=0)
        following = (known.gather(1, (last + 1).clamp(max=known.shape[1] - 1)) % LANE).masked_fill(~found, 0)
        return self.following(following) + self.length(self._length(known, index, last, start) * found)

    def grams(self, context: torch.Tensor, batch: STLMBatch) -> torch.Tensor:
        """The gram that ends at each byte (B, T); that of the byte alone where bytes are missing."""
        n = self.num_bytes
        near = context[:, context.shape[1] - batch.num_bytes - n + 1 :]
        digits = (near.clamp(-1, 256) + 1).unfold(1, n, 1)  # (B, T, n) oldest byte first
        if batch.positions is not None:
            back = torch.arange(n - 1, -1, -1, device=context.device)
            digits = digits.masked_fill(batch.positions[..., None] < back, 0)
        gram = digits[..., 0]
        for i in range(1, n):
            gram = gram * LANE + digits[..., i]
        return torch.where((digits > 0).all(-1), gram, digits[..., -1])

    def _length(self, known: torch.Tensor, index: torch.Tensor, last: torch.Tensor, start) -> torch.Tensor:
        """Class of length, 1 to `MATCH_LENGTHS`, of the matches between `index` and `last` (B, T)."""
        n = self.num_bytes
        back = torch.arange(n, n * MATCH_LENGTHS, n, device=known.device)  # where the grams before end
        here, there = index[..., None] - back, last[..., None] - back  # (B, T, classes - 1)
        gram = known.gather(1, here.clamp(min=0).flatten(1)).view_as(here)
        same = gram == known.gather(1, there.clamp(min=0).flatten(1)).view_as(here)
        first = start + n - 1 if isinstance(start, int) else start[..., None] + n - 1
        same = same & (gram >= LANE ** (n - 1)) & (there >= first)
        return 1 + same.long().cumprod(-1).sum(-1)


def last_equal(known: torch.Tensor, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The last place before `index (B, T)` where `known (B, S)` is `values (B, T)`, which it is at `index`; -1 if none."""
    if values.shape[1] == 1 or (values.shape[1] <= SHORT_CALL_BYTES and not is_torchdynamo_compiling()):
        place = torch.arange(known.shape[1], device=known.device)
        is_equal = (known[:, None] == values[..., None]) & (place < index[..., None])  # (B, T, S)
        return torch.where(is_equal, place, -1).amax(-1)
    ordered, order = known.sort(dim=1, stable=True)
    before = torch.where(ordered[:, 1:] == ordered[:, :-1], order[:, :-1], -1)
    last = torch.zeros_like(order).scatter(1, order, F.pad(before, (1, 0), value=-1))
    return last if values.shape == known.shape else last.gather(1, index)
