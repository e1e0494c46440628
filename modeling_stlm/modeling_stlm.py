# SPDX-License-Identifier: Apache-2.0
"""STLM: a pooled byte-level transformer with a weight-tied trunk.

    bytes -> embed + hashed n-grams -> front layers --pool--> trunk (once a patch) --unpool--> + -> back layers -> head
                                           |                                                   |
                                           +-------------------- residual ---------------------+

Byte t sees the trunk output of the last patch that is complete at t (a learned start vector before the first), so
nothing leaks from later bytes, and the trunk runs only when a patch is complete.

Rows are made compact on entry: the valid bytes of each row are moved to the front, and moved back at the end. So left
padding, right padding and no padding run the same arithmetic, and every cache state is per row.

Shapes: B rows, T bytes of this call, P patches, D byte width, G trunk width, H heads, K head width, V vocabulary.
Reference: Super Tiny Language Models, arXiv:2405.14159; sources of the parts are named where they stand.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StopStringCriteria
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import PromptLookupCandidateGenerator
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.import_utils import is_torchdynamo_exporting, is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .budget_stlm import BudgetMixin
from .cache_stlm import STLMPoolCacheLayer
from .configuration_stlm import STLMConfig
from .generation_stlm import COUNT_THEIR_CALLS, RepeatCandidateGenerator, UTF8LogitsProcessor
from .patching_stlm import (
    HASH_PRIME,
    RULE_CONTEXT_BYTES,
    Boundaries,
    PatchIndex,
    PatchState,
    Rule,
    byte_events,
    byte_kinds,
    close_patches,
    find_boundaries,
    hash_weights,
    index_patches,
    kind_weights,
    pool_patches,
    prefix_edges,
    smooth_patches,
    step_boundary,
    step_table,
    sum_patches,
    unpool_patches,
    word_ends,
    word_so_far,
)


ENTROPY_STEPS = 32  # of the entropy table in a bit
FEW_BYTES = 16  # for which, on a CPU, a product of windows is faster than the convolution of the library
POOL_SCORE_CAP = 10.0
SOFT_ID = -2  # in the byte history: an embedding that stands for no id


class Rows(NamedTuple):
    """How the compact rows of one call lie. Everything is `None` where it would say nothing."""

    lengths: torch.Tensor | None  # (B,) valid bytes; None: all T
    positions: torch.Tensor | None  # (B, T) bytes since the document's start; None: one document a row
    ahead: torch.Tensor | None  # (B, T) bytes to the document's end; None: causal
    rotary: tuple[torch.Tensor, torch.Tensor] | None  # `rotary_embedding`, for attention mixers
    window_mask: torch.Tensor | None  # (B * blocks, 1, S, S + W - 1), for attention mixers (S + 2 W - 2 both ways)


class Layout(NamedTuple):
    """Valid bytes of each row (B,) and, unless they come first already, where each position goes (B, T) and back."""

    lengths: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None


class STLMOutput(ModelOutput):
    """An output whose fields are set without a look at all of them, which the library takes: microseconds a byte."""

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
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, hidden_size)`): after the final norm.
        past_key_values (`Cache`, *optional*): with `use_cache=True`.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): byte level, `(B, T, hidden_size)` for the embedding and
            each byte layer; with `output_hidden_states=True`.
        attentions (`tuple(torch.FloatTensor)`, *optional*): byte level, `(B, num_attention_heads, T, T)` for each
            `"attention"` mixer; with `output_attentions=True`. With a cache the last axis counts the bytes of the row.
        patch_hidden_states (`tuple(torch.FloatTensor)`, *optional*): `(B, P, trunk_hidden_size)` after each pass of the
            trunk; with `output_patch_hidden_states=True`. Only rows that completed a patch, when there is a cache.
        patch_attentions (`tuple(torch.FloatTensor)`, *optional*): `(B, trunk_num_attention_heads, P, P)` for each pass;
            with `output_patch_attentions=True`.
        boundaries (`torch.BoolTensor` of shape `(B, T)`, *optional*): where patches end; with `output_boundaries=True`.
        ratio_loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `patching="learned"`, in training: see [`STLMRouter`].
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    patch_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    patch_attentions: tuple[torch.FloatTensor, ...] | None = None
    boundaries: torch.BoolTensor | None = None
    ratio_loss: torch.FloatTensor | None = None


@dataclass
class STLMCausalLMOutput(STLMOutput):
    """
    Output of [`STLMForCausalLM`]: `loss` in nats a byte (in training with `patching="learned"` plus
    `ratio_loss_weight` times `ratio_loss`), `logits (B, T, vocab_size)`, and the rest as in [`STLMModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
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
    """`states (B, T, H, K)` turned in the planes of channels i and i + K / 2."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)


def make_norm(config: STLMConfig, width: int) -> nn.Module:
    """Norm with a scale and without a bias."""
    if config.norm_type == "rms_norm":
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=False)


class STLMAttention(nn.Module):
    """Grouped-query attention with QK-norm; the projections serve both levels, `forward` is that of the trunk."""

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
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)
        self.q_norm = make_norm(config, head_dim)
        self.k_norm = make_norm(config, head_dim)

    def project(self, hidden_states: torch.Tensor, rotary) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of shape (B, T, H, K), queries and keys normed and turned."""
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)))
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, self.head_dim)))
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_key_value_heads, self.head_dim))
        return rotate(query, *rotary), rotate(key, *rotary), value

    def attend(self, query, key, value, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `query (B, H, T, K)` where `allowed (B, 1, T, S)`; `None`: to all, or all earlier ones."""
        implementation = self.config._attn_implementation
        probability = self.config.attention_dropout if self.training else 0.0
        if implementation == "sdpa" and allowed is None and query.shape[2] == 1:
            # One query a head: heads that share keys are the queries of one product, which reads the keys once.
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
        past_key_values: Cache | None = None,
        cache_kwargs: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states (R, P, G)` of the rows that completed a patch, `allowed (R, 1, P, S)` or `None`: causal."""
        query, key, value = (states.transpose(1, 2) for states in self.project(hidden_states, rotary))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, **cache_kwargs)
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
        rows: Rows,
        past_key_values: Cache | None = None,
        slot: int = 0,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states (B, T, D)` of compact rows. Weights (B, H, T, past + T) if asked for: then in one block."""
        num_rows, num_bytes, _ = hidden_states.shape
        keep, num_past, allowed = self.window - 1, 0, rows.window_mask
        query, key, value = self.project(hidden_states, rows.rotary)
        if past_key_values is not None:
            num_past = int(past_key_values.layers[slot].get_seq_length()) if output_attentions else 0
            key, value = past_key_values.update(key, value, slot, keep=keep, lengths=rows.lengths)
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


def window_mask(positions: torch.Tensor, ahead: torch.Tensor | None, window: int, block: int) -> torch.Tensor:
    """Which of its keys each query of a block of S may see.

    Args:
        positions (`torch.LongTensor` of shape `(B, T)`): bytes since the document's start.
        ahead (`torch.LongTensor` of shape `(B, T)`, *optional*): bytes to the document's end; causal if left out.

    Returns:
        `torch.BoolTensor` of shape `(B * blocks, 1, S, S + W - 1)`, or `(B * blocks, 1, S, S + 2 W - 2)` with `ahead`.
    """
    num_after = 0 if ahead is None else window - 1
    query = torch.arange(block, device=positions.device)[:, None]
    distance = query + window - 1 - torch.arange(block + window - 1 + num_after, device=positions.device)

    def blocks(counts):  # (B, blocks, S, 1)
        return F.pad(counts, (0, -counts.shape[1] % block)).unflatten(1, (-1, block))[..., None]

    allowed = (distance > -1 - num_after) & (distance < window) & (distance <= blocks(positions))
    if ahead is not None:
        allowed = allowed & (-distance <= blocks(ahead))
    return allowed.flatten(0, 1)[:, None]


class STLMShortConv(nn.Module):
    """Gated short convolution over the last N bytes (LFM2), or over N bytes around each one."""

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.kernel_size, self.initializer_range = config.conv_kernel_size, config.initializer_range
        self.num_after = 0 if config.is_causal else (self.kernel_size - 1) // 2
        self.in_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.conv = nn.Conv1d(
            config.hidden_size, config.hidden_size, self.kernel_size, groups=config.hidden_size, bias=False
        )
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: torch.Tensor, rows: Rows, past_key_values: Cache | None = None, slot: int = 0
    ) -> torch.Tensor:
        num_bytes = hidden_states.shape[1]
        gate_in, gate_out, inputs = self.in_proj(hidden_states).chunk(3, dim=-1)
        inputs = gate_in * inputs
        keep = self.kernel_size - 1 - self.num_after
        if past_key_values is None:
            inputs = F.pad(inputs, (0, 0, keep, self.num_after))  # (B, N - 1 + T, D)
        else:
            inputs, _ = past_key_values.update(inputs, None, slot, keep=keep, lengths=rows.lengths)
        taps = self.conv.weight[:, 0].t()  # (N, D), oldest byte first
        if num_bytes == 1 and self.num_after == 0:
            output = (inputs * taps).sum(1, keepdim=True)
        elif self.num_after == 0 and rows.positions is None and not is_tracing() and num_bytes <= FEW_BYTES:
            output = (inputs.unfold(1, self.kernel_size, 1) * taps.t()).sum(-1)
        elif rows.positions is None and (self.num_after == 0 or rows.lengths is None):
            output = self.conv(inputs.transpose(1, 2)).transpose(1, 2)
        elif self.num_after == 0 and not is_tracing():
            output = self.conv(inputs.transpose(1, 2)).transpose(1, 2)
            output = self._stop_at_documents(output, inputs, taps, rows.positions)
        else:
            output = self._shifted_products(inputs, taps, rows, keep, num_bytes)
        return self.out_proj(gate_out * output)

    def _shifted_products(self, inputs, taps, rows: Rows, keep: int, num_bytes: int) -> torch.Tensor:
        """The convolution as a sum of shifted products, each of which stays inside the document."""
        output = inputs[:, keep : keep + num_bytes] * taps[keep]
        for offset in [*range(-keep, 0), *range(1, self.num_after + 1)]:
            tap, counts = taps[keep + offset], rows.positions if offset < 0 else rows.ahead
            if counts is not None:
                tap = tap * (counts >= abs(offset))[..., None]
            output = torch.addcmul(output, inputs[:, keep + offset : keep + offset + num_bytes], tap)
        return output

    def _stop_at_documents(self, output, inputs, taps, positions) -> torch.Tensor:
        """`output (B, T, D)`, with the few bytes that saw an earlier document computed again without it."""
        row, time = (positions < self.kernel_size - 1).nonzero(as_tuple=True)  # (n,)
        tap = torch.arange(self.kernel_size, device=time.device)  # (N,), oldest byte first
        seen = inputs[row[:, None], time[:, None] + tap]  # (n, N, D)
        inside = positions[row, time][:, None] >= self.kernel_size - 1 - tap  # (n, N)
        mended = (seen * taps * inside[..., None]).sum(1)
        return output.index_put((row, time), mended.to(output.dtype))  # they differ under autocast


def dropout(states: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
    return F.dropout(states, probability) if training and probability else states


class STLMFeedForward(nn.Module):
    def __init__(self, width: int, intermediate_size: int, activation: str):
        super().__init__()
        self.up_proj = nn.Linear(width, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, width, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden_states)))


class STLMRouter(nn.Module):
    """Learned ends of patches: dynamic chunking of H-Net (arXiv:2507.07955, section 2.2).

    A patch ends where a byte is unlike the byte before it. What the trunk says is smoothed over patches by how sure
    their ends are, and gradients reach the router through that and through a straight-through estimator. The ratio loss
    holds the average length near `patch_bytes`, which may change while training (`PatchLengthCurriculum`).
    """

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.patch_bytes = float(config.patch_bytes)

    def forward(
        self, hidden_states: torch.Tensor, before: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Probability (B, T), float32, that a patch ends at each byte of `hidden_states (B, T, D)`.

        `before (B, D)` is the byte before the first, zero or `None` where there is none. Without a byte before it, a
        byte has probability 0.5, which ends a patch.
        """
        before = torch.zeros_like(hidden_states[:, 0]) if before is None else before.to(hidden_states.dtype)
        previous = torch.cat([before[:, None], hidden_states[:, :-1]], dim=1)
        if positions is not None:
            previous = previous.masked_fill((positions == 0)[..., None], 0)
        query, key = self.q_proj(hidden_states).float(), self.k_proj(previous).float()
        return 0.5 - 0.5 * F.cosine_similarity(query, key, dim=-1)

    def shares(self, probability: torch.Tensor, ends: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """How much of each patch (B, P) is new: its probability, one for the first and for ends the router did not ask for."""
        share = probability.gather(1, ends)
        return share.masked_fill((share < 0.5) | first, 1)

    @staticmethod
    def straight_through(probability: torch.Tensor, boundary: torch.Tensor) -> torch.Tensor:
        """Ones (B, T, 1) with the gradient of how sure the router was of its decision."""
        confidence = torch.where(boundary, probability, 1 - probability)[..., None]
        return confidence + (1 - confidence).detach()

    def ratio_loss(self, probability: torch.Tensor, boundary: torch.Tensor, lengths: torch.Tensor | None):
        """One where one byte in `patch_bytes` ends a patch and the router is that sure on average (H-Net, eq. 10)."""
        valid = torch.ones_like(boundary)
        if lengths is not None:
            valid = torch.arange(boundary.shape[1], device=boundary.device) < lengths[:, None]
        share = (boundary & valid).sum() / valid.sum()
        mean, n = (probability * valid).sum() / valid.sum(), self.patch_bytes
        return n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean))


class STLMByteLayer(GradientCheckpointingLayer):
    """Mixer and feed-forward layer at the byte level. Its cost does not depend on the context."""

    def __init__(self, config: STLMConfig, slot: int):
        super().__init__()
        self.slot = slot
        self.mixer_norm = make_norm(config, config.hidden_size)
        self.mixer = STLMShortConv(config) if config.byte_mixers[slot] == "conv" else STLMWindowAttention(config)
        self.feed_forward_norm = make_norm(config, config.hidden_size)
        self.feed_forward = STLMFeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.dropout = config.hidden_dropout
        self.has_attention = config.byte_mixers[slot] == "attention"

    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: Rows,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
    ) -> torch.Tensor:
        mixed = self.mixer_norm(hidden_states)
        if self.has_attention:
            mixed, _ = self.mixer(mixed, rows, past_key_values, self.slot, output_attentions)
        else:
            mixed = self.mixer(mixed, rows, past_key_values, self.slot)
        hidden_states = hidden_states + dropout(mixed, self.dropout, self.training)
        output = self.feed_forward(self.feed_forward_norm(hidden_states))
        return hidden_states + dropout(output, self.dropout, self.training)


class STLMTrunkAttentionBlock(GradientCheckpointingLayer):
    def __init__(self, config: STLMConfig):
        super().__init__()
        self.norm = make_norm(config, config.trunk_hidden_size)
        self.attention = STLMAttention(
            config,
            config.trunk_hidden_size,
            config.trunk_num_attention_heads,
            config.trunk_num_key_value_heads,
            config.trunk_head_dim,
        )
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor, rotary, allowed, past_key_values=None, cache_kwargs=None):
        output, _ = self.attention(self.norm(hidden_states), rotary, allowed, past_key_values, cache_kwargs)
        return hidden_states + dropout(output, self.dropout, self.training)


class STLMTrunkFeedForwardBlock(GradientCheckpointingLayer):
    def __init__(self, config: STLMConfig):
        super().__init__()
        self.norm = make_norm(config, config.trunk_hidden_size)
        self.feed_forward = STLMFeedForward(
            config.trunk_hidden_size, config.trunk_intermediate_size, config.hidden_act
        )
        self.dropout = config.hidden_dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.feed_forward(self.norm(hidden_states))
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
        self.norm = make_norm(config, config.trunk_hidden_size)

    def forward(
        self,
        patches: torch.Tensor,
        allowed: torch.Tensor | None,
        index: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        where: dict | None = None,
    ) -> torch.Tensor:
        """
        Args:
            patches (`torch.Tensor` of shape `(R, P, G)`): new patches of some rows.
            allowed (`torch.BoolTensor` of shape `(R, 1, P, S)`, *optional*):
                Patches that each may see; all, or all earlier ones if causal, if left out.
            index (`torch.LongTensor` of shape `(R, P)`, *optional*): patches of the row before each; 0 to P - 1 if left out.
            past_key_values (`Cache`, *optional*): with slots for the passes.
            where (`dict`, *optional*): with a cache, where the new patches go: see [`STLMPatchCacheLayer.update`].
        """
        if index is None:
            index = torch.arange(patches.shape[1], device=patches.device)[None]
        rotary = rotary_embedding(index, self.head_dim, self.rope_theta, patches.dtype)
        # `assistant_early_exit` lowers the number of slots for a while: fewer passes run.
        passes = self.schedule[: max(0, self.config.num_hidden_layers - self.first_slot)]
        for i, (attention, feed_forward) in enumerate(passes):
            cache_kwargs = None if where is None else {"layer_idx": self.first_slot + i, **where}
            patches = self.attention_blocks[attention](
                patches, rotary, allowed, past_key_values=past_key_values, cache_kwargs=cache_kwargs
            )
            patches = self.feed_forward_blocks[feed_forward](patches)
        return self.norm(patches)


class STLMPreTrainedModel(PreTrainedModel, BudgetMixin):
    config: STLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["STLMByteLayer", "STLMTrunkAttentionBlock", "STLMTrunkFeedForwardBlock"]
    _skip_keys_device_placement = ["past_key_values"]
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
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, STLMModel):
            # From here, after their parts: of classes outside itself the library skips modules without own parameters.
            for part in module.modules():
                self._init_part(part)
            if module.start is not None:
                init.normal_(module.start, std=self.config.initializer_range)
            if module.patching == "entropy":
                init.zeros_(module.entropy_table)
            for name, table in module.tables(self.config).items():
                init.copy_(getattr(module, name), table)

    @staticmethod
    def _init_part(part: nn.Module):
        if isinstance(part, STLMShortConv):
            init.normal_(part.conv.weight, std=part.initializer_range)
            init.zeros_(part.out_proj.weight)
        elif isinstance(part, STLMAttention):
            init.zeros_(part.o_proj.weight)
        elif isinstance(part, STLMFeedForward):
            init.zeros_(part.down_proj.weight)
        elif isinstance(part, STLMRouter):
            init.eye_(part.q_proj.weight)
            init.eye_(part.k_proj.weight)
        elif isinstance(part, STLMModel) and part.pool_scores is not None:
            init.zeros_(part.pool_scores.weight)


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
        width, trunk_width = config.hidden_size, config.trunk_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        num_tables, size = len(config.ngram_lengths), config.ngram_embedding_size
        self.ngram_embed_tokens = self.ngram_proj = None
        if num_tables:
            self.ngram_embed_tokens = nn.Embedding(num_tables * config.ngram_rows, size or width)
        if num_tables and size:
            self.ngram_proj = nn.Linear(num_tables * size, width, bias=False)
        self.front_layers = nn.ModuleList(STLMByteLayer(config, i) for i in range(config.num_front_layers))
        self.pooling, self.num_pool_heads = config.patch_pooling, config.num_attention_heads
        # Scores of the bytes of a patch; they start at zero, which makes a mean.
        self.pool_scores = nn.Linear(width, self.num_pool_heads, bias=False) if self.pooling == "attention" else None
        num_pooled, self.num_pool_terms = {
            "mean": (width, width),
            "last": (width, 0),
            "mean_last": (2 * width, width),
            "attention": (width, width + self.num_pool_heads),
        }[self.pooling]
        self.pool_proj = nn.Linear(num_pooled, trunk_width, bias=False)
        self.trunk = STLMTrunk(config)
        self.unpool_proj = nn.Linear(trunk_width, width, bias=False)
        self.router = STLMRouter(config) if config.patching == "learned" else None
        # What bytes see before the first patch is complete.
        self.start = nn.Parameter(torch.empty(width)) if config.is_causal else None
        self.back_layers = nn.ModuleList(
            STLMByteLayer(config, i) for i in range(config.num_front_layers, config.num_byte_layers)
        )
        self.norm = make_norm(config, width)
        device = torch.empty(0).device
        # Loading builds models on the meta device, where arithmetic takes ten times as long.
        with torch.device("cpu"):
            tables = self.tables(config)
        for name, table in tables.items():
            self.register_buffer(name, table.to(device), persistent=False)
        if config.patching == "entropy":
            # Filled by `training/entropy_table.py`. Without, all that is not a special token is unsurprising.
            self.register_buffer("entropy_table", torch.zeros(config.entropy_rows, dtype=torch.uint8))
        # Copies: reading a field of a config costs microseconds, and a byte must not cost many.
        self.num_byte_layers, self.has_attention = config.num_byte_layers, "attention" in config.byte_mixers
        self.num_context = max([RULE_CONTEXT_BYTES, config.entropy_order - 1, *config.ngram_lengths])
        self.pool_sizes = (self.num_context, self.num_pool_terms, width if self.router is not None else 0)
        self.ngram_rows, self.has_words = config.ngram_rows, config.ngram_word_bytes > 0
        self.is_causal = config.is_causal
        self.patching, self.entropy_steps = config.patching, ENTROPY_STEPS * config.entropy_threshold
        self.rule_options = self._rule_options(config)
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def _rule_options(config: STLMConfig) -> tuple[bool, int, int]:
        """`spaces_end_patches`, `cap_bytes` and `cap_characters` of the `Rule`."""
        cap_bytes = config.patch_bytes if config.patching == "fixed" else config.max_patch_bytes
        return config.patching == "spacelike", cap_bytes, config.max_patch_characters

    @staticmethod
    def tables(config: STLMConfig) -> dict[str, torch.Tensor]:
        """Constant buffers. They are not saved; loading fills them again."""
        lengths = config.ngram_lengths
        longest = max(lengths, default=0)
        weights = [[0] * (longest - n) + hash_weights(n) for n in lengths]  # columns: oldest byte first
        rules = {}
        if config.patching == "vocabulary":
            rules["piece_edges"] = prefix_edges(config.pieces, config.max_patch_bytes - 1)
        else:
            rules["step_table"] = step_table(*STLMModel._rule_options(config))
        if config.patching == "entropy":
            rules["entropy_weights"] = torch.tensor(hash_weights(config.entropy_order))
        return rules | {
            "byte_kinds": byte_kinds(),
            "byte_events": byte_events(),
            "word_ends": word_ends(),
            "kind_weights": kind_weights(),
            "ngram_weights": torch.tensor(weights, dtype=torch.long).reshape(len(lengths), longest),
            "ngram_offsets": torch.arange(len(lengths)) * config.ngram_rows,
        }

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
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
                do not go on by one. Packed rows cannot have padding.
            past_key_values (`Cache`, *optional*): a `DynamicCache`; filled in place.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*):
                Instead of `input_ids`. Rows that equal a byte's embedding count as that byte for patching and
                n-grams, all others as a byte that is not there.

        Raises:
            ValueError: if a shape does not fit, or if the cache was not made for this model.
        """
        input_ids = self._checked_ids(input_ids, inputs_embeds)
        traced = self._is_traced(past_key_values)
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if isinstance(num_past, torch.Tensor):
            num_past = None if traced else int(num_past)
            if num_past and attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1]:
                num_past = None  # the mask of the new bytes, as `create_masks_for_generate` makes it
        layout = _layout(attention_mask, num_past, input_ids, traced)
        positions = None
        if position_ids is not None and num_past == 0 and not (traced and past_key_values is not None):
            positions = _packed_positions(position_ids, input_ids, layout, traced)
        if positions is not None and past_key_values is not None:
            raise ValueError(
                "a cache cannot hold packed documents (position_ids that restart): pass one document a row"
            )
        if past_key_values is not None and not self.is_causal:
            raise ValueError("a model with is_causal=False has no cache: every byte changes what all others see")
        if past_key_values is None and positions is None and self.is_causal and not self.training:
            if self.config.use_cache if use_cache is None else use_cache:
                past_key_values = DynamicCache(config=self.config)

        lengths, fed_ids = None, input_ids
        if layout is not None:
            lengths = layout.lengths
            fed_ids = input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, -1)
            if layout.order is not None:
                input_ids = input_ids.gather(1, layout.order)
                inputs_embeds = None if inputs_embeds is None else _gather_bytes(inputs_embeds, layout.order)
        if past_key_values is not None:
            self._prepare_cache(past_key_values, input_ids)

        outputs = self._forward_rows(
            input_ids, inputs_embeds, lengths, positions, past_key_values, **(kwargs | {"return_dict": True})
        )
        if past_key_values is not None:
            for layer in past_key_values.layers[: self.num_byte_layers]:
                layer.count_bytes(fed_ids.shape[1])
            self._pool_slot(past_key_values).append_history(fed_ids)
            outputs.past_key_values = past_key_values
        if layout is not None and layout.inverse is not None:
            _restore(outputs, layout.inverse)
        return outputs

    @capture_outputs
    def _forward_rows(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None,
        lengths: torch.LongTensor | None,
        positions: torch.LongTensor | None,
        past_key_values: Cache | None,
        output_attentions: bool | None = None,
        output_boundaries: bool = False,
        **kwargs,
    ) -> STLMModelOutput:
        """The model on compact rows: `lengths (B,)` valid bytes each, then padding."""
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        pool = None if past_key_values is None else self._pool_slot(past_key_values)
        context = self._with_context(input_ids if inputs_embeds is None else input_ids.clamp(min=-1), pool)
        num_bytes = input_ids.shape[1]
        rows = self._rows(num_bytes, lengths, positions, pool, input_ids, inputs_embeds, output_attentions)
        hidden_states = self._embed(context, input_ids, inputs_embeds, positions)  # (B, T, D)
        for layer in self.front_layers:
            hidden_states = layer(
                hidden_states, rows, past_key_values=past_key_values, output_attentions=output_attentions
            )
        ratio_loss = None
        if pool is None:
            visible, boundary, ratio_loss = self._see_patches(hidden_states, context, rows)
        elif num_bytes == 1 and lengths is None:
            visible, boundary = self._see_patches_of_one_byte(hidden_states, context, past_key_values)
        else:
            visible, boundary = self._see_patches_with_cache(hidden_states, context, lengths, past_key_values)
        hidden_states = hidden_states + visible
        for layer in self.back_layers:
            hidden_states = layer(
                hidden_states, rows, past_key_values=past_key_values, output_attentions=output_attentions
            )
        return STLMModelOutput(
            last_hidden_state=self.norm(hidden_states),
            boundaries=boundary if output_boundaries else None,
            ratio_loss=ratio_loss,
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

    @torch.no_grad()
    def _ids_of(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) whose embeddings were passed; `SOFT_ID` where an embedding is not that of any id.

        Equality alone counts. Distances would not do: rows of a resized table lie closer together than they are precise.
        """
        # Called and not read, so that an adapter of the embedding takes part.
        table = self.embed_tokens(torch.arange(self.embed_tokens.weight.shape[0], device=inputs_embeds.device))
        some = slice(0, 4)  # numbers that tell ids apart, without a difference of shape (B, T, V, D)
        ids = (inputs_embeds[..., None, some] == table[:, some]).all(-1).int().argmax(-1)
        return ids.masked_fill((table[ids] != inputs_embeds).any(-1), SOFT_ID)

    def _with_context(self, input_ids: torch.Tensor, pool) -> torch.Tensor:
        """Ids with the C ids before them in front, -1 where there is none: (B, C + T)."""
        if pool is not None:
            return torch.cat([pool.context, input_ids], dim=1)
        return F.pad(input_ids, (self.num_context, 0), value=-1)

    def _embed(self, context, input_ids, inputs_embeds, positions) -> torch.Tensor:
        """Byte embedding plus the embeddings of the hashed n-grams that end at each byte: (B, T, D)."""
        try:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        except IndexError as error:
            low, high, size = int(input_ids.min()), int(input_ids.max()), self.embed_tokens.num_embeddings
            raise ValueError(f"input_ids are between {low} and {high}, expected 0 to {size - 1}") from error
        if self.ngram_embed_tokens is None:
            return hidden_states
        longest = self.ngram_weights.shape[1]
        context = context[:, context.shape[1] - input_ids.shape[1] - longest :]
        # (B, T, n): the bytes of each n-gram, oldest first, none before a document's start.
        grams = context[:, 1:].unfold(1, longest, 1) + 1
        if positions is not None:
            back = torch.arange(longest - 1, -1, -1, device=positions.device)
            grams = grams.masked_fill(positions[..., None] < back, 0)
        terms = grams[:, :, None] * self.ngram_weights  # (B, T, tables, n)
        if self.has_words:  # the last table
            terms[:, :, -1] *= word_so_far(self.byte_kinds, self.word_ends, context, longest, positions)
        # ExecuTorch sums integers in float32, so exported graphs add them up in pairs.
        digest = (_sum_by_pairs(terms) if is_torchdynamo_exporting() else terms.sum(-1)) % HASH_PRIME
        ngrams = self.ngram_embed_tokens(digest % self.ngram_rows + self.ngram_offsets)  # (B, T, tables, size)
        return hidden_states + (ngrams.sum(-2) if self.ngram_proj is None else self.ngram_proj(ngrams.flatten(-2)))

    def _rule(self) -> Rule:
        tables = self.byte_kinds, self.byte_events, self.kind_weights
        if self.patching == "vocabulary":
            return Rule(*tables, None, *self.rule_options, edges=self.piece_edges)
        if self.patching == "entropy":
            surprise = self.entropy_table, self.entropy_steps, self.entropy_weights
            return Rule(*tables, self.step_table, *self.rule_options, None, *surprise)
        return Rule(*tables, self.step_table, *self.rule_options)

    def _pool_terms(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What is summed over the bytes of a patch: `hidden_states (..., D)` to (..., S)."""
        if self.pooling == "last":
            return hidden_states[..., :0]
        if self.pooling != "attention":
            return hidden_states
        # Capped scores need no running maximum: a sum can be continued byte by byte.
        scores = POOL_SCORE_CAP * torch.tanh(self.pool_scores(hidden_states).float() / POOL_SCORE_CAP)
        weights = scores.exp()  # (..., H)
        weighted = hidden_states.unflatten(-1, (self.num_pool_heads, -1)) * weights[..., None]
        return torch.cat([weighted.flatten(-2), weights], dim=-1)

    def _pooled(self, sums: torch.Tensor, num_bytes: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Patches (..., G) before the trunk, from their sums (..., S), numbers of bytes (...) and last bytes (..., D)."""
        if self.pooling == "attention":
            weighted, weights = sums[..., : last.shape[-1]], sums[..., last.shape[-1] :]
            mean = weighted.unflatten(-1, (self.num_pool_heads, -1)) / weights.clamp(min=1e-6)[..., None]
            return self.pool_proj(mean.flatten(-2).to(last.dtype))
        if self.pooling == "last":
            return self.pool_proj(last)
        mean = (sums / num_bytes.clamp(min=1)[..., None]).to(last.dtype)
        return self.pool_proj(mean if self.pooling == "mean" else torch.cat([mean, last], dim=-1))

    def _rows(self, num_bytes, lengths, positions, pool, input_ids, like, output_attentions=False) -> Rows:
        ahead = None if self.is_causal else _bytes_ahead(input_ids, lengths, positions)
        if not self.has_attention:
            return Rows(lengths, positions, ahead, None, None)
        dtype = self.embed_tokens.weight.dtype if like is None else like.dtype
        index = torch.arange(num_bytes, device=input_ids.device).expand_as(input_ids)
        if pool is not None:
            index = index + pool.num_bytes[:, None]
        window = self.config.attention_window_bytes
        block = num_bytes if output_attentions else min(num_bytes, window)
        mask = window_mask(index if positions is None else positions, ahead, window, block)
        rotary = rotary_embedding(index, self.config.head_dim, self.config.rope_theta, dtype)
        return Rows(lengths, positions, ahead, rotary, mask)

    # Patches: from the front output of the bytes (B, T, D) to what each byte sees of the trunk (B, T, D)

    def _see_patches(self, hidden_states, context, rows: Rows):
        """Without a cache. Also returns the ratio loss of a router in training."""
        lengths, positions = rows.lengths, rows.positions
        zero = torch.zeros_like(context[:, 0])
        state, num_bytes = PatchState(zero, zero), hidden_states.shape[1]
        if not self.is_causal and self.config.mask_token_id is not None:
            context = context.masked_fill(context == self.config.mask_token_id, ord("a"))
        probability = routed = ratio_loss = None
        if self.router is not None:
            probability = self.router(hidden_states, None, positions)
            routed = probability >= 0.5
        found = find_boundaries(self._rule(), context, num_bytes, state, lengths, positions, routed)
        if self.router is not None and self.training:
            ratio_loss = self.router.ratio_loss(probability, found.boundary, lengths)
        if not self.is_causal:
            found = close_patches(found, rows.ahead, lengths)
        index = index_patches(found, num_bytes if self._is_traced() else None)
        # Patches past a row's count come last: they are causally invisible. The trunk runs even if no row completed a
        # patch, so that every rank of a distributed training runs, and synchronises, the same modules.
        allowed = self._allowed_patches(index, positions)
        sums, last = pool_patches(hidden_states, self._pool_terms(hidden_states), index)
        patches = self.unpool_proj(self.trunk(self._pooled(sums, index.num_bytes, last), allowed))
        if self.router is not None:
            first = torch.zeros_like(index.ends, dtype=torch.bool)
            first[:, 0] = True
            if positions is not None:
                document = index.ends - positions.gather(1, index.ends)
                first[:, 1:] |= document[:, 1:] != document[:, :-1]
            patches = smooth_patches(patches, self.router.shares(probability, index.ends, first))
        if self.is_causal:
            patch_seen = found.boundary.cumsum(1) - 1  # (B, T)
            if positions is not None:
                patch_seen = patch_seen.masked_fill(_no_patch_yet(found.boundary, positions), -1)
            visible = unpool_patches(patches, patch_seen, self.start)
        else:
            # Padding sees the row's last patch, so that nothing in a row depends on the other rows.
            own = index.patch_of.minimum((index.counts - 1).clamp(min=0)[:, None])
            visible = unpool_patches(patches, own)
        if probability is not None and torch.is_grad_enabled():
            visible = visible * self.router.straight_through(probability, found.boundary).to(visible.dtype)
        return visible, found.boundary, ratio_loss

    def _allowed_patches(self, index: PatchIndex, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Which patches each patch may see (B, 1, P, P); `None` if the trunk needs no mask."""
        num_patches = index.ends.shape[1]
        patch = torch.arange(num_patches, device=index.ends.device)
        if self.is_causal:
            if positions is None:
                return None
            allowed = (patch <= patch[:, None])[None]
        else:
            if positions is None and not self._is_traced() and (index.counts == num_patches).all():
                return None
            # A patch past the count sees itself, so that its softmax is over something.
            allowed = (patch < index.counts[:, None])[:, None] | (patch == patch[:, None])
        if positions is not None:
            document = index.ends - positions.gather(1, index.ends)  # (B, P) first byte of the patch's document
            allowed = allowed & (document[:, :, None] == document[:, None, :])
        return allowed[:, None]

    def _see_patches_with_cache(self, hidden_states, context, lengths, past_key_values):
        """Any number of bytes after those in the cache."""
        pool, num_bytes = self._pool_slot(past_key_values), hidden_states.shape[1]
        state = PatchState(pool.open_bytes, pool.memory)
        probability, routed = self._route(pool, hidden_states, lengths)
        found = find_boundaries(self._rule(), context, num_bytes, state, lengths, routed=routed)
        traced = self._is_traced(past_key_values)
        rows = None if traced else _some_rows(found.boundary.any(1))
        terms = self._pool_terms(hidden_states)
        self._record(pool, context, terms, lengths)
        if rows is None or len(rows):
            index = index_patches(found, num_bytes if traced else None)
            sums, last = pool_patches(hidden_states, terms, index, pool.keys)
            pooled = self._pooled(*_of_rows(rows, sums, index.num_bytes, last))
            self._append_patches(past_key_values, pooled, rows, self._shares(pool, probability, index.ends, rows))
        visible = self._count_patches(pool, found, terms, lengths)
        self._note_bytes(pool, context, lengths)
        return visible, found.boundary

    def _count_patches(
        self, pool, found: Boundaries, terms: torch.Tensor, lengths: torch.Tensor | None
    ) -> torch.Tensor:
        """Bring the small states behind bytes whose patches are stored; what these bytes see (B, T, D)."""
        ended = found.boundary.cumsum(1)
        visible = self._look_up(pool, pool.num_patches[:, None] + ended - 1)
        counts = ended[:, -1]
        is_open = (ended == counts[:, None]) & ~found.boundary
        if lengths is not None:
            is_open = is_open & (torch.arange(terms.shape[1], device=is_open.device) < lengths[:, None])
        pool.keys = sum_patches(terms, (~is_open).long(), 1)[:, 0] + pool.keys * (counts == 0)[:, None]
        pool.num_patches = pool.num_patches + counts
        pool.open_bytes, pool.memory = found.state
        return visible

    def _see_patches_of_one_byte(self, hidden_states, context, past_key_values):
        """One byte in every row: the step of generation, in as few operations as will do."""
        pool = self._pool_slot(past_key_values)
        probability, routed = self._route(pool, hidden_states, None)
        state = PatchState(pool.open_bytes, pool.memory)
        boundary, state = step_boundary(self._rule(), context, state, None if routed is None else routed[:, 0])
        last = hidden_states[:, 0]
        terms = self._pool_terms(last)
        self._record(pool, context, terms[:, None], None)
        sums = pool.keys + terms
        rows = None if self._is_traced(past_key_values) else _some_rows(boundary)
        if rows is None or len(rows):
            pooled = self._pooled(*_of_rows(rows, sums, pool.open_bytes + 1, last))[:, None]
            shares = self._shares(pool, probability, torch.zeros_like(pool.num_bytes)[:, None], rows)
            patches = self._append_patches(past_key_values, pooled, rows, shares)[:, 0].to(pool.visible.dtype)
            if rows is None:
                pool.visible = torch.where(boundary[:, None], patches, pool.visible)
            else:
                pool.visible = pool.visible.index_copy(0, rows, patches)
            pool.num_patches = pool.num_patches + boundary
            sums = sums.masked_fill(boundary[:, None], 0)
        pool.keys = sums
        pool.open_bytes, pool.memory = state
        pool.context = context[:, 1:].clone() if pool.is_compileable else context[:, 1:]
        pool.num_bytes = pool.num_bytes + 1
        return pool.visible[:, None], boundary[:, None]

    def _route(self, pool, hidden_states: torch.Tensor, lengths: torch.Tensor | None):
        """With a cache: probabilities (B, T) of a router and where it ends patches, `None` without a router."""
        if self.router is None:
            return None, None
        probability = self.router(hidden_states, pool.routed, None)
        last = hidden_states[:, -1]
        if lengths is not None:
            both = torch.cat([pool.routed.to(hidden_states.dtype)[:, None], hidden_states], dim=1)
            last = both.take_along_dim(lengths[:, None, None], 1)[:, 0]
        pool.routed = last.clone()
        return probability, probability >= 0.5

    def _shares(
        self, pool, probability: torch.Tensor | None, ends: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor | None:
        """With a cache: how much of each patch (R, P) of `rows` that ends at `ends (B, P)` is new."""
        if probability is None:
            return None
        is_first = (torch.arange(ends.shape[1], device=ends.device) == 0) & (pool.num_patches == 0)[:, None]
        return _of_rows(rows, self.router.shares(probability, ends, is_first))[0]

    def _append_patches(
        self, past_key_values: Cache, pooled: torch.Tensor, rows: torch.Tensor | None, shares: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the trunk on the new patches `pooled (R, P, G)` of `rows (R,)` (`None`: all), and store them: (R, P, D).

        Entries past what a row completed are stored too: the row's next patches go over them, and nobody reads them
        before. `shares (R, P)` are those of a router.
        """
        pool, num_new = self._pool_slot(past_key_values), pooled.shape[1]
        num_rows = pool.num_patches.shape[0]
        (start,) = _of_rows(rows, pool.num_patches)
        new = start[:, None] + torch.arange(num_new, device=start.device)  # (R, P)
        if self._is_traced(past_key_values):  # all rows, and sizes that follow from shapes
            at, end, needs_mask = new, pool.patch_room(num_new), True
        else:
            first, last = int(start.min()), int(start.max())
            end, needs_mask = last + num_new, last > 0 and (num_new > 1 or first != last)
            at = slice(first, end) if rows is None and first == last else new
        allowed = None
        if needs_mask:
            allowed = (torch.arange(end, device=start.device) <= new[..., None])[:, None]
        where = {"rows": rows, "at": at, "end": end}
        patches = self.trunk(pooled, allowed, new, past_key_values, {"num_rows": num_rows, **where})
        patches = self.unpool_proj(patches)
        if shares is not None:
            patches = smooth_patches(patches, shares, *_of_rows(rows, pool.visible))
        past_key_values.update(pool.keys, patches, self.num_byte_layers, **where)
        return patches

    def _look_up(self, pool, patch_seen: torch.Tensor) -> torch.Tensor:
        """What bytes that see the stored patches `patch_seen (B, T)` see; also notes the last of them."""
        patches = (
            pool.values if pool.values.shape[1] else pool.values.new_zeros(patch_seen.shape[0], 1, len(self.start))
        )
        visible = unpool_patches(patches, patch_seen, self.start)
        pool.visible = visible[:, -1].clone()  # no view: it would keep all of `visible` in memory
        return visible

    # Cache

    def _is_traced(self, past_key_values: Cache | None = None) -> bool:
        """Whether sizes must follow from shapes alone, at the price of room for a patch a byte.

        So it is in exported graphs, and in compiled ones with a static cache. Other compiled graphs break where a size
        depends on the text.
        """
        if is_torchdynamo_exporting():
            return True
        return past_key_values is not None and past_key_values.is_compileable and is_tracing()

    def _pool_slot(self, past_key_values: Cache) -> STLMPoolCacheLayer:
        return past_key_values.layers[self.num_byte_layers]

    def _prepare_cache(self, past_key_values: Cache, input_ids: torch.Tensor) -> None:
        """Check that the cache is one of ours and fits, start it if it is new, and mend it after a crop."""
        layers = past_key_values.layers
        if not layers and past_key_values.layer_class_to_replicate is not None:
            # A cache made without a config learns its slots here.
            layers.extend(DynamicCache(config=self.config).layers)
            past_key_values.layer_class_to_replicate = None
        fits = self.num_byte_layers < len(layers) == self.config.num_hidden_layers
        pool = layers[self.num_byte_layers] if fits else None
        if pool is None or pool._layer_type != "stlm_pool" or not pool.is_initialized:
            kinds = [layer._layer_type for layer in layers]
            if kinds != self.config.layer_types or len(kinds) <= self.num_byte_layers:
                raise ValueError(
                    f"past_key_values has slots {kinds}, but this model needs {self.config.layer_types}: "
                    "make it with DynamicCache(config=model.config)"
                )
            pool.start(input_ids.shape[0], self.pool_sizes, self.start)
        if pool.num_patches.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"past_key_values holds {pool.num_patches.shape[0]} rows, but the input has {input_ids.shape[0]}"
            )
        if not self._is_traced(past_key_values):
            pool.check_room(input_ids.shape[1])
        if pool.is_stale or (pool.is_rewound and any(layer.keys is None for layer in layers[: self.num_byte_layers])):
            self._replay(past_key_values)
        elif pool.is_rewound:
            self._rewind(pool)

    def _note_bytes(self, pool, context: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Keep the last ids of each row and count its bytes; `context (B, C + T)` ends with the ids of this call."""
        num_context = pool.context.shape[1]
        num_bytes = context.shape[1] - num_context
        if lengths is None:
            pool.context = context[:, num_bytes:].clone()
            pool.num_bytes = pool.num_bytes + num_bytes
        else:
            pool.context = context.gather(1, lengths[:, None] + torch.arange(num_context, device=context.device))
            pool.num_bytes = pool.num_bytes + lengths

    def _record(self, pool, context: torch.Tensor, terms: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Keep what `_rewind` needs. Not what a router needs, and not of padded rows: those are replayed."""
        if pool.record_past:
            pool.record(context, terms, lengths is None and self.router is None)

    @torch.no_grad()
    def _rewind(self, pool) -> None:
        """After a crop of bytes of the last call: the small states behind those of its bytes that are left."""
        context, terms = pool.rewind()
        num_bytes = terms.shape[1]
        if num_bytes:
            found = find_boundaries(self._rule(), context, num_bytes, PatchState(pool.open_bytes, pool.memory))
            self._count_patches(pool, found, terms, None)
            self._note_bytes(pool, context, None)
        else:
            self._look_up(pool, pool.num_patches[:, None] - 1)
            pool.context = context.clone()

    @torch.no_grad()
    def _replay(self, past_key_values: Cache) -> None:
        """After a crop: make the small states again from the byte history.

        Patch counts and rule state follow from the ids alone, unless a router makes them: then all bytes are run again.
        The inputs that byte layers keep depend on a bounded number of bytes, which are run again; what the trunk said of
        the patches they see is still stored.
        """
        pool, config = self._pool_slot(past_key_values), self.config
        history = pool.history[:, : pool.seen_bytes].long()
        for layer in past_key_values.layers[: self.num_byte_layers]:
            layer.keys = layer.values = None
        pool.clear(self.pool_sizes, self.start)
        if history.shape[1] == 0:
            return
        layout = _layout((history != -1).long(), 0, history)
        ids, lengths = history, history.new_full((len(history),), history.shape[1])
        if layout is not None:
            ids = history if layout.order is None else history.gather(1, layout.order)
            lengths = layout.lengths
        state, whole = PatchState(pool.open_bytes, pool.memory), self._with_context(ids.clamp(min=-1), pool)

        # The last bytes of each row, enough for the front layers to be exact on the open patch and on all that the
        # back layers look at.
        reach = [
            config.conv_kernel_size - 1 if mixer == "conv" else config.attention_window_bytes - 1
            for mixer in config.byte_mixers
        ]
        front, back = sum(reach[: config.num_front_layers]), sum(reach[config.num_front_layers :])
        num_replayed = min(ids.shape[1], front + max(back, self._rule().cap_bytes))
        if self.router is not None:
            num_replayed = ids.shape[1]
        first = (lengths - num_replayed).clamp(min=0)  # (B,)
        at = first[:, None] + torch.arange(num_replayed, device=ids.device)  # (B, R)
        before = at[:, :1] - torch.arange(self.num_context, 0, -1, device=ids.device)  # (B, C)
        pool.context = ids.gather(1, before.clamp(min=0)).masked_fill(before < 0, -1)
        pool.num_bytes = first
        whole_lengths, lengths = lengths, lengths - first
        valid = torch.arange(num_replayed, device=ids.device) < lengths[:, None]
        at = at.clamp(max=ids.shape[1] - 1)
        replayed = ids.gather(1, at)
        if (replayed.masked_fill(~valid, 0) == SOFT_ID).any():
            raise ValueError(
                f"cannot crop the cache to within {num_replayed} bytes of embeddings that stand for no byte "
                "(soft prompts): they are not kept"
            )
        context = self._with_context(replayed.clamp(min=-1), pool)
        rows = self._rows(num_replayed, lengths, None, pool, replayed, None)
        hidden_states = self._embed(context, replayed.clamp(min=0), None, None)
        for layer in self.front_layers:
            hidden_states = layer(hidden_states, rows, past_key_values=past_key_values)
        _, routed = self._route(pool, hidden_states, lengths)
        found = find_boundaries(self._rule(), whole, ids.shape[1], state, whole_lengths, routed=routed)
        boundary = found.boundary
        ended = boundary.cumsum(1)  # (B, T)
        # Open bytes are those after the last boundary of the whole row.
        is_open = valid & (ended.gather(1, at) == ended[:, -1:]) & ~boundary.gather(1, at)
        pool.keys = sum_patches(self._pool_terms(hidden_states), (~is_open).long(), 1)[:, 0]
        hidden_states = hidden_states + self._look_up(pool, ended.gather(1, at) - 1)
        for layer in self.back_layers:
            hidden_states = layer(hidden_states, rows, past_key_values=past_key_values)
        pool.num_patches = ended[:, -1]
        pool.open_bytes, pool.memory = found.state
        self._note_bytes(pool, context, lengths)


def _sum_by_pairs(terms: torch.Tensor) -> torch.Tensor:
    """`terms.sum(-1)` by additions alone."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        rest = terms[..., 2 * half :]
        terms = terms[..., :half] + terms[..., half : 2 * half]
        if rest.shape[-1]:
            terms = torch.cat([terms, rest], dim=-1)
    return terms[..., 0]


def _some_rows(flags: torch.Tensor) -> torch.Tensor | None:
    """Rows (R,) whose flag (B,) is not zero; `None` for all of them."""
    rows = flags.nonzero()[:, 0]
    return None if len(rows) == len(flags) else rows


def _of_rows(rows: torch.Tensor | None, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`states` (B, ...) of `rows` (R,); of all for `None`."""
    # `states[rows]` takes three times as long on a CPU.
    return states if rows is None else tuple(state.index_select(0, rows) for state in states)


def _gather_bytes(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states (B, T, D)` at the bytes `index (B, T)`."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def _layout(
    attention_mask: torch.Tensor | None, num_past: int | None, input_ids: torch.Tensor, traced: bool = False
) -> Layout | None:
    """How to make rows compact; `None` if nothing of this call is padding.

    With a static cache the mask may be that of the new bytes alone; `num_past` is `None` then.
    """
    if attention_mask is None:
        return None
    num_rows, num_bytes = input_ids.shape
    num_past = num_past or 0
    if attention_mask.shape != (num_rows, num_past + num_bytes):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(num_rows, num_past + num_bytes)}: "
            f"one value for each of {num_past} cached and {num_bytes} new bytes of {num_rows} rows. "
            "Masks with more axes have no meaning for patches"
        )
    valid = attention_mask[:, num_past:] != 0
    if not traced and valid.all():
        return None
    lengths = valid.sum(1)
    if not traced and (valid[:, 1:] <= valid[:, :-1]).all():
        return Layout(lengths, None, None)
    inverse = torch.where(valid, valid.cumsum(1) - 1, lengths[:, None] + (~valid).cumsum(1) - 1)
    time = torch.arange(num_bytes, device=valid.device).expand_as(inverse)
    return Layout(lengths, torch.zeros_like(inverse).scatter(1, inverse, time), inverse)


def _restore(outputs: STLMModelOutput, inverse: torch.Tensor) -> None:
    """Move every byte-level output back to where its byte was in the input."""
    outputs.last_hidden_state = _gather_bytes(outputs.last_hidden_state, inverse)
    if outputs.boundaries is not None:
        outputs.boundaries = outputs.boundaries.gather(1, inverse)
    if outputs.hidden_states is not None:
        states = (None if state is None else _gather_bytes(state, inverse) for state in outputs.hidden_states[:-1])
        outputs.hidden_states = (*states, outputs.last_hidden_state)
    if outputs.attentions is not None:
        outputs.attentions = tuple(_restore_attention(weights, inverse) for weights in outputs.attentions)


def _restore_attention(weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """`weights (B, H, T, past + T)` with queries, and keys of this call, moved back."""
    num_past = weights.shape[3] - inverse.shape[1]
    query = inverse[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
    weights = weights.gather(2, query)
    key = inverse[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1)
    return torch.cat([weights[..., :num_past], weights[..., num_past:].gather(3, key)], dim=-1)


def _packed_positions(
    position_ids: torch.Tensor, input_ids: torch.Tensor, layout: Layout | None, traced: bool = False
) -> torch.Tensor | None:
    """Bytes before each byte in its document (B, T), if `position_ids` restart anywhere; else `None`."""
    if position_ids.shape[-1] != input_ids.shape[1]:
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected {tuple(input_ids.shape)}")
    if layout is not None:
        compact = position_ids.expand_as(input_ids)
        compact = compact if layout.order is None else compact.gather(1, layout.order)
        valid = torch.arange(1, input_ids.shape[1], device=input_ids.device) < layout.lengths[:, None]
        if not traced and ((compact[:, 1:] <= compact[:, :-1]) & valid).any():
            raise ValueError("packed documents (position_ids that restart) cannot have padding in attention_mask")
        return None
    goes_on = position_ids[:, 1:] == position_ids[:, :-1] + 1
    if not traced and goes_on.all():
        return None
    time = torch.arange(input_ids.shape[1], device=input_ids.device)
    first = time[1:].masked_fill(goes_on, 0).cummax(1)[0]  # (B, T - 1)
    return (time - F.pad(first, (1, 0))).expand_as(input_ids)


def _bytes_ahead(
    input_ids: torch.Tensor, lengths: torch.Tensor | None, positions: torch.Tensor | None
) -> torch.Tensor:
    """Bytes after each byte in its document (B, T); 0 at padding."""
    num_bytes = input_ids.shape[1]
    time = torch.arange(num_bytes, device=input_ids.device)
    if positions is None:
        end = num_bytes if lengths is None else lengths[:, None]
        return (end - 1 - time).clamp(min=0).expand_as(input_ids)
    is_last = F.pad(positions[:, 1:] == 0, (0, 1), value=True)
    last = torch.where(is_last, time, num_bytes).flip(1).cummin(1)[0].flip(1)
    return last - time


def _no_patch_yet(boundary: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Bytes (B, T) before the first boundary of their document."""
    time = torch.arange(boundary.shape[1], device=boundary.device)
    return time.masked_fill(~boundary, -1).cummax(1)[0] < time - positions


class STLMForCausalLM(STLMPreTrainedModel, GenerationMixin):
    """The model with a head that predicts the next byte.

    `generate` takes `valid_utf8=True`, or finds it in the generation config: text is well-formed UTF-8 then, whatever the
    logits are. With `prompt_lookup_num_tokens=48` text that repeats is drafted and checked in one pass, one row at a time:
    greedy text is the same within rounding, samples have the same distribution ([`RepeatCandidateGenerator`]). Setting
    `max_matching_ngram_size` selects the drafts of the library instead.

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

    def _prepare_generation_config(self, generation_config, *, valid_utf8: bool | None = None, **kwargs):
        if generation_config is None and kwargs.get("max_length") is not None:
            # A length asked for wins over `max_new_tokens` of the checkpoint, which the library would prefer.
            kwargs.setdefault("max_new_tokens", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if valid_utf8 is not None:
            generation_config.valid_utf8 = valid_utf8
        return generation_config, model_kwargs

    def _get_logits_processor(self, generation_config, *args, **kwargs):
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        if getattr(generation_config, "valid_utf8", False):
            # First, so that top-k and top-p choose among what is allowed.
            # The last place may be taken by an end of text.
            forced = generation_config.forced_eos_token_id is not None
            processors.insert(0, UTF8LogitsProcessor(generation_config.max_length - forced))
        return processors

    def _get_candidate_generator(
        self, generation_config, *, logits_processor, model_kwargs, target_tokenizer=None, **kwargs
    ):
        if num_past := model_kwargs["past_key_values"].get_seq_length():
            raise ValueError(
                f"transformers would read the whole text again behind the {num_past} bytes that the cache holds: with "
                "drafts (assistant_model, prompt_lookup_num_tokens), start with an empty cache"
            )
        for processor in logits_processor:
            if isinstance(processor, COUNT_THEIR_CALLS):
                raise ValueError(
                    f"{type(processor).__name__} counts its calls, which drafts multiply: it would write another text. "
                    "Generate without drafts (assistant_model, prompt_lookup_num_tokens)"
                )
        # The library checks the options.
        generator = super()._get_candidate_generator(
            generation_config,
            logits_processor=logits_processor,
            model_kwargs=model_kwargs,
            target_tokenizer=target_tokenizer,
            **kwargs,
        )
        if type(generator) is not PromptLookupCandidateGenerator:
            return generator
        if generation_config.max_matching_ngram_size is not None:
            return generator
        stops = generation_config.stop_strings
        return RepeatCandidateGenerator(
            generation_config.prompt_lookup_num_tokens,
            generation_config.max_length,
            self.config.vocab_size,
            generation_config._eos_token_tensor,
            logits_processor,
            None if stops is None else StopStringCriteria(target_tokenizer, stops),
        )

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs):
        """With a static cache: the mask of the new bytes (B, T), or `None` if none is padding, so that shapes stay."""
        if attention_mask is None:
            return None
        attention_mask = attention_mask[:, attention_mask.shape[1] - inputs_embeds.shape[1] :]
        return None if attention_mask.all() else attention_mask

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
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
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.ratio_loss is not None:
                ratio_loss = share_of_batch(outputs.ratio_loss, labels[:, 1:], logits, **kwargs)
                loss = loss + self.config.ratio_loss_weight * ratio_loss
        return STLMCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_hidden_states=outputs.patch_hidden_states,
            patch_attentions=outputs.patch_attentions,
            boundaries=outputs.boundaries,
            ratio_loss=outputs.ratio_loss,
        )

    # `generate` looks at it in every step of a class from outside the library. Made once, it costs nothing then.
    forward.__signature__ = inspect.signature(forward)


class STLMForMaskedLM(STLMPreTrainedModel):
    """The model with a head that predicts masked bytes; needs `is_causal=False`.

    Example:

    ```python
    >>> import torch
    >>> from modeling_stlm import STLMConfig, STLMForMaskedLM
    >>> model = STLMForMaskedLM(STLMConfig.from_preset("stlm-3m", is_causal=False))
    >>> model(torch.tensor([[*b"a w", 259, *b"rd"]])).logits.shape
    torch.Size([1, 6, 320])

    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        if config.is_causal:
            raise ValueError(
                "STLMForMaskedLM needs a config with is_causal=False: a causal model cannot see what follows a mask. "
                "To start from the weights of a causal checkpoint, pass is_causal=False to from_pretrained"
            )
        self.model = STLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): ids at masked bytes, -100 elsewhere.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.ratio_loss is not None:
                loss = loss + self.config.ratio_loss_weight * share_of_batch(
                    outputs.ratio_loss, labels, logits, **kwargs
                )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class STLMClassifier(STLMPreTrainedModel):
    """What the classification heads share: the model, dropout, and one vector a row.

    Without a mask, padding ids count for nothing.
    """

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = STLMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)

    def encode(self, input_ids, attention_mask, position_ids, inputs_embeds, kwargs):
        """Hidden states of every byte, and the mask used. `num_items_in_batch` is for the loss; a head needs no cache."""
        kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"} | {"use_cache": False}
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        return outputs, attention_mask

    def pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """One vector for each row (B, D) of `hidden_states (B, T, D)`: see `config.classifier_pooling`."""
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
        if self.config.classifier_pooling == "last":
            time = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            last = (time * (attention_mask != 0)).argmax(-1)
            return hidden_states.take_along_dim(last[:, None, None], 1)[:, 0]
        weight = (attention_mask != 0).float()[..., None]
        mean = (hidden_states.float() * weight).sum(1) / weight.sum(1).clamp(min=1)  # a sum of bytes overflows float16
        return mean.to(hidden_states.dtype)


def share_of_batch(loss, labels: torch.Tensor, logits: torch.Tensor, num_items_in_batch=None, **_) -> torch.Tensor:
    """A mean over the labels of this call as its share of the mean over `num_items_in_batch`, as `Trainer` counts them.

    So gradient accumulation gives the gradient of the whole batch. A call without labels has no share.
    """
    if num_items_in_batch is None:
        return loss
    count = (labels != -100).sum()
    return torch.where(count > 0, loss * count, 0 * logits.float().sum()) / num_items_in_batch


class STLMForSequenceClassification(STLMClassifier):
    """The model with a linear head on one vector a row: classification, regression, several labels at once."""

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`, *optional*):
                Classes, or values if `num_labels` is 1; floats of shape `(B, num_labels)` for several labels at once.
        """
        outputs, attention_mask = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        pooled = self.pool(outputs.last_hidden_state, attention_mask)
        logits = self.score(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            loss = share_of_batch(loss, labels, logits, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class STLMForTokenClassification(STLMClassifier):
    """The model with a linear head on every byte."""

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): class of every byte; -100 is left out.
        """
        outputs, _ = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config)
            loss = share_of_batch(loss, labels, logits, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class STLMForQuestionAnswering(STLMClassifier):
    """The model with a head for the first and the last byte of an answer."""

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            start_positions, end_positions (`torch.LongTensor` of shape `(B,)`, *optional*):
                First and last byte of the answer; positions past the input are left out.
        """
        outputs, _ = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        start_logits, end_logits = self.qa_outputs(self.dropout(outputs.last_hidden_state)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class STLMForMultipleChoice(STLMClassifier):
    """The model with a score for each of several texts, of which one is right."""

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        r"""
        Inputs as in [`STLMModel.forward`] with one more axis: `(B, choices, T)`; and:

        Args:
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): which choice is right.
        """
        num_choices = (inputs_embeds if input_ids is None else input_ids).shape[1]
        input_ids, attention_mask, inputs_embeds = (
            None if tensor is None else tensor.flatten(0, 1) for tensor in (input_ids, attention_mask, inputs_embeds)
        )
        if position_ids is not None and position_ids.ndim == 3:  # or (1, T), the same for all
            position_ids = position_ids.flatten(0, 1)
        outputs, attention_mask = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        pooled = self.pool(outputs.last_hidden_state, attention_mask)
        logits = self.score(self.dropout(pooled)).view(-1, num_choices)
        loss = None
        if labels is not None:
            loss = share_of_batch(F.cross_entropy(logits.float(), labels), labels, logits, **kwargs)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "STLMCausalLMOutput",
    "STLMForCausalLM",
    "STLMForMaskedLM",
    "STLMForMultipleChoice",
    "STLMForQuestionAnswering",
    "STLMForSequenceClassification",
    "STLMForTokenClassification",
    "STLMModel",
    "STLMModelOutput",
    "STLMPreTrainedModel",
]
