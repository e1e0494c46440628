# SPDX-License-Identifier: Apache-2.0
"""Cache slots of STLM. The library builds them from `config.layer_types`; defining the classes registers them.

One slot for each byte layer (its last few inputs), one for the state of patching, one for each pass of the trunk (keys
and values, one entry per patch). Rows are ragged: each has its own number of valid bytes and of patches, and is stored
from the left without padding. Slots store what they are given and know nothing of patching.

Every state follows from the byte history. While the last call is recorded (`activate_past_recording`, which assisted
decoding uses), `crop` of its bytes keeps enough to undo them cheaply; a deeper `crop` shortens the history, and the next
forward pass replays it.

Shapes: B rows, T bytes of this call, N bytes kept, P patches, H key/value heads, K head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin, StaticLayer
from transformers.utils.import_utils import is_torchdynamo_compiling, is_torchdynamo_exporting


# Kinds of slots. The registry of the library is global to the process, so names contain the module they come from: two
# revisions of this code loaded from the Hub must not replace each other's slots.
BYTE_SLOT, PATCH_STATE_SLOT, TRUNK_SLOT = (f"stlm_{kind}@{__name__}" for kind in ("byte", "patch_state", "trunk"))


class TrunkRows(NamedTuple):
    """Where the new patches of a call are stored, and which patches they may see."""

    num_rows: int  # B
    rows: torch.Tensor | None  # (R,) rows with new patches; None: all
    at: torch.Tensor | slice  # (R, P) index of each new patch; a slice if it is the same in all rows
    end: int  # at least the number of patches of any of these rows
    begin: int = 0  # first patch that any of the new ones may see; S = end - begin


def grow(buffer: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """`buffer` with room for `length` entries along `dim`; capacity doubles, so appending is amortised O(1)."""
    capacity = buffer.shape[dim]
    if capacity >= length:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = max(length, 2 * capacity, 16)
    larger = buffer.new_zeros(shape)
    larger.narrow(dim, 0, capacity).copy_(buffer)
    return larger


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value):
    """`function` of a tensor, or of all tensors of a tuple; `None` stays `None`."""
    if value is None or isinstance(value, torch.Tensor):
        return None if value is None else function(value)
    return tuple(map_tensors(function, item) for item in value)


def writable(store: torch.Tensor, requires_grad: bool = False) -> torch.Tensor:
    """`store`, or a copy where writing to it would change what an earlier call saved for its backward, or fail."""
    is_frozen = not is_torchdynamo_compiling() and store.is_inference() and not torch.is_inference_mode_enabled()
    return store.clone() if store.requires_grad or requires_grad or is_frozen else store


class STLMSlot(CacheLayerMixin):
    """A slot whose tensors, `row_states`, all have the batch in front."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False
    record_past = False
    row_states: tuple[str, ...] = ("keys", "values")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen_bytes = 0  # positions so far, padding included

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in self.row_states:
            setattr(self, name, map_tensors(function, getattr(self, name)))

    def activate_past_recording(self) -> None:
        """Start recording the last call, so that `crop` can undo it without a replay."""
        self.record_past = True

    def end_call(self, num_bytes: int) -> None:
        """Count `num_bytes` new positions, padding included."""
        self.seen_bytes += num_bytes

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of bytes to remove as a negative number, got {tokens_to_remove}")
        if self.seen_bytes + tokens_to_remove < 0:
            raise ValueError(f"cannot remove {-tokens_to_remove} bytes: the cache holds {self.seen_bytes}")
        if tokens_to_remove:
            self.seen_bytes += tokens_to_remove
            self._drop_last(-tokens_to_remove)

    def _drop_last(self, num_bytes: int) -> None:
        """Go back to the states before the last `num_bytes` positions, or drop states that cannot."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self.seen_bytes

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def offload(self) -> None:
        self._map_rows(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map_rows(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.__init__()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))


class STLMByteSlot(STLMSlot):
    """The last inputs of one byte layer: `keys` (B, N, ...) and, for attention, `values` (B, N, ...).

    While recording, `recent` holds them with the inputs of the last call after them: (B, N + T, ...).
    """

    _layer_type = BYTE_SLOT
    row_states = ("keys", "values", "recent")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.recent: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None, *, keep: int, lengths=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prepend the kept inputs to the new ones, and keep the last `keep` valid ones of each row.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(B, T, ...)`): inputs of this call.
            keep (`int`): N.
            lengths (`torch.LongTensor` of shape `(B,)`, *optional*): valid bytes of each row; all T if left out.

        Returns:
            Both with N inputs in front, shape `(B, N + T, ...)`; zeros stand before the first byte.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        self.keys, keys = self._extend(self.keys, key_states, keep, lengths)
        values = None
        if value_states is not None:
            self.values, values = self._extend(self.values, value_states, keep, lengths)
        self.recent = (keys, values) if self.record_past and lengths is None else None
        return keys, values

    def _extend(self, kept, new, keep, lengths):
        if kept is None:
            kept = new.new_zeros(new.shape[0], keep, *new.shape[2:])
        both = torch.cat([kept, new], dim=1)
        if lengths is None:
            last = both[:, both.shape[1] - keep :]
            # A view would keep the whole prompt in memory, and give a compiled step other strides than a prefill.
            if new.shape[1] > 1 or self.is_compileable:
                last = last.clone(memory_format=torch.contiguous_format)
            return last, both
        last = lengths[:, None] + torch.arange(keep, device=new.device)  # (B, N)
        return both[torch.arange(new.shape[0], device=new.device)[:, None], last], both

    def _drop_last(self, num_bytes: int) -> None:
        num_recent = 0 if self.recent is None else self.recent[0].shape[1] - self.keys.shape[1]
        if num_bytes > num_recent:
            self.keys = self.values = self.recent = None
            return
        keep = self.keys.shape[1]
        self.recent = map_tensors(lambda states: states[:, : keep + num_recent - num_bytes], self.recent)
        self.keys, self.values = map_tensors(lambda states: states[:, num_recent - num_bytes :], self.recent)


class STLMPatchStateSlot(STLMSlot):
    """The state of patching, a tuple `state` of tensors (exporters cannot map a NamedTuple), and the byte history.

    `history` (B, seen) holds the id at every position, negative where there is none; `grams` (B, S) the gram that ends
    at each valid byte, from the left, and `places` (B, 1 + S, n), after a zero, one plus the last earlier place of the
    n-grams that end there, 0 for none (`embedding_stlm.py`); both stale past a row's count. While recording, `recent`
    holds the state before the last call, and `recent_bytes` what it did at each byte, a tuple of (B, T, ...).
    """

    _layer_type = PATCH_STATE_SLOT
    initial_room = 0
    row_states = ("state", "recent", "recent_bytes", "history", "grams", "places")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state = self.recent = self.recent_bytes = self.history = self.grams = self.places = None
        self.is_cropped = False

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None, *args, **kwargs):
        raise NotImplementedError("this slot holds the state of patching, not keys and values")

    def record(self, state: tuple, by_byte: tuple[torch.Tensor, ...] | None) -> None:
        """Note the state before this call and what it does at each byte, if recording."""
        self.recent = self.recent_bytes = None
        if self.record_past and by_byte is not None:
            self.recent, self.recent_bytes = state, by_byte

    def check_room(self, num_bytes: int) -> None:
        """Raise if `num_bytes` more do not fit."""

    def forget(self) -> None:
        """Drop the states, which the next call recovers from the history: a call was interrupted."""
        self.recent = self.recent_bytes = None
        self.is_cropped = True

    def append(self, name: str, new: torch.Tensor, index: torch.Tensor, num_before: int = 0) -> torch.Tensor:
        """Write `new (B, T, ...)`, one entry for each new byte, to the attribute `name`; returns the entries of all bytes.

        Args:
            index (`torch.LongTensor` of shape `(B, T)`): of the new bytes in their row.
            num_before (`int`, defaults to 0): zeros before the entry of the first byte.

        Returns:
            `torch.Tensor` of shape `(B, num_before + S, ...)`.
        """
        store = getattr(self, name)
        if store is None:
            store = new.new_zeros(new.shape[0], num_before + self.initial_room, *new.shape[2:])
        end = num_before + (self.initial_room or self.seen_bytes + new.shape[1])
        where = (index + num_before).view(*index.shape, *[1] * (new.ndim - 2)).expand_as(new)
        store = writable(grow(store, end, dim=1)).scatter_(1, where, new)
        setattr(self, name, store)
        return store[:, :end]

    def append_history(self, ids: torch.Tensor) -> None:
        """Note the ids (B, T) of the new positions; before `end_call` counts them."""
        end = self.seen_bytes + ids.shape[1]
        if self.history is None:
            self.history = torch.empty(ids.shape[0], 0, dtype=torch.int32, device=ids.device)
        self.history = writable(grow(self.history, end, dim=1))
        self.history[:, self.seen_bytes : end] = ids

    def _drop_last(self, num_bytes: int) -> None:
        self.is_cropped = True
        num_recent = 0 if self.recent_bytes is None else self.recent_bytes[0].shape[1]
        if num_bytes > num_recent:
            self.recent = self.recent_bytes = None
        else:
            self.recent_bytes = map_tensors(lambda states: states[:, : num_recent - num_bytes], self.recent_bytes)


class STLMTrunkSlot(STLMSlot):
    """Keys and values of one pass of the trunk, (B, H, P, K): entry p of row b is that row's p-th patch.

    Entries past a row's count are stale: masked, and overwritten before they become valid.
    """

    _layer_type = TRUNK_SLOT
    initial_room = 0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stored_patches = 0  # largest number of patches of a row

    def get_seq_length(self) -> int:
        return self.stored_patches

    def room(self, num_new: int) -> int:
        """Room for patches, as far as shapes alone tell, before `num_new` are added."""
        return (0 if self.keys is None else self.keys.shape[2]) + num_new

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *, where: TrunkRows):
        """Store the new patches of some rows, and return the patches of these rows that they may see.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(R, H, P, K)`): new patches.
            where (`TrunkRows`): rows and indices they belong to.

        Returns:
            Keys and values of patches `where.begin` to `where.end` of these rows, shape `(R, H, S, K)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states)
            shape = (where.num_rows, key_states.shape[1], self.initial_room, key_states.shape[3])
            self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        if not self.is_compileable:  # a number that changes would compile every step again
            self.stored_patches = max(self.stored_patches, where.end)
        self.keys = write_patches(self.keys, key_states, where)
        self.values = write_patches(self.values, value_states, where)
        seen, rows = slice(where.begin, where.end), where.rows
        keys, values = self.keys[:, :, seen], self.values[:, :, seen]
        return (keys, values) if rows is None else (keys.index_select(0, rows), values.index_select(0, rows))

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do: the counts in the patch state tell which entries are valid."""


def write_patches(store: torch.Tensor, new: torch.Tensor, where: TrunkRows) -> torch.Tensor:
    """`store` (B, H, S, K) with the patches `new` (R, H, P, K) written to where they belong."""
    new = new.to(store.dtype)  # they differ under autocast
    store = writable(grow(store, where.end, dim=2), new.requires_grad)
    if isinstance(where.at, slice):
        store.narrow(2, where.at.start, new.shape[2]).copy_(new)
    elif where.rows is None and is_torchdynamo_exporting():
        # With the indexing below, a graph exported to ONNX writes other bytes (torch 2.13).
        store.scatter_(2, where.at[:, None, :, None].expand_as(new), new)
    else:  # inductor would copy the whole store for a scatter
        rows = torch.arange(store.shape[0], device=store.device) if where.rows is None else where.rows
        store[rows[:, None], :, where.at] = new.transpose(1, 2)
    return store


class STLMStaticMixin:
    """Slots of fixed size for compiled and exported decoding, with room for one patch per byte. They keep no history."""

    is_compileable = True
    is_croppable = False

    @property
    def initial_room(self) -> int:
        return self.max_cache_len

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)

    def get_seq_length(self) -> torch.Tensor | int:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def end_call(self, num_bytes: int) -> None:
        self.cumulative_length.add_(num_bytes)

    def reset(self) -> None:
        self.__init__(max_cache_len=self.max_cache_len)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a static cache of STLM cannot be cropped: use a DynamicCache")


class STLMStaticByteSlot(STLMStaticMixin, STLMByteSlot, StaticLayer):
    _layer_type = BYTE_SLOT


class STLMStaticPatchStateSlot(STLMStaticMixin, STLMPatchStateSlot, StaticLayer):
    _layer_type = PATCH_STATE_SLOT

    def append_history(self, ids: torch.Tensor) -> None:
        """History is for `crop`."""

    def check_room(self, num_bytes: int) -> None:
        if int(self.cumulative_length) + num_bytes > self.max_cache_len:
            raise ValueError(
                f"the static cache has room for {self.max_cache_len} bytes: {int(self.cumulative_length)} are in it, "
                f"{num_bytes} more do not fit. Make it with a larger max_cache_len"
            )


class STLMStaticTrunkSlot(STLMStaticMixin, STLMTrunkSlot, StaticLayer):
    _layer_type = TRUNK_SLOT

    def room(self, num_new: int) -> int:
        return self.max_cache_len
