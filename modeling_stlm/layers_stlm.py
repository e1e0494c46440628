# SPDX-License-Identifier: Apache-2.0
"""The layers of both levels: attention, short convolutions and feed-forward layers.

Shapes: B rows, T bytes of this call, P patches, D byte width, G trunk width, H heads, K head width. R rows that completed
a patch, S patches that any of these may see.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.import_utils import is_torchdynamo_compiling, is_tracing

from .batching_stlm import STLMBatch
from .cache_stlm import TrunkRows
from .configuration_stlm import STLMConfig


SHORT_CALL_BYTES = 16  # up to which sums of products are faster on a CPU than the convolution of the library
BLOCK_QUERIES = 128  # of `blockwise_attention`
MAX_BLOCKWISE_PATCHES = 1024  # where it adds a quarter to the memory of a training step at most


class ByteRows(NamedTuple):
    """Per-call inputs shared by all byte layers."""

    batch: STLMBatch
    num_past: int = 0  # bytes before this call, padding included; for attention mixers that return weights
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # `rotary_embedding`, for attention mixers
    window_mask: torch.Tensor | None = None  # `window_mask`, for attention mixers
    output_attentions: bool = False


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


def is_visible(query: torch.Tensor, key: torch.Tensor, window: int | None, is_causal: bool) -> torch.Tensor:
    """Whether the patch of index `query` may see that of index `key`, which broadcast, as far as order and window go."""
    distance = query - key
    visible = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    return visible if window is None else visible & (distance.abs() < window)


def make_norm(config: STLMConfig, width: int) -> nn.Module:
    """LayerNorm with a scale and without a bias: one kernel on a CPU, where an RMSNorm takes several."""
    return nn.LayerNorm(width, eps=config.norm_eps, bias=False)


class OutputProjection(nn.Linear):
    """The last matrix of a residual block. It starts at zero, so that every block starts as the identity."""


def low_rank_matrices(block: nn.Module, rank: int) -> nn.ModuleDict:
    """By name, a matrix of low rank for every linear layer of a `block`, zero at the start."""
    return nn.ModuleDict(
        {
            name.rpartition(".")[2]: nn.Sequential(
                nn.Linear(linear.in_features, rank, bias=False),
                OutputProjection(rank, linear.out_features, bias=False),
            )
            for name, linear in block.named_modules()
            if isinstance(linear, nn.Linear)
        }
    )


def project(module: nn.Module, name: str, states: torch.Tensor, own: nn.ModuleDict | None) -> torch.Tensor:
    """The linear layer `name` of a module, plus the matrix of low rank that this pass has for it."""
    output = getattr(module, name)(states)
    return output if own is None else output + own[name](states)


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    is_causal: bool,
    scaling: float,
) -> torch.Tensor:
    """Attention (B, P, H * K) of `query (B, H, P, K)` to `key` and `value (B, J, P, K)`, J groups of heads, as plain products.

    For training in bfloat16 on a CPU, where the fused kernel (torch 2.13, AVX-512) takes two to four times as long, most of it
    in the backward pass. Causal queries come in blocks, which skip the keys after them. Scores and weights are rounded to
    the type of the values, as in eager attention. The weights are kept for it: B H P P, half of them in a causal model.

    Args:
        allowed (`torch.BoolTensor` of shape `(B, 1, P, P)`, *optional*): full, or causal with `is_causal`, if left out.
    """
    num_patches, bias = query.shape[2], None
    if allowed is None and is_causal:
        allowed = torch.ones(1, 1, num_patches, num_patches, dtype=torch.bool, device=query.device).tril()
    if allowed is not None:
        bias = torch.zeros(allowed.shape, dtype=value.dtype, device=value.device)
        bias = bias.masked_fill_(~allowed, torch.finfo(value.dtype).min)[:, :, None]
    # Under autocast they differ from the values.
    query = (query * scaling).to(value.dtype).unflatten(1, (key.shape[1], -1))  # (B, J, H / J, P, K)
    key_columns = key.to(value.dtype).mT
    outputs = []
    with torch.autocast("cpu", enabled=False):  # which takes a softmax in float32
        for start in range(0, num_patches, BLOCK_QUERIES):
            end = min(start + BLOCK_QUERIES, num_patches)
            seen = end if is_causal else num_patches
            queries = query[..., start:end, :]
            scores = (queries.flatten(2, 3) @ key_columns[..., :seen]).unflatten(2, queries.shape[2:4])
            if bias is not None:
                scores = scores + bias[..., start:end, :seen]
            output = scores.softmax(-1).flatten(2, 3) @ value[:, :, :seen]
            outputs.append(output.unflatten(2, queries.shape[2:4]))
    return torch.cat(outputs, dim=3).flatten(1, 2).transpose(1, 2).flatten(2)


def trains_in_bfloat16_on_cpu(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a backward pass may follow there; not in a graph, which would count blocks once and for all."""
    is_trained = query.requires_grad and torch.is_grad_enabled() and not is_tracing()
    return is_trained and value.device.type == "cpu" and value.dtype == torch.bfloat16


class STLMAttention(nn.Module):
    """Grouped-query attention with QK-norm: the projections of both levels, and `forward` of the trunk.

    Args:
        window (`int`, *optional*): W, bytes or patches that each sees, itself included; all earlier ones if left out.
    """

    def __init__(
        self,
        config: STLMConfig,
        width: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        window: int | None,
    ):
        super().__init__()
        self.config, self.is_causal, self.window = config, config.is_causal, window
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

    def project(
        self, hidden_states: torch.Tensor, rotary, own: nn.ModuleDict | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of shape (B, T, H, K), queries and keys normalised and rotated."""
        query, key, value = (
            project(self, name, hidden_states, own).unflatten(-1, (-1, self.head_dim))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = self.q_norm(query), self.k_norm(key)
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
        if implementation == "sdpa" and not probability and trains_in_bfloat16_on_cpu(query, value):
            # Not for dropout, which reentrant checkpointing would draw in another way, nor for windows of bytes.
            if query.shape[2] == key.shape[2] <= MAX_BLOCKWISE_PATCHES:
                return blockwise_attention(query, key, value, allowed, self.is_causal, self.scaling), None
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        if implementation != "sdpa":
            if allowed is None:
                allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
                allowed = (allowed.tril(key.shape[2] - query.shape[2]) if self.is_causal else allowed)[None, None]
            bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device)
            allowed = bias.masked_fill_(~allowed, torch.finfo(query.dtype).min)
        output, weights = attention(self, query, key, value, allowed, dropout=probability, scaling=self.scaling)
        return output.flatten(2), weights  # (B, T, H * K), (B, H, T, S)

    def _needs_window(self, num_queries: int, num_keys: int) -> bool:
        return num_keys > self.window or 1 < num_queries < num_keys

    def attend_in_window(self, query, key, value) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`attend` of `query (B, H, T, K)`, the last T of the S keys, within the window; without weights linear in T."""
        num_queries, num_keys = query.shape[2], key.shape[2]
        index = torch.arange(num_keys, device=query.device)
        if self.config._attn_implementation != "sdpa" or is_tracing():  # a graph would count blocks once and for all
            allowed = is_visible(index[num_keys - num_queries :, None], index, self.window, self.is_causal)
            return self.attend(query, key, value, allowed[None, None])
        outputs, num_after = [], 0 if self.is_causal else self.window - 1
        first = num_keys - num_queries
        for queries in query.split(self.window, dim=2):
            end = first + queries.shape[2]
            seen = slice(max(0, first + 1 - self.window), end + num_after)
            allowed = None
            if first > 0 or num_after:
                allowed = is_visible(index[first:end, None], index[seen], self.window, self.is_causal)[None, None]
            outputs.append(self.attend(queries, key[:, :, seen], value[:, :, seen], allowed)[0])
            first = end
        return torch.cat(outputs, dim=1), None

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        allowed: torch.Tensor | None,
        cache: Cache | None = None,
        slot: int = 0,
        where: TrunkRows | None = None,
        own: nn.ModuleDict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states (R, P, G)` of the rows that completed a patch, `allowed (R, 1, P, S)` or `None`: full, or causal
        in a causal model, within the window."""
        query, key, value = (states.transpose(1, 2) for states in self.project(hidden_states, rotary, own))
        if cache is not None:
            key, value = cache.update(key, value, slot, where=where)
        if allowed is None and self.window is not None and self._needs_window(query.shape[2], key.shape[2]):
            output, weights = self.attend_in_window(query, key, value)
        else:
            output, weights = self.attend(query, key, value, allowed)
        return project(self, "o_proj", output, own), weights


class STLMWindowAttention(STLMAttention):
    """Attention over the last W bytes (and the next W - 1), in blocks of S = min(T, W) queries: linear in T."""

    def __init__(self, config: STLMConfig):
        super().__init__(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.attention_window_bytes,
        )
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

    def forward(self, hidden_states: torch.Tensor, own: nn.ModuleDict | None = None) -> torch.Tensor:
        return project(self, "down_proj", self.activation(project(self, "up_proj", hidden_states, own)), own)


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
            config.trunk_window_patches,
        )
        self.dropout = config.hidden_dropout

    def forward(
        self, hidden_states: torch.Tensor, rotary, allowed, cache=None, slot=0, where=None, own=None
    ) -> torch.Tensor:
        output, _ = self.attention(self.attention_norm(hidden_states), rotary, allowed, cache, slot, where, own)
        return hidden_states + dropout(output, self.dropout, self.training)


class STLMTrunkFeedForwardBlock(GradientCheckpointingLayer):
    def __init__(self, config: STLMConfig):
        super().__init__()
        self.feed_forward_norm = make_norm(config, config.trunk_hidden_size)
        self.feed_forward = STLMFeedForward(
            config.trunk_hidden_size, config.trunk_intermediate_size, config.hidden_act
        )
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, own: nn.ModuleDict | None = None) -> torch.Tensor:
        output = self.feed_forward(self.feed_forward_norm(hidden_states), own)
        return hidden_states + dropout(output, self.dropout, self.training)
