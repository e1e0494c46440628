# SPDX-License-Identifier: Apache-2.0
"""Cache slots of STLM. The library builds them from `config.layer_types`; defining the classes registers them.

One slot for each byte layer (its last few inputs), one for pooling (byte history, open patch, what the trunk said of
each patch), one for each pass of the trunk (keys and values, one entry a patch). Rows are ragged: every row has its own
number of valid bytes and of patches, and is stored from the left without padding.

Every state follows from the byte history and from what the trunk said of the completed patches. So `crop` cuts the
history and drops the small states; the next forward makes them again from the last few bytes (`STLMModel._replay`).
While drafts are verified (`activate_past_recording`), slots keep what the last call fed, so that taking back its last
bytes costs next to nothing (`STLMModel._rewind`).

Shapes: B rows, T bytes of this call, N bytes kept, P patches, D byte width, H key/value heads, K head width.
"""

import torch
from transformers.cache_utils import CacheLayerMixin, StaticLayer
from transformers.utils.import_utils import is_torchdynamo_exporting


RECORDED_BYTES = 64  # longest call that is recorded


def grow(buffer: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    """`buffer` with room for `length` entries along `dim`; capacity doubles, so that appending costs amortised O(1)."""
    capacity = buffer.shape[dim]
    if capacity >= length:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = max(length, 2 * capacity, 16)
    larger = buffer.new_zeros(shape)
    larger.narrow(dim, 0, capacity).copy_(buffer)
    return larger


class STLMCacheLayer(CacheLayerMixin):
    """A slot whose state is a set of tensors with the batch in front; `row_tensors` names them."""

    is_croppable = True
    is_sliding = False
    supports_early_init = False
    record_past = False
    row_tensors: tuple[str, ...] = ("keys", "values")

    def _map_rows(self, function) -> None:
        for name in self.row_tensors:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))

    def activate_past_recording(self) -> None:
        """From now on keep what makes `crop` of the last call cheap."""
        self.record_past = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

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

    def count_bytes(self, num_bytes: int) -> None:
        """Add the positions of this call, padding included, to what the library calls the sequence length."""
        self.seen_bytes += num_bytes

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    @staticmethod
    def _check_crop(tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of bytes to remove as a negative number, got {tokens_to_remove}")


class STLMByteCacheLayer(STLMCacheLayer):
    """The last inputs of one byte layer: `keys` (B, N, ...) and, for attention, `values` (B, N, ...).

    While recording, the inputs of the last call stand behind them: (B, N + T, ...).
    """

    _layer_type = "stlm_byte"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen_bytes = 0

    def get_seq_length(self) -> int:
        return self.seen_bytes

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor | None = None, *, keep: int, lengths=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Put the kept inputs in front of the new ones and keep the last `keep` valid ones of each row.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(B, T, ...)`): inputs of this call.
            keep (`int`): N.
            lengths (`torch.LongTensor` of shape `(B,)`, *optional*): valid bytes of each row; all T if left out.

        Returns:
            Both with N inputs in front, shape `(B, N + T, ...)`; zeros stand before the first byte.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        self.num_kept = keep
        self.keys, keys = self._extend(self.keys, key_states, keep, lengths)
        if value_states is None:
            return keys, None
        self.values, values = self._extend(self.values, value_states, keep, lengths)
        return keys, values

    def _extend(self, kept, new, keep, lengths):
        if kept is None:
            kept = new.new_zeros(new.shape[0], keep, *new.shape[2:])
        elif self.record_past:
            kept = kept[:, kept.shape[1] - keep :]
        both = torch.cat([kept, new], dim=1)
        if self.record_past and lengths is None and new.shape[1] <= RECORDED_BYTES:
            return both, both
        if lengths is None:
            last = both[:, both.shape[1] - keep :]
            # A view would keep the whole prompt in memory, and give a compiled step other strides than a prefill.
            return last if new.shape[1] == 1 and not self.is_compileable else last.clone(), both
        last = lengths[:, None] + torch.arange(keep, device=new.device)  # (B, N)
        return both[torch.arange(new.shape[0], device=new.device)[:, None], last], both

    def crop(self, tokens_to_remove: int) -> None:
        self._check_crop(tokens_to_remove)
        if tokens_to_remove:
            if self.seen_bytes + tokens_to_remove < 0:
                raise ValueError(f"cannot remove {-tokens_to_remove} bytes: the cache holds {self.seen_bytes}")
            self.seen_bytes += tokens_to_remove
            is_recorded = self.keys is not None and self.keys.shape[1] + tokens_to_remove >= self.num_kept
            self._map_rows(lambda states: states[:, :tokens_to_remove] if is_recorded else None)


REWOUND_STATES = ("keys", "num_bytes", "num_patches", "open_bytes", "memory")


class STLMPoolCacheLayer(STLMCacheLayer):
    """Byte history, rule state, open patch and what the trunk said of each completed patch.

    `history` (B, seen) holds the id of every position fed, -1 at padding, -2 where an embedding stood for no id;
    `context` (B, C) the last valid ids; `keys` (B, S) the sum over the open patch; `values` (B, P, D) the patches as
    bytes see them; `visible` (B, D) the last of them, or the start vector; `num_bytes`, `num_patches` (B,) counts of
    valid bytes and patches; `open_bytes`, `memory` (B,) the state of the rule; `routed` (B, R) the last byte a router saw.
    """

    _layer_type = "stlm_pool"
    row_tensors = (
        *("keys", "values", "visible", "history", "context", "routed"),
        *("num_bytes", "num_patches", "open_bytes", "memory"),
    )

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.visible = self.history = self.context = self.routed = self.num_bytes = self.num_patches = None
        self.open_bytes = self.memory = None
        self.seen_bytes = 0
        self.is_stale = False  # after `crop`: everything but history and values must be made again
        # While recording: context (B, C + T) and terms (B, T, S) of the last call, and the small states before it.
        self.past: dict[str, torch.Tensor] = {}
        self.is_rewound = False  # after `crop` of recorded bytes: the small states are those of `past`

    def _map_rows(self, function) -> None:
        super()._map_rows(function)
        self.past = {name: function(tensor) for name, tensor in self.past.items()}

    def get_seq_length(self) -> int:
        return self.seen_bytes

    def record(self, context: torch.Tensor, terms: torch.Tensor, is_recordable: bool) -> None:
        """Before the states change: note what a call feeds, `context (B, C + T)` and `terms (B, T, S)`."""
        self.past = {}
        if is_recordable and terms.shape[1] <= RECORDED_BYTES:
            states = {name: getattr(self, name) for name in REWOUND_STATES}
            self.past = {"context": context, "terms": terms} | states

    def rewind(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Put back the small states before the recorded call; context and terms of its bytes that are left."""
        past, self.past, self.is_rewound = self.past, {}, False
        for name in REWOUND_STATES:
            setattr(self, name, past[name])
        return past["context"], past["terms"]

    def start(self, num_rows: int, sizes: tuple[int, int, int], first: torch.Tensor) -> None:
        """Empty state for `num_rows` rows.

        Args:
            sizes (`tuple[int, int, int]`): C, S and R.
            first (`torch.Tensor` of shape `(D,)`): what bytes see before any patch is complete.
        """
        self.lazy_initialization(first)
        self.values = first.new_zeros(num_rows, 0, len(first))
        self.history = torch.empty(num_rows, 0, dtype=torch.int32, device=first.device)
        self.clear(sizes, first)

    def clear(self, sizes: tuple[int, int, int], first: torch.Tensor) -> None:
        """Forget all but the byte history and the patches."""
        num_context, num_terms, num_routed = sizes
        num_rows = self.values.shape[0]  # `len` would fix it in an exported graph
        counts = torch.zeros(num_rows, dtype=torch.long, device=first.device)
        self.num_bytes, self.num_patches, self.open_bytes, self.memory = (counts.clone() for _ in range(4))
        self.context = counts.new_full((num_rows, num_context), -1)
        self.keys = first.new_zeros(num_rows, num_terms, dtype=torch.float32)
        self.routed = first.new_zeros(num_rows, num_routed)
        self.visible = first.expand(num_rows, -1)
        self.is_stale = self.is_rewound = False
        self.past = {}

    def check_room(self, num_bytes: int) -> None:
        """Raise if `num_bytes` more do not fit."""

    def append_history(self, ids: torch.Tensor) -> None:
        """Note the ids (B, T) of the positions of this call, padding (-1) and soft embeddings (-2) included."""
        end = self.seen_bytes + ids.shape[1]
        self.history = grow(self.history, end, dim=1)
        self.history[:, self.seen_bytes : end] = ids
        self.seen_bytes = end

    def patch_room(self, num_patches: int) -> int:
        """Room for patches, as far as shapes alone tell, before `num_patches` are added."""
        return self.values.shape[1] + num_patches

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *, rows, at, end):
        """Store patches `value_states` (R, P, D): see [`STLMPatchCacheLayer.update`]."""
        self.values = write_patches(self.values, value_states, rows, at, end, dim=1)
        return key_states, self.values

    def crop(self, tokens_to_remove: int) -> None:
        self._check_crop(tokens_to_remove)
        if tokens_to_remove:
            self.seen_bytes += tokens_to_remove
            if self.past and self.past["terms"].shape[1] + tokens_to_remove >= 0:
                self.past |= {name: self.past[name][:, :tokens_to_remove] for name in ("context", "terms")}
                self.is_rewound = True
            else:
                self.history = self.history[:, : self.seen_bytes].clone()
                self.is_stale = True


class STLMPatchCacheLayer(STLMCacheLayer):
    """Keys and values of one pass of the trunk, (B, H, P, K): entry p of row b is that row's p-th patch.

    Entries from a row's count on hold leftovers. Nobody reads them: a patch attends to patches up to itself.
    """

    _layer_type = "stlm_patch"
    initial_room = 0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.stored_patches = 0  # largest number of patches of a row

    def get_seq_length(self) -> int:
        return self.stored_patches

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *, num_rows: int, rows, at, end: int):
        """Store the new patches of some rows and return all patches of these rows.

        Args:
            key_states, value_states (`torch.Tensor` of shape `(R, H, P, K)`): new patches.
            num_rows (`int`): B.
            rows (`torch.LongTensor` of shape `(R,)`, *optional*): rows they belong to; all rows if `None`.
            at (`torch.LongTensor` of shape `(R, P)` or `slice`): index of the new patches, a slice if all rows have the same.
            end (`int`): S, at least the number of patches of any of these rows.

        Returns:
            Keys and values of these rows, shape `(R, H, S, K)`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states)
            shape = (num_rows, key_states.shape[1], self.initial_room, key_states.shape[3])
            self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        if not self.is_compileable:  # a number that changes would compile a step anew
            self.stored_patches = max(self.stored_patches, end)
        self.keys = write_patches(self.keys, key_states, rows, at, end, dim=2)
        self.values = write_patches(self.values, value_states, rows, at, end, dim=2)
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        return (keys, values) if rows is None else (keys.index_select(0, rows), values.index_select(0, rows))

    def crop(self, tokens_to_remove: int) -> None:
        self._check_crop(tokens_to_remove)  # the pool slot knows the counts; entries past them are never read


def write_patches(
    store: torch.Tensor, new: torch.Tensor, rows: torch.Tensor | None, at: torch.Tensor | slice, end: int, dim: int
) -> torch.Tensor:
    """`store` with `new` put at the patches `at` of `rows` (R,), all before `end`; `dim` counts patches."""
    new = new.to(store.dtype)  # they differ under autocast
    store = grow(store, end, dim)
    if torch.is_grad_enabled() and (store.requires_grad or new.requires_grad):
        store = store.clone()  # an earlier call may have saved it for its backward
    if isinstance(at, slice):
        store.narrow(dim, at.start, new.shape[dim]).copy_(new)
    elif rows is None and is_torchdynamo_exporting():
        # With the indexing below, a graph exported to ONNX writes other bytes (torch 2.13).
        index = at[..., None] if dim == 1 else at[:, None, :, None]
        store.scatter_(dim, index.expand_as(new), new)
    else:  # of a scatter a compiled graph makes a copy of the whole store
        rows = (torch.arange(store.shape[0], device=store.device) if rows is None else rows)[:, None]
        if dim == 1:
            store[rows, at] = new
        else:
            store[rows, :, at] = new.transpose(1, 2)
    return store


class STLMStaticMixin:
    """Slots of fixed size, for compiled and exported decoding. Room for a patch a byte, since any byte may end one."""

    is_compileable = True
    is_croppable = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)

    def get_seq_length(self) -> torch.Tensor | int:
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def count_bytes(self, num_bytes: int) -> None:
        self.cumulative_length.add_(num_bytes)

    def reset(self) -> None:
        self.__init__(max_cache_len=self.max_cache_len)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a static cache of STLM cannot be cropped: use a DynamicCache")


class STLMStaticByteCacheLayer(STLMStaticMixin, STLMByteCacheLayer, StaticLayer):
    _layer_type = "stlm_byte"


class STLMStaticPoolCacheLayer(STLMStaticMixin, STLMPoolCacheLayer, StaticLayer):
    """Keeps no byte history: that is for `crop`."""

    _layer_type = "stlm_pool"

    def start(self, num_rows: int, sizes: tuple[int, int, int], first: torch.Tensor) -> None:
        self.lazy_initialization(first)
        self.values = first.new_zeros(num_rows, self.max_cache_len, len(first))
        self.clear(sizes, first)

    def check_room(self, num_bytes: int) -> None:
        if int(self.cumulative_length) + num_bytes > self.max_cache_len:
            raise ValueError(
                f"the static cache has room for {self.max_cache_len} bytes: {int(self.cumulative_length)} are in it, "
                f"{num_bytes} more do not fit. Make it with a larger max_cache_len"
            )

    def append_history(self, ids: torch.Tensor) -> None:
        self.count_bytes(ids.shape[1])

    def patch_room(self, num_patches: int) -> int:
        return self.max_cache_len


class STLMStaticPatchCacheLayer(STLMStaticMixin, STLMPatchCacheLayer, StaticLayer):
    _layer_type = "stlm_patch"

    @property
    def initial_room(self) -> int:
        return self.max_cache_len
