# SPDX-License-Identifier: Apache-2.0
"""STLM: a pooled byte-level transformer with a weight-tied trunk.

    bytes -> embedding + hashed n-grams -> local encoder --pool--> trunk (once per patch) --unpool--> + -> local decoder
                                               |                                                      |
                                               +---------------------- residual ----------------------+

Byte t sees the trunk output of the last patch that is complete at t (a learned start vector before the first), so
nothing leaks from later bytes, and the trunk runs only when a patch is complete. Training, prefill, a chunk and one byte
are the same code: a call without a cache starts from the fresh state and drops the new one.

Shapes: B rows, T bytes of this call, C ids of context before it, P patches, D byte width, G trunk width, H heads, K head
width, V vocabulary. R rows that completed a patch, S patches of a row so far.
Reference: Super Tiny Language Models, arXiv:2405.14159; other sources are named where they are used.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.import_utils import is_torchdynamo_compiling, is_torchdynamo_exporting, is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .batching_stlm import STLMBatch, valid_bytes
from .budget_stlm import BudgetMixin
from .cache_stlm import STLMPatchStateSlot, TrunkRows
from .configuration_stlm import STLMConfig
from .generation_stlm import STLMGenerationMixin
from .patching_stlm import (
    LEAD4,
    MISSING,
    NUM_KINDS,
    RULES,
    SPACE,
    SPECIAL,
    WORD,
    Constants,
    PatchEnds,
    Patches,
    PatchState,
    RouterProjection,
    byte_kinds,
    pool_patches,
    smooth_patches,
    unpool_patches,
)


if TYPE_CHECKING:  # `save_pretrained` copies the modules that relative imports name: the other heads travel along
    from .committee_stlm import STLMCommittee  # noqa: F401
    from .heads_stlm import STLMForMaskedLM  # noqa: F401


logger = logging.get_logger(__name__)
HASH_BASE, HASH_PRIME = 65599, 2**31 - 1
SHORT_CALL_BYTES = 16  # up to which sums of products are faster on a CPU than the convolution of the library
SOFT_ID = -2  # in the byte history: an embedding that matches no id


class ByteRows(NamedTuple):
    """Per-call inputs shared by all byte layers."""

    batch: STLMBatch
    num_past: int = 0  # bytes before this call, padding included; for attention mixers that return weights
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # `rotary_embedding`, for attention mixers
    window_mask: torch.Tensor | None = None  # `window_mask`, for attention mixers
    output_attentions: bool = False


class STLMOutput(ModelOutput):
    """A cheaper `__setattr__`: the base class scans all fields, which costs microseconds per byte."""

    def __setattr__(self, name, value):
        if value is not None and name in self.__dataclass_fields__:
            self[name] = value
        else:
            object.__setattr__(self, name, value)


@dataclass
class STLMModelOutput(STLMOutput):
    """
    Output of [`STLMModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, hidden_size)`):
            After the final norm. At padding: that of the last valid byte before it, zero if there is none.
        cache (`Cache`, *optional*): with `use_cache=True`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): byte level, `(B, T, hidden_size)` for the embedding and
            each byte layer, undefined at padding; with `output_hidden_states=True`.
        attentions (`tuple(torch.FloatTensor)`, *optional*): byte level, `(B, num_attention_heads, T, past + T)` for each
            `"attention"` mixer, undefined at padding; with `output_attentions=True` and eager attention. The bytes
            of a row before this call come right before it.
        patch_hidden_states (`tuple(torch.FloatTensor)`, *optional*): `(R, P, trunk_hidden_size)` after each pass of the
            trunk; with `output_patch_hidden_states=True`. All rows without a cache, else those that completed a patch.
        patch_attentions (`tuple(torch.FloatTensor)`, *optional*): `(B, trunk_num_attention_heads, P, P)` for each pass;
            with `output_patch_attentions=True`.
        boundaries (`torch.BoolTensor` of shape `(B, T)`, *optional*): where patches end; with `output_boundaries=True`.
        ratio_loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `patching="learned"`, in training: see [`LearnedRule`].
    """

    last_hidden_state: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    patch_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    patch_attentions: tuple[torch.FloatTensor, ...] | None = None
    boundaries: torch.BoolTensor | None = None
    ratio_loss: torch.FloatTensor | None = None


@dataclass
class STLMCausalLMOutput(STLMOutput):
    """
    Output of [`STLMForCausalLM`]: `loss` in nats per byte (in training with `patching="learned"` plus
    `ratio_loss_weight` times `ratio_loss`), `logits (B, T, vocab_size)`, and the rest as in [`STLMModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    patch_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    patch_attentions: tuple[torch.FloatTensor, ...] | None = None
    boundaries: torch.BoolTensor | None = None
    ratio_loss: torch.FloatTensor | None = None


@torch.no_grad()
def rotary_embedding(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (B, T, 1, K) of the rotary embedding (arXiv:2104.09864) at `positions` (B, T), for `rotate`."""
    # Not kept in a buffer: `model.to(torch.bfloat16)` would round the frequencies.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float, device=positions.device) / head_dim
    angles = positions[..., None, None].float() / theta**exponents
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`states (B, T, H, K)` rotated in the planes of channels i and i + K / 2."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def make_norm(config: STLMConfig, width: int) -> nn.Module:
    """LayerNorm with a scale and without a bias: one kernel on a CPU, where an RMSNorm takes several."""
    return nn.LayerNorm(width, eps=config.norm_eps, bias=False)


class OutputProjection(nn.Linear):
    """The last matrix of a residual block. It starts at zero, so that every block starts as the identity."""


class STLMAttention(nn.Module):
    """Grouped-query attention with QK-norm: the projections of both levels, and `forward` of the trunk."""

    def __init__(self, config: STLMConfig, width: int, num_heads: int, num_key_value_heads: int, head_dim: int):
        super().__init__()
        self.config, self.is_causal = config, config.is_causal
        self.layer_idx = None  # the library asks for it; cache slots are passed to `forward`
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.num_key_value_groups = num_heads // num_key_value_heads
        self.scaling = head_dim**-0.5
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_key_value_heads * head_dim, bias=False)
        self.o_proj = OutputProjection(num_heads * head_dim, width, bias=False)
        self.q_norm = make_norm(config, head_dim)
        self.k_norm = make_norm(config, head_dim)

    def project(self, hidden_states: torch.Tensor, rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of shape (B, T, H, K), queries and keys normalised and rotated."""
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)))
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, self.head_dim)))
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        return rotate(query, *rotary), rotate(key, *rotary), value

    def attend(self, query, key, value, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `query (B, H, T, K)` where `allowed (B, 1, T, S)`; `None`: full, or causal in a causal model."""
        implementation = self.config._attn_implementation
        probability = self.config.attention_dropout if self.training else 0.0
        if implementation == "sdpa" and allowed is None and query.shape[2] == 1:
            # One query per head: heads that share keys are the queries of one product, which reads the keys once.
            groups = query.squeeze(2).unflatten(1, (self.num_key_value_heads, self.num_key_value_groups))
            output = F.scaled_dot_product_attention(groups, key, value, dropout_p=probability, scale=self.scaling)
            return output.flatten(1)[:, None], None
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if implementation != "sdpa":
            if allowed is None:
                allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
                allowed = (allowed.tril(key.shape[2] - query.shape[2]) if self.is_causal else allowed)[None, None]
            bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
            allowed = bias.masked_fill_(~allowed, torch.finfo(query.dtype).min)
        output, weights = attention(self, query, key, value, allowed, dropout=probability, scaling=self.scaling)
        return output.flatten(2), weights  # (B, T, H * K), (B, H, T, S)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        allowed: torch.Tensor | None,
        cache: Cache | None = None,
        slot: int = 0,
        where: TrunkRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states (R, P, G)` of the rows that completed a patch, `allowed (R, 1, P, S)` or `None`: causal."""
        query, key, value = (states.transpose(1, 2) for states in self.project(hidden_states, rotary))
        if cache is not None:
            key, value = cache.update(key, value, slot, where=where)
        output, weights = self.attend(query, key, value, allowed)
        return self.o_proj(output), weights


class STLMWindowAttention(STLMAttention):
    """Attention over the last W bytes (and the next W - 1), in blocks of S = min(T, W) queries: linear in T."""

    def __init__(self, config: STLMConfig):
        super().__init__(
            config, config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        )
        self.window = config.attention_window_bytes
        self.num_after = 0 if config.is_causal else self.window - 1

    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: ByteRows,
        cache: Cache | None = None,
        slot: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states (B, T, D)` of compact rows; also weights (B, H, T, past + T) with `output_attentions`."""
        num_rows, num_bytes, _ = hidden_states.shape
        keep, num_past, output_attentions = self.window - 1, rows.num_past, rows.output_attentions
        allowed = rows.window_mask
        query, key, value = self.project(hidden_states, rows.rotary)
        if cache is not None:
            key, value = cache.update(key, value, slot, keep=keep, lengths=rows.batch.lengths)
        else:
            key, value = (F.pad(states, (0, 0, 0, 0, keep, self.num_after)) for states in (key, value))
        if output_attentions and num_past == 0:
            own = slice(keep, keep + num_bytes)
            key, value, allowed = key[:, own], value[:, own], allowed[..., own]

        block = num_bytes if output_attentions else min(num_bytes, self.window)
        query, key, value = (F.pad(states, (0, 0, 0, 0, 0, -num_bytes % block)) for states in (query, key, value))
        query = query.unflatten(1, (-1, block)).flatten(0, 1).transpose(1, 2)  # (B * blocks, H, S, K)
        # Each block of S queries sees its own S keys, the W - 1 before them and, if not causal, the W - 1 after them.
        key, value = (
            states.unfold(1, allowed.shape[-1], block).flatten(0, 1).transpose(2, 3)  # (B * blocks, H, S + W - 1, K)
            for states in (key, value)
        )
        output, weights = self.attend(query, key, value, allowed)
        output = output.unflatten(0, (num_rows, -1)).flatten(1, 2)[:, :num_bytes]
        if weights is not None and output_attentions and num_past:
            # The kept bytes end where this call starts; what lies further back has no weight.
            weights = F.pad(weights[..., max(0, keep - num_past) :], (max(0, num_past - keep), 0))
        return self.o_proj(output), weights if output_attentions else None


def window_mask(positions: torch.Tensor, remaining: torch.Tensor | None, window: int, block: int) -> torch.Tensor:
    """Which of its keys each query of a block of S queries may see.

    Args:
        positions (`torch.LongTensor` of shape `(B, T)`): bytes since the document's start.
        remaining (`torch.LongTensor` of shape `(B, T)`, *optional*): bytes to the document's end; causal if left out.

    Returns:
        `torch.BoolTensor` of shape `(B * blocks, 1, S, S + W - 1)`, or `(B * blocks, 1, S, S + 2 W - 2)` with `remaining`.
    """
    num_after = 0 if remaining is None else window - 1
    query = torch.arange(block, device=positions.device)[:, None]
    distance = query + window - 1 - torch.arange(block + window - 1 + num_after, device=positions.device)

    def blocks(counts):  # (B, blocks, S, 1)
        return F.pad(counts, (0, -counts.shape[1] % block)).unflatten(1, (-1, block))[..., None]

    allowed = (distance > -1 - num_after) & (distance < window) & (distance <= blocks(positions))
    if remaining is not None:
        allowed = allowed & (-distance <= blocks(remaining))
    return allowed.flatten(0, 1)[:, None]


class STLMConv1d(nn.Conv1d):
    """Depthwise convolution with a shorter way for a few outputs on a CPU (1.6 times as fast for one byte)."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`inputs (B, D, N - 1 + T)` to `(B, D, T)`."""
        if is_torchdynamo_compiling() or inputs.shape[-1] >= SHORT_CALL_BYTES + self.kernel_size[0]:
            return super().forward(inputs)
        if inputs.shape[-1] == self.kernel_size[0]:
            return (inputs * self.weight[:, 0]).sum(-1, keepdim=True)
        return (inputs.unfold(-1, self.kernel_size[0], 1) * self.weight).sum(-1)


class STLMShortConv(nn.Module):
    """Gated short convolution over the last N bytes (LFM2), or over N bytes around each one."""

    def __init__(self, config: STLMConfig):
        super().__init__()
        width = config.hidden_size
        self.kernel_size = config.conv_kernel_size
        self.num_after = 0 if config.is_causal else (self.kernel_size - 1) // 2
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.conv = STLMConv1d(width, width, self.kernel_size, groups=width, bias=False)
        self.out_proj = OutputProjection(width, width, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, rows: ByteRows, cache: Cache | None = None, slot: int = 0
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states (B, T, D)` of compact rows."""
        batch, keep = rows.batch, self.kernel_size - 1 - self.num_after
        gate_in, gate_out, inputs = self.in_proj(hidden_states).chunk(3, dim=-1)
        inputs = gate_in * inputs
        if self.num_after and batch.lengths is not None:
            inputs = inputs.masked_fill(~batch.is_valid[..., None], 0)
        if cache is None:
            inputs = F.pad(inputs, (0, 0, keep, self.num_after))  # (B, N - 1 + T, D)
        else:
            inputs, _ = cache.update(inputs, None, slot, keep=keep, lengths=batch.lengths)
        output = self.conv(inputs.transpose(1, 2)).transpose(1, 2)
        if batch.positions is not None:
            output = self._stop_at_documents(output, inputs, batch, keep)
        return self.out_proj(gate_out * output), None

    def _stop_at_documents(self, output, inputs, batch: STLMBatch, keep: int) -> torch.Tensor:
        """`output (B, T, D)`, with the few bytes whose window crosses a document computed again without it."""
        crosses = batch.positions < keep
        if self.num_after:
            crosses = crosses | (batch.remaining < self.num_after)
        row, time = crosses.nonzero(as_tuple=True)  # (n,)
        tap = torch.arange(self.kernel_size, device=time.device)  # (N,) oldest byte first
        window = inputs[row[:, None], time[:, None] + tap]  # (n, N, D)
        inside = keep - tap <= batch.positions[row, time][:, None]
        if self.num_after:
            inside = inside & (tap - keep <= batch.remaining[row, time][:, None])
        alone = self.conv((window * inside[..., None]).transpose(1, 2))[..., 0]
        return output.index_put((row, time), alone.to(output.dtype))  # they differ under autocast


def dropout(states: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    return F.dropout(states, probability) if training and probability else states


class STLMFeedForward(nn.Module):
    def __init__(self, width: int, intermediate_size: int, activation: str):
        super().__init__()
        self.up_proj = nn.Linear(width, intermediate_size, bias=False)
        self.down_proj = OutputProjection(intermediate_size, width, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden_states)))


class STLMByteLayer(GradientCheckpointingLayer):
    """Mixer and feed-forward layer at the byte level. Its cost does not depend on the context."""

    def __init__(self, config: STLMConfig, slot: int):
        super().__init__()
        self.slot = slot
        self.mixer_norm = make_norm(config, config.hidden_size)
        self.mixer = {"conv": STLMShortConv, "attention": STLMWindowAttention}[config.byte_mixers[slot]](config)
        self.feed_forward_norm = make_norm(config, config.hidden_size)
        self.feed_forward = STLMFeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, rows: ByteRows, cache: Cache | None = None) -> torch.Tensor:
        mixed, _ = self.mixer(self.mixer_norm(hidden_states), rows, cache, self.slot)
        hidden_states = hidden_states + dropout(mixed, self.dropout, self.training)
        output = self.feed_forward(self.feed_forward_norm(hidden_states))
        return hidden_states + dropout(output, self.dropout, self.training)


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


class STLMTrunkAttentionBlock(GradientCheckpointingLayer):
    def __init__(self, config: STLMConfig):
        super().__init__()
        self.attention_norm = make_norm(config, config.trunk_hidden_size)
        self.attention = STLMAttention(
            config,
            config.trunk_hidden_size,
            config.trunk_num_attention_heads,
            config.trunk_num_key_value_heads,
            config.trunk_head_dim,
        )
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, rotary, allowed, cache=None, slot=0, where=None) -> torch.Tensor:
        output, _ = self.attention(self.attention_norm(hidden_states), rotary, allowed, cache, slot, where)
        return hidden_states + dropout(output, self.dropout, self.training)


class STLMTrunkFeedForwardBlock(GradientCheckpointingLayer):
    def __init__(self, config: STLMConfig):
        super().__init__()
        self.feed_forward_norm = make_norm(config, config.trunk_hidden_size)
        self.feed_forward = STLMFeedForward(
            config.trunk_hidden_size, config.trunk_intermediate_size, config.hidden_act
        )
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.feed_forward(self.feed_forward_norm(hidden_states))
        return hidden_states + dropout(output, self.dropout, self.training)


class STLMTrunk(nn.Module):
    """Transformer over patches. Weight tying is structural: a stored block is one module, called several times."""

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.config, self.schedule, self.first_slot = config, config.trunk_schedule, config.num_byte_layers + 1
        self.head_dim, self.rope_theta = config.trunk_head_dim, config.rope_theta
        num_attention, num_feed_forward = (1 + max(indices) for indices in zip(*self.schedule))
        self.attention_blocks = nn.ModuleList(STLMTrunkAttentionBlock(config) for _ in range(num_attention))
        self.feed_forward_blocks = nn.ModuleList(STLMTrunkFeedForwardBlock(config) for _ in range(num_feed_forward))
        self.final_norm = make_norm(config, config.trunk_hidden_size)

    def forward(
        self,
        patches: torch.Tensor,
        allowed: torch.Tensor | None,
        index: torch.Tensor | None = None,
        cache: Cache | None = None,
        where: TrunkRows | None = None,
    ) -> torch.Tensor:
        """
        Args:
            patches (`torch.Tensor` of shape `(R, P, G)`): new patches of some rows.
            allowed (`torch.BoolTensor` of shape `(R, 1, P, S)`, *optional*):
                Patches that each may see; full, or causal in a causal model, if left out.
            index (`torch.LongTensor` of shape `(R, P)`, *optional*): index of each in its row; 0 to P - 1 if left out.
            cache (`Cache`, *optional*): with slots for the passes.
            where (`TrunkRows`, *optional*): with a cache, where the new patches are stored.
        """
        if index is None:
            index = torch.arange(patches.shape[1], device=patches.device)[None]
        rotary = rotary_embedding(index, self.head_dim, self.rope_theta, patches.dtype)
        # `assistant_early_exit` lowers the number of slots for a while: fewer passes run.
        passes = self.schedule[: max(0, self.config.num_hidden_layers - self.first_slot)]
        for i, (attention, feed_forward) in enumerate(passes):
            patches = self.attention_blocks[attention](patches, rotary, allowed, cache, self.first_slot + i, where)
            patches = self.feed_forward_blocks[feed_forward](patches)
        return self.final_norm(patches)

    def make_room(self, cache: Cache, like: torch.Tensor) -> None:
        """Fill static slots before the first patch: a compiled step that filled them would be compiled once more."""
        none = like.new_zeros(like.shape[0], self.config.trunk_num_key_value_heads, 0, self.head_dim)
        for slot in cache.layers[self.first_slot :]:
            if not slot.is_initialized:
                slot.update(none, none, where=TrunkRows(like.shape[0], None, slice(0, 0), 0))


def is_static(cache: Cache | None = None) -> bool:
    """Whether shapes must be static, at the price of room for one patch per byte: in exported graphs, and in compiled
    ones with a static cache."""
    if is_torchdynamo_exporting():
        return True
    return cache is not None and cache.is_compileable and is_tracing()


class STLMStart(nn.Module):
    """What bytes see before the first patch is complete: a learned vector."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, num_rows: int) -> torch.Tensor:
        """(B, D)"""
        return self.weight.expand(num_rows, -1)


class STLMPatcher(nn.Module):
    """Between the levels: where patches end, the trunk inputs, and the trunk output visible to each byte."""

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.rule = RULES[config.patching](config)
        self.patch_proj = nn.Linear(2 * config.hidden_size, config.trunk_hidden_size, bias=False)
        self.byte_proj = nn.Linear(config.trunk_hidden_size, config.hidden_size, bias=False)
        self.start = STLMStart(config.hidden_size)
        self.is_causal, self.mask_token_id = config.is_causal, None if config.is_causal else config.mask_token_id
        longest = max([*config.ngram_orders, config.ngram_word_bytes])
        self.context_bytes = max(longest, self.rule.context_bytes)

    def fresh_state(self, num_rows: int) -> PatchState:
        """The state of rows without a past."""
        start = self.start(num_rows)  # (B, D)
        counts = torch.zeros(num_rows, dtype=torch.long, device=start.device)
        return PatchState(
            last_ids=counts.new_full((num_rows, self.context_bytes), -1),
            num_bytes=counts,
            num_patches=counts.clone(),
            open_bytes=counts.clone(),
            open_sum=torch.zeros_like(start, dtype=torch.float32),
            rule_state=self.rule.fresh_state(start.detach()),
            visible=start.clone(),  # a cache may keep it: no view of the parameter
            last_output=torch.zeros_like(start),
        )

    def find_ends(self, hidden_states, context, batch: STLMBatch, state: PatchState) -> PatchEnds:
        """Where patches end. Without causality a mask counts as a letter, and the end of a document ends its patch."""
        if self.mask_token_id is not None:
            context = context.masked_fill(context == self.mask_token_id, ord("a"))
        found = self.rule.advance(hidden_states, context, batch, state)
        if batch.remaining is None:
            return found
        last = batch.remaining == 0
        return found._replace(ends=found.ends | (last if batch.lengths is None else last & batch.is_valid))

    def smooth(self, new, found: PatchEnds, patches: Patches, batch: STLMBatch, state: PatchState) -> torch.Tensor:
        """Trunk outputs `new (B, P, D)`, averaged over patches by the confidence of their ends, of a learned rule."""
        if found.confidence is None:
            return new
        share = found.confidence.gather(1, patches.end_at)
        is_first = (torch.arange(share.shape[1], device=share.device) == 0) & (state.num_patches == 0)[:, None]
        if batch.positions is not None:
            document = patches.end_at - batch.positions.gather(1, patches.end_at)
            is_first = is_first | F.pad(document[:, 1:] != document[:, :-1], (1, 0))
        # Forced ends (special tokens, the cap) get weight 1.
        return smooth_patches(new, share.masked_fill((share < 0.5) | is_first, 1), state.visible.to(new.dtype))

    def straight_through(self, seen: torch.Tensor, found: PatchEnds) -> torch.Tensor:
        """`seen (B, T, D)` with the gradient of the confidence in each decision, of a learned rule."""
        if found.confidence is None or not torch.is_grad_enabled():
            return seen
        confidence = torch.where(found.ends, found.confidence, 1 - found.confidence)[..., None]
        return seen * (confidence + (1 - confidence).detach()).to(seen.dtype)

    def max_patches(self, ends: torch.Tensor, cache: Cache | None) -> int:
        """Room for the patches of this call: the largest number of a row, where sizes may depend on the text."""
        if is_static(cache):
            return ends.shape[1]
        num_patches = int(ends.sum(1).max())
        # Without a cache the trunk runs even if no row completed a patch, so that every rank of a distributed training
        # runs, and synchronises, the same modules. Two, since a compiled graph takes a size of one for a constant.
        return num_patches if cache is not None else max(2, num_patches)

    def run_trunk(
        self,
        trunk: STLMTrunk,
        patches: Patches,
        found: PatchEnds,
        batch: STLMBatch,
        state: PatchState,
        cache: Cache | None,
    ) -> torch.Tensor:
        """Trunk outputs of the new patches at byte width (B, P, D). With a cache, rows without any are left out."""
        num_new = patches.pooled.shape[1]
        if cache is None:
            new = trunk(self.patch_proj(patches.pooled), self._allowed_patches(patches, batch))
            return self.smooth(self.byte_proj(new), found, patches, batch, state)
        if num_new == 0:
            if cache.is_compileable:
                trunk.make_room(cache, patches.pooled)
            return patches.pooled.new_zeros(*patches.pooled.shape[:2], patches.pooled.shape[2] // 2)
        num_rows, static = patches.counts.shape[0], is_static(cache)
        rows = None if static else patches.counts.nonzero()[:, 0]
        if rows is not None and len(rows) == num_rows:
            rows = None
        pooled, start = patches.pooled, state.num_patches
        if rows is not None:  # `index_select` is three times as fast on a CPU as indexing
            pooled, start = pooled.index_select(0, rows), start.index_select(0, rows)
        index = start[:, None] + torch.arange(num_new, device=start.device)  # (R, P)
        if static:
            at, end, needs_mask = index, cache.layers[trunk.first_slot].room(num_new), True
        else:
            first, last = int(start.min()), int(start.max())
            end, needs_mask = last + num_new, last > 0 and (num_new > 1 or first != last)
            at = slice(first, end) if rows is None and first == last else index
        allowed = None
        if needs_mask:
            allowed = (torch.arange(end, device=start.device) <= index[..., None])[:, None]
        new = trunk(self.patch_proj(pooled), allowed, index, cache, TrunkRows(num_rows, rows, at, end))
        new = self.byte_proj(new)
        if rows is not None:
            new = new.new_zeros(num_rows, num_new, new.shape[-1]).index_copy(0, rows, new)
        return self.smooth(new, found, patches, batch, state)

    def _allowed_patches(self, patches: Patches, batch: STLMBatch) -> torch.Tensor | None:
        """Without a cache: which patches each patch may see (B, 1, P, P); `None` if the trunk needs no mask."""
        end_at, counts = patches.end_at, patches.counts
        patch = torch.arange(end_at.shape[1], device=end_at.device)
        if self.is_causal:
            # Entries past a row's count come last: they are causally invisible.
            if batch.positions is None:
                return None
            allowed = (patch <= patch[:, None])[None]
        else:
            if batch.positions is None and not is_static() and (counts == end_at.shape[1]).all():
                return None
            # A patch past the count sees itself, so that its softmax is over something.
            allowed = (patch < counts[:, None])[:, None] | (patch == patch[:, None])
        if batch.positions is not None:
            document = end_at - batch.positions.gather(1, end_at)  # (B, P) first byte of the patch's document
            allowed = allowed & (document[:, :, None] == document[:, None, :])
        return allowed[:, None]


class STLMPreTrainedModel(PreTrainedModel, BudgetMixin):
    config: STLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["STLMByteLayer", "STLMTrunkAttentionBlock", "STLMTrunkFeedForwardBlock"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    # Patches are ragged, so attention needs a mask: flash attention takes none, and the compiled CPU kernel of flex
    # attention, given one, corrupts memory in torch 2.13.
    _supports_flex_attn = False
    _supports_flash_attn = False
    # Engines behind this flag key their own cache by layer and know nothing of patches (vLLM, SGLang).
    _supports_attention_backend = False
    _can_record_outputs = {
        "hidden_states": OutputRecorder(STLMByteLayer, num_hidden_layers_key="num_byte_layers"),
        "attentions": OutputRecorder(STLMWindowAttention, index=1),
        "patch_hidden_states": OutputRecorder(STLMTrunkFeedForwardBlock),
        "patch_attentions": OutputRecorder(STLMAttention, index=1, layer_name="attention_blocks"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # embeddings, start       normal, std initializer_range
        # linear                  normal, std 1 / sqrt(fan_in)
        # short convolution       normal, std initializer_range: 1 / sqrt(kernel) learns more slowly
        # output projections      zero: every residual block starts as the identity
        # norms                   one
        # router of "learned"     identity: bytes are compared as they are
        super()._init_weights(module)
        if isinstance(module, OutputProjection):
            init.zeros_(module.weight)
        elif isinstance(module, RouterProjection):
            init.eye_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, STLMStart):
            init.normal_(module.weight, std=self.config.initializer_range)


class STLMModel(STLMPreTrainedModel):
    """The model without a head: hidden states of every byte.

    Example:

    ```python
    >>> import torch
    >>> from modeling_stlm import STLMConfig, STLMModel
    >>> model = STLMModel(STLMConfig.from_preset("stlm-3m"))
    >>> model(torch.tensor([list(b"a word and a word")])).last_hidden_state.shape
    torch.Size([1, 17, 128])

    ```
    """

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        has_ngrams = config.ngram_orders or config.ngram_word_bytes
        self.ngram_embedding = STLMNgramEmbedding(config) if has_ngrams else None
        slots, num_encoder = range(config.num_byte_layers), config.num_local_encoder_layers
        self.local_encoder = nn.ModuleList(STLMByteLayer(config, slot) for slot in slots[:num_encoder])
        self.patcher = STLMPatcher(config)
        self.trunk = STLMTrunk(config)
        self.local_decoder = nn.ModuleList(STLMByteLayer(config, slot) for slot in slots[num_encoder:])
        self.final_norm = make_norm(config, config.hidden_size)
        # Copies: reading a field of a config costs microseconds, which add up over the bytes of a text.
        self.num_byte_layers, self.has_attention = config.num_byte_layers, "attention" in config.byte_mixers
        self.is_causal, self.patch_slot_type = config.is_causal, config.layer_types[config.num_byte_layers]
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> STLMModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): bytes (0 to 255) and special tokens.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*):
                0 at padding, which may be anywhere. A padded row gives the outputs of the row alone.
            position_ids (`torch.LongTensor` of shape `(B, T)` or `(1, T)`, *optional*):
                Only read without a filled cache, to find packed documents: a document starts wherever the positions
                do not go on by one; in rows with padding, wherever they are zero.
            cache (`Cache`, *optional*): a `DynamicCache` or `StaticCache`, updated in place.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*):
                Instead of `input_ids`. Vectors that equal a byte's embedding count as that byte for patching and
                n-grams, all others as a byte that is not there.

        Raises:
            ValueError: if a shape does not fit, or if the cache was not made for this model.
        """
        input_ids = self._checked_ids(input_ids, inputs_embeds)
        if self.training and self.patcher.start.weight.dtype is torch.bfloat16 and not is_torchdynamo_compiling():
            self._warn_of_rounding()
        if cache is not None:
            self._check_cache(cache, input_ids)
        num_past = self._num_past(cache, attention_mask, input_ids)
        valid = valid_bytes(attention_mask, num_past, input_ids)
        if num_past != 0 or (cache is not None and is_static(cache)):
            position_ids = None
        batch = STLMBatch.of(input_ids, valid, position_ids, self.is_causal)
        if batch.positions is not None and cache is not None:
            raise ValueError(
                "a cache cannot hold packed documents (position_ids that restart): pass one document per row"
            )
        wants_cache = self.is_causal and not self.training and batch.positions is None
        if cache is None and wants_cache and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        state = self._state_of(cache, input_ids.shape[0])
        compact_embeds = None if inputs_embeds is None else batch.compact(inputs_embeds)
        is_done = False
        try:
            outputs = self._forward_rows(
                batch.compact(input_ids), compact_embeds, batch, state, cache, **(kwargs | {"return_dict": True})
            )
            is_done = True
        finally:
            if cache is not None and not is_done:  # some layers have seen these bytes, others have not
                self._patch_slot(cache).forget()
        if cache is not None:
            self._patch_slot(cache).append_history(input_ids if valid is None else input_ids.masked_fill(~valid, -1))
            for layer in cache.layers:
                layer.end_call(input_ids.shape[1])
            outputs.cache = cache
        if batch.num_seen is not None:
            batch.restore_outputs(outputs, state.last_output)
        return outputs

    @capture_outputs
    def _forward_rows(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None,
        batch: STLMBatch,
        state: PatchState,
        cache: Cache | None,
        output_attentions: bool | None = None,
        output_boundaries: bool = False,
        **kwargs,
    ) -> STLMModelOutput:
        """The model on compact rows."""
        context = torch.cat([state.last_ids, input_ids.clamp(min=-1)], dim=1)  # (B, C + T)
        hidden_states = self._embed(input_ids, inputs_embeds, context, batch)  # (B, T, D)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        rows = self._byte_rows(batch, state, cache, hidden_states, output_attentions)
        for layer in self.local_encoder:
            hidden_states = layer(hidden_states, rows, cache)

        found = self.patcher.find_ends(hidden_states, context, batch, state)
        num_patches = self.patcher.max_patches(found.ends, cache)
        patches, new_state = pool_patches(hidden_states, found.ends, batch, state, num_patches)
        new = self.patcher.run_trunk(self.trunk, patches, found, batch, state, cache)  # (B, P, D)
        seen, visible = unpool_patches(new, found.ends, batch, state)
        decoded = hidden_states + self.patcher.straight_through(seen, found)
        for layer in self.local_decoder:
            decoded = layer(decoded, rows, cache)
        decoded = self.final_norm(decoded)

        if cache is not None:
            slot = self._patch_slot(cache)
            by_byte = None if batch.lengths is not None else (input_ids, hidden_states, seen, decoded)
            slot.record(tuple(state), by_byte)
            slot.state = tuple(self._advanced(new_state, context, found, visible, decoded, batch))
        is_routed = self.training and found.confidence is not None
        return STLMModelOutput(
            last_hidden_state=decoded,
            boundaries=found.ends if output_boundaries else None,
            ratio_loss=self.patcher.rule.ratio_loss(found, batch) if is_routed else None,
        )

    # Bytes

    def _checked_ids(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Ids (B, T) as int64, those of `inputs_embeds` if these were given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("specify exactly one of input_ids and inputs_embeds")
        if input_ids is None:
            width = self.config.hidden_size
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width:
                raise ValueError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (rows, bytes, {width})"
                )
            input_ids = self._ids_of(inputs_embeds)
        elif input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(
                f"input_ids has dtype {input_ids.dtype}, expected integers: ids of bytes and special tokens"
            )
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"the input has shape {tuple(input_ids.shape)}, expected (rows, bytes) with at least one of each"
            )
        return input_ids.long()

    def _warn_of_rounding(self) -> None:
        if self.patcher.start.weight.requires_grad and torch.is_grad_enabled():
            logger.warning_once(
                "Training weights in bfloat16: at the usual rates most updates are smaller than half a rounding step, and "
                "most weights will not move. Load the model with dtype=torch.float32; `bf16=True` of TrainingArguments "
                "then computes in bfloat16 all the same."
            )

    @torch.no_grad()
    def _ids_of(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) whose embeddings were passed; `SOFT_ID` where a vector is the embedding of no id.

        Only equality counts: rows of a resized table can lie closer together than distances are precise.
        """
        # Called and not read, so that an adapter of the embedding takes part.
        table = self.embed_tokens(torch.arange(self.config.vocab_size, device=inputs_embeds.device))
        some = slice(0, 4)  # numbers that tell ids apart, without a difference of shape (B, T, V, D)
        ids = (inputs_embeds[..., None, some] == table[:, some]).all(-1).int().argmax(-1)
        return ids.masked_fill((table[ids] != inputs_embeds).any(-1), SOFT_ID)

    def _embed(self, input_ids, inputs_embeds, context: torch.Tensor, batch: STLMBatch) -> torch.Tensor:
        """Byte embedding plus the embeddings of the n-grams that end at each byte: (B, T, D)."""
        try:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        except IndexError as error:
            low, high, size = int(input_ids.min()), int(input_ids.max()), self.config.vocab_size
            raise ValueError(f"input_ids are between {low} and {high}, expected 0 to {size - 1}") from error
        return hidden_states if self.ngram_embedding is None else hidden_states + self.ngram_embedding(context, batch)

    def _byte_rows(
        self, batch: STLMBatch, state: PatchState, cache, like: torch.Tensor, output_attentions
    ) -> ByteRows:
        if not self.has_attention:
            return ByteRows(batch)
        num_past = int(cache.get_seq_length()) if output_attentions and cache is not None else 0
        index = torch.arange(batch.num_bytes, device=like.device) + state.num_bytes[:, None]
        window = self.config.attention_window_bytes
        block = batch.num_bytes if output_attentions else min(batch.num_bytes, window)
        mask = window_mask(index if batch.positions is None else batch.positions, batch.remaining, window, block)
        rotary = rotary_embedding(index, self.config.head_dim, self.config.rope_theta, like.dtype)
        return ByteRows(batch, num_past, rotary, mask, output_attentions)

    @staticmethod
    def _advanced(
        state: PatchState, context: torch.Tensor, found: PatchEnds, visible: torch.Tensor, decoded, batch: STLMBatch
    ) -> PatchState:
        """`state` after pooling, with the remaining fields of the next state."""
        if batch.lengths is None:
            num_valid, last_ids = (
                batch.num_bytes,
                context[:, batch.num_bytes :].clone(memory_format=torch.contiguous_format),
            )
        else:
            num_valid, kept = batch.lengths, torch.arange(context.shape[1] - batch.num_bytes, device=context.device)
            last_ids = context.gather(1, num_valid[:, None] + kept)
        return state._replace(
            last_ids=last_ids,
            num_bytes=state.num_bytes + num_valid,
            rule_state=found.rule_state,
            visible=visible,
            last_output=batch.at_end(decoded, state.last_output.to(decoded.dtype)),
        )

    # Cache

    def _patch_slot(self, cache: Cache) -> STLMPatchStateSlot:
        return cache.layers[self.num_byte_layers]

    def _num_past(
        self, cache: Cache | None, attention_mask: torch.Tensor | None, input_ids: torch.Tensor
    ) -> int | None:
        """Positions in the cache; `None` where a graph must not know them, or if the mask leaves them out."""
        num_past = 0 if cache is None else cache.get_seq_length()
        if not isinstance(num_past, torch.Tensor):
            return num_past
        # With a static cache the mask may be that of the new bytes, as `create_masks_for_generate` makes it.
        if is_static(cache) or (attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1]):
            return None
        return int(num_past)

    def _check_cache(self, cache: Cache, input_ids: torch.Tensor) -> None:
        """Raise unless the cache was made for this model and these rows."""
        if not self.is_causal:
            raise ValueError("a model with is_causal=False has no cache: every byte changes what all others see")
        if not hasattr(cache, "layers"):
            raise ValueError(f"cache is a {type(cache).__name__}, expected a DynamicCache or a StaticCache")
        if self.training and torch.is_grad_enabled() and self.local_encoder[0].gradient_checkpointing:
            raise ValueError(
                "gradient checkpointing runs layers twice, which would write to the cache twice: train without a cache or "
                "without gradient checkpointing"
            )
        if not cache.layers:  # made without a config
            cache.layers.extend(DynamicCache(config=self.config).layers)
        is_known = len(cache.layers) == self.config.num_hidden_layers > self.num_byte_layers
        slot = self._patch_slot(cache) if is_known else None
        if slot is None or slot._layer_type != self.patch_slot_type or not slot.is_initialized:
            self._check_slots(cache)
            slot = self._patch_slot(cache)
        num_rows = input_ids.shape[0]  # `len` would fix it in an exported graph
        if slot.state is not None and slot.state[0].shape[0] != num_rows:
            raise ValueError(f"the cache holds {slot.state[0].shape[0]} rows, but the input has {num_rows}")
        if not is_static(cache):
            slot.check_room(input_ids.shape[1])

    def _check_slots(self, cache: Cache) -> None:
        kinds = [layer._layer_type for layer in cache.layers]
        if kinds != self.config.layer_types or len(kinds) <= self.num_byte_layers:
            raise ValueError(
                f"the cache has slots {kinds}, but this model needs {self.config.layer_types}: make it with "
                "DynamicCache(config=model.config). Keys and values from elsewhere (prefix tuning) do not fit patches: use "
                "prompt tuning or LoRA"
            )

    def _state_of(self, cache: Cache | None, num_rows: int) -> PatchState:
        """The state of the rows before this call."""
        if cache is None:
            return self.patcher.fresh_state(num_rows)
        slot = self._patch_slot(cache)
        if slot.is_cropped:
            self._recover(cache)
        state = self.patcher.fresh_state(num_rows) if slot.state is None else PatchState(*slot.state)
        if not slot.is_initialized:
            slot.lazy_initialization(state.visible)
        return state

    @torch.no_grad()
    def _recover(self, cache: Cache) -> None:
        """After a crop, the state of the bytes that are left."""
        slot = self._patch_slot(cache)
        if slot.recent is None:  # deeper than the recorded call: replay the history
            if int(cache.get_seq_length()) == 0:
                cache.reset()
                return
            if slot.history is None:
                raise ValueError("the last call was interrupted, and a static cache keeps no history: reset it")
            history = slot.history[:, : slot.seen_bytes].long()
            if (history == SOFT_ID).any():
                raise ValueError(
                    f"cannot run the {history.shape[1]} bytes that crop left again: some were embeddings of no byte "
                    "(soft prompts), which are not kept"
                )
            cache.reset()
            is_done = False
            try:
                self(history.clamp(min=0), attention_mask=(history != -1).long(), cache=cache)
                is_done = True
            finally:
                if not is_done:  # as before, to be replayed by the next call
                    cache.reset()
                    slot.append_history(history)
                    for layer in cache.layers:
                        layer.end_call(history.shape[1])
                    slot.forget()
            return
        state, (ids, hidden_states, seen, decoded) = PatchState(*slot.recent), slot.recent_bytes
        if ids.shape[1]:  # advance again over the bytes that are left
            batch = STLMBatch.of(ids, None, None, self.is_causal)
            context = torch.cat([state.last_ids, ids], dim=1)
            found = self.patcher.find_ends(hidden_states, context, batch, state)
            num_patches = int(found.ends.sum(1).max())
            _, state = pool_patches(hidden_states, found.ends, batch, state, num_patches)
            state = self._advanced(state, context, found, seen[:, -1], decoded, batch)
        slot.state, slot.is_cropped = tuple(state), False


class STLMForCausalLM(STLMPreTrainedModel, STLMGenerationMixin):
    """The model with a head that predicts the next byte.

    `generate` takes `valid_utf8=True`, or finds it in the generation config: text is well-formed UTF-8 then, whatever the
    logits are.

    Example:

    ```python
    >>> import torch
    >>> from modeling_stlm import STLMConfig, STLMForCausalLM
    >>> model = STLMForCausalLM(STLMConfig.from_preset("stlm-3m"))
    >>> model.generate(torch.tensor([list(b"Once")]), max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 8])

    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError("STLMForCausalLM needs a config with is_causal=True: next bytes must not be seen")
        self.model = STLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> STLMCausalLMOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): ids, shifted here; -100 is left out of the loss.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): logits of the last so many bytes only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.ratio_loss is not None:
                ratio_loss = share_of_batch(outputs.ratio_loss, labels[:, 1:] != -100, logits, **kwargs)
                loss = loss + self.config.ratio_loss_weight * ratio_loss
        return STLMCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_hidden_states=outputs.patch_hidden_states,
            patch_attentions=outputs.patch_attentions,
            boundaries=outputs.boundaries,
            ratio_loss=outputs.ratio_loss,
        )

    # `generate` looks at it in every step of a class from outside the library. Made once, it costs nothing then.
    forward.__signature__ = inspect.signature(forward)


def share_of_batch(
    loss: torch.Tensor, counted: torch.Tensor, logits: torch.Tensor, num_items_in_batch=None, **_
) -> torch.Tensor:
    """A mean over the `counted` labels (bool) of this call, as its share of the mean over `num_items_in_batch`.

    `Trainer` counts the latter, so gradient accumulation gives the gradient of the whole batch. A call without labels has
    no share.
    """
    if num_items_in_batch is None:
        return loss
    count = counted.sum()
    return torch.where(count > 0, loss * count, 0 * logits.float().sum()) / num_items_in_batch


__all__ = ["STLMCausalLMOutput", "STLMForCausalLM", "STLMModel", "STLMModelOutput", "STLMPreTrainedModel"]
