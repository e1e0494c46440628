# SPDX-License-Identifier: Apache-2.0
"""The patch level: bytes are pooled into patches, the trunk runs once for each, and bytes see the last complete one.

Shapes: B rows, T bytes of this call, C ids of context before it, P patches that end in it, D byte width, G trunk width.
R rows that completed a patch, S patches that any of these may see.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_torchdynamo_exporting, is_tracing

from .batching_stlm import STLMBatch
from .cache_stlm import TrunkRows
from .configuration_stlm import STLMConfig
from .layers_stlm import (
    STLMTrunkAttentionBlock,
    STLMTrunkFeedForwardBlock,
    is_visible,
    low_rank_matrices,
    make_norm,
    rotary_embedding,
)
from .patching_stlm import RULES, PatchEnds, PatchState, doubling_steps


class Patches(NamedTuple):
    """The patches that end in this call, before the trunk. Entries past a row's count are undefined."""

    pooled: torch.Tensor  # (B, P, 2 D) mean and last byte
    end_at: torch.Tensor  # (B, P) byte at which each ends
    counts: torch.Tensor  # (B,)


def pool_patches(
    hidden_states: torch.Tensor, ends: torch.Tensor, batch: STLMBatch, state: PatchState, max_patches: int
) -> tuple[Patches, PatchState]:
    """Mean and last byte of every patch that ends here, and the sums of the patch that stays open.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`): local encoder outputs.
        ends (`torch.BoolTensor` of shape `(B, T)`).
        max_patches (`int`): P, at least the largest number of patches of a row.
    """
    num_rows, num_bytes, width = hidden_states.shape
    if batch.is_one_byte and max_patches <= 1:
        return _pool_byte(hidden_states[:, 0], ends[:, 0], state, max_patches)
    ended = ends.cumsum(1)
    counts = ended[:, -1]
    patch_of = ended - ends.long()  # (B, T); the patch that stays open has index counts[b]
    # A patch that ends writes its end into its entry, every other byte into an entry that is cut off.
    time = torch.arange(num_bytes, device=ends.device).expand(num_rows, -1)
    end_at = time.new_zeros(num_rows, max_patches + 1).scatter(1, patch_of.masked_fill(~ends, max_patches), time)
    before = torch.cat([-1 - state.open_bytes[:, None], end_at], dim=1)  # (B, P + 2) end of the patch before each
    last_end = before.gather(1, counts[:, None])[:, 0]
    before = before[:, :-1]

    index, num_slots = patch_of, max_patches + 1
    if batch.positions is not None:
        # A byte before the document of its patch's end was left open by an earlier document.
        first = end_at - batch.positions.gather(1, end_at)
        before = torch.maximum(before, first - 1)
        index = index.masked_fill((patch_of < counts[:, None]) & (time < first.gather(1, patch_of)), num_slots)
    if batch.lengths is not None:
        index = index.masked_fill(~batch.is_valid, num_slots)
    num_slots += int(batch.positions is not None or batch.lengths is not None)  # one for bytes that belong to no patch
    index = index + torch.arange(0, num_rows * num_slots, num_slots, device=ends.device)[:, None]
    sums = hidden_states.new_zeros(num_rows * num_slots, width, dtype=torch.float32)
    sums = sums.index_add(0, index.flatten(), hidden_states.float().flatten(0, 1)).unflatten(0, (num_rows, num_slots))
    sums[:, 0] += state.open_sum

    end_at = end_at[:, :max_patches].contiguous()  # inductor (torch 2.13) mistakes the strides of this slice
    sizes = (end_at - before[:, :max_patches]).clamp(min=1)
    mean = (sums[:, :max_patches] / sizes[..., None]).to(hidden_states.dtype)
    last = hidden_states.gather(1, end_at[..., None].expand(-1, -1, width))
    num_valid = num_bytes if batch.lengths is None else batch.lengths
    return Patches(torch.cat([mean, last], -1), end_at, counts), state._replace(
        num_patches=state.num_patches + counts,
        open_bytes=num_valid - 1 - last_end,
        open_sum=sums[torch.arange(num_rows, device=ends.device), counts],
    )


def _pool_byte(
    hidden_states: torch.Tensor, ends: torch.Tensor, state: PatchState, max_patches: int
) -> tuple[Patches, PatchState]:
    """`pool_patches` for one byte in every row, `hidden_states (B, D)`, in a tenth of the operations."""
    sums, sizes, counts = state.open_sum + hidden_states, state.open_bytes + 1, ends.long()
    end_at = counts.new_zeros(counts.shape[0], max_patches)  # `len` would fix it in an exported graph
    if max_patches == 0:
        patches = Patches(hidden_states.new_empty(counts.shape[0], 0, 2 * hidden_states.shape[-1]), end_at, counts)
        return patches, state._replace(open_sum=sums, open_bytes=sizes)
    mean = (sums / sizes[:, None]).to(hidden_states.dtype)
    return Patches(torch.cat([mean, hidden_states], -1)[:, None], end_at, counts), state._replace(
        num_patches=state.num_patches + counts,
        open_bytes=sizes.masked_fill(ends, 0),
        open_sum=sums.masked_fill(ends[:, None], 0),
    )


def unpool_patches(
    patches: torch.Tensor, ends: torch.Tensor, batch: STLMBatch, state: PatchState
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each byte sees of the trunk (B, T, D), given `patches (B, P, D)`, and what the next byte will see (B, D).

    A causal byte sees the last patch that is complete, which is one of this call or `state.visible`; otherwise the patch
    that it belongs to.
    """
    visible = state.visible.to(patches.dtype)[:, None]
    if patches.shape[1] == 0:
        return visible.expand(-1, batch.num_bytes, -1), state.visible
    known = torch.cat([visible, patches], dim=1)
    ended = ends.cumsum(1)
    index = ended
    if batch.remaining is not None:
        # Padding sees the last patch of its row.
        index = torch.minimum(ended - ends.long() + 1, ended[:, -1:])
    elif batch.positions is not None:
        time = torch.arange(batch.num_bytes, device=ends.device)
        before_document = (ended - ends.long()).gather(1, time - batch.positions)
        index = ended.masked_fill(ended == before_document, 0)
    seen = known.gather(1, index[..., None].expand(-1, -1, known.shape[-1]))
    return seen, seen[:, -1].clone(memory_format=torch.contiguous_format) if batch.remaining is None else state.visible


def smooth_patches(patches: torch.Tensor, share: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Moving average `y[p] = share[p] * patches[p] + (1 - share[p]) * y[p - 1]` (H-Net, arXiv:2507.07955, equation 5).

    In doubling steps, so that nothing is sequential and a share of one forgets exactly.

    Args:
        patches (`torch.Tensor` of shape `(B, P, D)`).
        share (`torch.Tensor` of shape `(B, P)`).
        before (`torch.Tensor` of shape `(B, D)`): `y[-1]`.
    """
    keep, sums = (1 - share)[..., None], share[..., None] * patches
    sums = torch.cat([sums[:, :1] + keep[:, :1] * before[:, None], sums[:, 1:]], dim=1)
    patch = torch.arange(patches.shape[1], device=patches.device)
    for step in range(doubling_steps(patches.shape[1])):
        earlier = patch - 2**step
        exists, earlier = (earlier >= 0)[:, None], earlier.clamp(min=0)
        sums = sums + torch.where(exists, keep * sums[:, earlier], 0)
        keep = torch.where(exists, keep * keep[:, earlier], 0)
    return sums.to(patches.dtype)


class STLMTrunk(nn.Module):
    """Transformer over patches. Weight tying is structural: a stored block is one module, called several times.

    With `sharing_lora_rank`, each pass adds matrices of low rank of its own to those of a block that several passes share
    (Relaxed Recursive Transformers, arXiv:2410.20672).
    """

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.config, self.schedule, self.first_slot = config, config.trunk_schedule, config.num_byte_layers + 1
        self.head_dim, self.rope_theta = config.trunk_head_dim, config.rope_theta
        num_attention, num_feed_forward = (1 + max(indices) for indices in zip(*self.schedule))
        self.attention_blocks = nn.ModuleList(STLMTrunkAttentionBlock(config) for _ in range(num_attention))
        self.feed_forward_blocks = nn.ModuleList(STLMTrunkFeedForwardBlock(config) for _ in range(num_feed_forward))
        self.final_norm = make_norm(config, config.trunk_hidden_size)
        self.own_matrices = None
        if config.sharing_lora_rank:
            blocks = self.attention_blocks, self.feed_forward_blocks
            runs = [Counter(indices) for indices in zip(*self.schedule)]
            self.own_matrices = nn.ModuleList(
                nn.ModuleList(
                    low_rank_matrices(stored[i], config.sharing_lora_rank) if count[i] > 1 else nn.ModuleDict()
                    for stored, count, i in zip(blocks, runs, indices)
                )
                for indices in self.schedule
            )

    def own(self, i: int) -> tuple[nn.ModuleDict | None, nn.ModuleDict | None]:
        """What pass i adds to its attention block and to its feed-forward block; `None` where it adds nothing."""
        return (None, None) if self.own_matrices is None else tuple(own or None for own in self.own_matrices[i])

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
                Patches that each may see; all within the window, or causal there in a causal model, if left out.
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
            slot, (for_attention, for_feed_forward) = self.first_slot + i, self.own(i)
            patches = self.attention_blocks[attention](patches, rotary, allowed, cache, slot, where, for_attention)
            patches = self.feed_forward_blocks[feed_forward](patches, for_feed_forward)
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
        self.window = config.trunk_window_patches
        longest = max([*config.ngram_orders, config.ngram_word_bytes, config.longest_lookup])
        self.context_bytes = max(longest, self.rule.context_bytes)
        self.first_trunk_slot = config.num_byte_layers + 1

    def fresh_state(self, num_rows: int, device: torch.device) -> PatchState:
        """The state of rows without a past, on the device of their ids."""
        start = self.start(num_rows).to(device)  # (B, D)
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

    def forward(
        self,
        trunk: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        context: torch.Tensor,
        batch: STLMBatch,
        state: PatchState,
        cache: Cache | None,
    ) -> tuple[torch.Tensor, PatchEnds, PatchState]:
        """What each byte sees of the trunk (B, T, D), where patches end, and the next state but for `last_output`.

        Args:
            trunk (`Callable[..., torch.Tensor]`): the call of the trunk and not the module, which hooks of accelerate would move
                to the device of this one.
            hidden_states (`torch.Tensor` of shape `(B, T, D)`): local encoder outputs of compact rows.
            context (`torch.LongTensor` of shape `(B, C + T)`): ids, preceded by those of `state.last_ids`.
        """
        found = self.find_ends(hidden_states, context, batch, state)
        patches, new_state = pool_patches(hidden_states, found.ends, batch, state, self.max_patches(found.ends, cache))
        new = self.run_trunk(trunk, patches, found, batch, state, cache)  # (B, P, D)
        seen, visible = unpool_patches(new, found.ends, batch, state)
        return self.straight_through(seen, found), found, self.advance(new_state, context, found, visible, batch)

    def find_ends(self, hidden_states, context, batch: STLMBatch, state: PatchState) -> PatchEnds:
        """Where patches end. Without causality a mask counts as a letter, and the end of a document ends its patch."""
        if self.mask_token_id is not None:
            context = context.masked_fill(context == self.mask_token_id, ord("a"))
        found = self.rule.advance(hidden_states, context, batch, state)
        if batch.remaining is None:
            return found
        last = batch.remaining == 0
        return found._replace(ends=found.ends | (last if batch.lengths is None else last & batch.is_valid))

    @staticmethod
    def advance(
        state: PatchState, context: torch.Tensor, found: PatchEnds, visible: torch.Tensor, batch: STLMBatch
    ) -> PatchState:
        """`state` after pooling, with all fields of the next state but `last_output`."""
        num_kept = context.shape[1] - batch.num_bytes
        if batch.lengths is None:
            num_valid = batch.num_bytes
            last_ids = context[:, num_valid:].clone(memory_format=torch.contiguous_format)
        else:
            num_valid = batch.lengths
            last_ids = context.gather(1, num_valid[:, None] + torch.arange(num_kept, device=context.device))
        return state._replace(
            last_ids=last_ids, num_bytes=state.num_bytes + num_valid, rule_state=found.rule_state, visible=visible
        )

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
        if self.window is not None and ends.shape[1] <= self.window:
            torch._check(num_patches <= self.window)  # attention in a graph need not look
        # Without a cache the trunk runs even if no row completed a patch, so that every rank of a distributed training
        # runs, and synchronises, the same modules. Two, since a compiled graph takes a size of one for a constant.
        return num_patches if cache is not None else max(2, num_patches)

    def run_trunk(
        self,
        trunk: Callable[..., torch.Tensor],
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
            at, begin, end = index, 0, cache.layers[self.first_trunk_slot].room(num_new)
            needs_mask = True
        else:
            first, last = int(start.min()), int(start.max())
            begin, end = 0 if self.window is None else max(0, first + 1 - self.window), last + num_new
            needs_mask = first != last or (num_new > 1 and last > 0 and self.window is None)
            needs_mask = needs_mask or (num_new > 1 and self.masks_window(batch.num_bytes))
            at = slice(first, end) if rows is None and first == last else index
        allowed = None
        if needs_mask:
            allowed = self.is_visible(index[..., None], torch.arange(begin, end, device=start.device))[:, None]
        new = trunk(self.patch_proj(pooled), allowed, index, cache, TrunkRows(num_rows, rows, at, end, begin))
        new = self.byte_proj(new)
        if rows is not None:
            new = new.new_zeros(num_rows, num_new, new.shape[-1]).index_copy(0, rows, new)
        return self.smooth(new, found, patches, batch, state)

    def masks_window(self, num_bytes: int) -> bool:
        """Whether a mask says what the window is: in a graph, which knows no number of patches, but that of bytes."""
        return self.window is not None and (is_torchdynamo_exporting() or (is_tracing() and num_bytes > self.window))

    def is_visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return is_visible(query, key, self.window, self.is_causal)

    def _allowed_patches(self, patches: Patches, batch: STLMBatch) -> torch.Tensor | None:
        """Without a cache: which patches each patch may see (B, 1, P, P); `None` if the trunk needs no mask."""
        end_at, counts = patches.end_at, patches.counts
        patch = torch.arange(end_at.shape[1], device=end_at.device)
        if self.is_causal:
            # Entries past a row's count come last: they are causally invisible.
            if batch.positions is None and not self.masks_window(batch.num_bytes):
                return None
            allowed = self.is_visible(patch[:, None], patch)[None]
        else:
            may_be_full = batch.positions is None and not is_static() and not self.masks_window(batch.num_bytes)
            if may_be_full and (counts == end_at.shape[1]).all():
                return None
            # A patch past the count sees itself, so that its softmax is over something.
            allowed = (patch < counts[:, None])[:, None] & self.is_visible(patch[:, None], patch)
            allowed = allowed | (patch == patch[:, None])
        if batch.positions is not None:
            document = end_at - batch.positions.gather(1, end_at)  # (B, P) first byte of the patch's document
            allowed = allowed & (document[:, :, None] == document[:, None, :])
        return allowed[:, None]
