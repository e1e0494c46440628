# SPDX-License-Identifier: Apache-2.0
"""What a byte brings into the model: its embedding, and those of the n-grams that end at it.

Shapes: B rows, T bytes of this call, C ids of context before it, D byte width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.import_utils import is_torchdynamo_exporting

from .batching_stlm import STLMBatch
from .configuration_stlm import STLMConfig
from .patching_stlm import LEAD4, MISSING, NUM_KINDS, SPACE, SPECIAL, WORD, Constants, byte_kinds


HASH_BASE, HASH_PRIME = 65599, 2**31 - 1


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
