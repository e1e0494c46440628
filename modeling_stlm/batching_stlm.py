# SPDX-License-Identifier: Apache-2.0
"""Padding and packed documents, in one place: rows are made compact on entry and restored on exit.

The valid bytes of every row are moved to its front, so that left padding, right padding, gaps and no padding run the
same arithmetic and every state is per row. Outputs at padding are those of the last valid byte before it.

Shapes: B rows, T bytes of this call, D width.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import ModelOutput
from transformers.utils.import_utils import is_torchdynamo_compiling, is_tracing


class STLMBatch(NamedTuple):
    """The layout of one call. Fields are `None` where they are trivial."""

    num_bytes: int  # T
    lengths: torch.Tensor | None  # (B,) valid bytes of each row; None: all T
    order: torch.Tensor | None  # (B, T) given position of each compact byte; None: the same
    num_seen: torch.Tensor | None  # (B, T) valid bytes up to and including each given position
    positions: torch.Tensor | None  # (B, T) bytes of its document before each compact byte; None: one document per row
    remaining: torch.Tensor | None = None  # (B, T) bytes of its document after each compact byte; None: causal

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_past: int | None = 0,
        position_ids: torch.Tensor | None = None,
        is_causal: bool = True,
    ) -> "STLMBatch":
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`).
            attention_mask (`torch.Tensor` of shape `(B, num_past + T)`, *optional*): 0 at padding.
            num_past (`int`, *optional*): positions before this call; `None` if the mask leaves them out.
            position_ids (`torch.LongTensor` of shape `(B, T)` or `(1, T)`, *optional*): to find packed documents.
        """
        lengths = order = num_seen = None
        valid = _valid_bytes(attention_mask, num_past, input_ids)
        if valid is not None and (_is_static(valid) or not valid.all()):
            lengths, num_seen = valid.sum(1), valid.cumsum(1)
            time = torch.arange(valid.shape[1], device=valid.device).expand_as(num_seen)
            if _is_static(valid) or not (valid[:, 1:] <= valid[:, :-1]).all():
                # Stable: valid positions first, both in their order.
                index = torch.where(valid, num_seen - 1, lengths[:, None] + time - num_seen)
                order = torch.zeros_like(index).scatter(1, index, time)
        positions = None
        if position_ids is not None:
            positions = cls._document_positions(position_ids, input_ids, order, lengths)
        batch = cls(input_ids.shape[1], lengths, order, num_seen, positions)
        return batch if is_causal else batch._replace(remaining=batch._remaining(input_ids))

    @staticmethod
    def _document_positions(
        position_ids: torch.Tensor, input_ids: torch.Tensor, order: torch.Tensor | None, lengths: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Bytes before each byte in its document (B, T), or `None` if no row has several documents."""
        if position_ids.shape[-1] != input_ids.shape[1]:
            raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected {tuple(input_ids.shape)}")
        position_ids = position_ids.expand_as(input_ids)
        compact = position_ids if order is None else position_ids.gather(1, order)
        starts = compact[:, 1:] != compact[:, :-1] + 1
        if (
            lengths is not None
        ):  # positions may count padding, or stand still there: then only a zero starts a document
            is_whole = (lengths == input_ids.shape[1])[:, None]
            starts = torch.where(is_whole, starts, compact[:, 1:] == 0)
            starts = starts & (torch.arange(1, input_ids.shape[1], device=starts.device) < lengths[:, None])
        if not _is_static(starts) and not starts.any():
            return None
        time = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = time[1:].masked_fill(~starts, 0).cummax(1)[0]  # (B, T - 1) where the document of each byte starts
        return time - F.pad(first, (1, 0))

    def _remaining(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Bytes after each byte in its document (B, T), 0 at padding."""
        time = torch.arange(self.num_bytes, device=input_ids.device)
        end = (input_ids.new_full(input_ids.shape[:1], self.num_bytes) if self.lengths is None else self.lengths)[
            :, None
        ]
        if self.positions is None:
            return (end - 1 - time).clamp(min=0).expand_as(input_ids)
        is_last = F.pad(self.positions[:, 1:] == 0, (0, 1), value=True) | (time == end - 1)
        last = torch.where(is_last, time, self.num_bytes).flip(1).cummin(1)[0].flip(1)
        return (last - time).masked_fill(time >= end, 0)

    @property
    def is_one_byte(self) -> bool:
        """One byte in every row: the step of generation, for which patching has shorter ways."""
        return self.num_bytes == 1 and self.lengths is None and self.positions is None

    @property
    def is_valid(self) -> torch.Tensor | None:
        """(B, T) False at the compact positions past the end of a row; `None` if there are none."""
        if self.lengths is None:
            return None
        return torch.arange(self.num_bytes, device=self.lengths.device) < self.lengths[:, None]

    @property
    def is_given(self) -> torch.Tensor:
        """(B, T) False at padding, at the given positions of rows with padding."""
        return torch.diff(self.num_seen, dim=1, prepend=torch.zeros_like(self.num_seen[:, :1])) > 0

    def hide_padding(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` (B, T) as given, -1 at padding."""
        return input_ids if self.num_seen is None else input_ids.masked_fill(~self.is_given, -1)

    def compact(self, states: torch.Tensor) -> torch.Tensor:
        """`states` (B, T) or (B, T, D) of the given positions, valid bytes first."""
        return states if self.order is None else _gather_bytes(states, self.order)

    def at_end(self, states: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """`states` (B, T, ...) at the last valid byte of each row, `before` (B, ...) in rows without any."""
        if self.lengths is None:
            return states[:, -1].clone(memory_format=torch.contiguous_format)  # a view would keep all bytes in memory
        return _gather_bytes(torch.cat([before[:, None].to(states.dtype), states], 1), self.lengths[:, None])[:, 0]

    def restore(self, states: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
        """Compact `states` (B, T, ...) at the given positions; padding gets the last valid byte before it.

        `before` (B, ...) stands for the byte before this call, zero if left out.
        """
        if self.num_seen is None:
            return states
        before = torch.zeros_like(states[:, 0]) if before is None else before.to(states.dtype)
        return _gather_bytes(torch.cat([before[:, None], states], 1), self.num_seen)

    def restore_attention(self, weights: torch.Tensor) -> torch.Tensor:
        """Compact attention `weights (B, H, T, past + T)` at the given positions; zero to and from padding."""
        if self.num_seen is None:
            return weights
        num_past = weights.shape[3] - self.num_bytes
        valid, at = self.is_given, (self.num_seen - 1).clamp(min=0)
        query = at[:, None, :, None].expand(-1, weights.shape[1], -1, weights.shape[3])
        key = at[:, None, None].expand(-1, weights.shape[1], weights.shape[2], -1)
        weights = weights.gather(2, query).masked_fill(~valid[:, None, :, None], 0)
        new = weights[..., num_past:].gather(3, key).masked_fill(~valid[:, None, None], 0)
        return torch.cat([weights[..., :num_past], new], dim=-1)

    def restore_outputs(self, outputs: ModelOutput, last_output: torch.Tensor) -> None:
        """Move every byte-level output back to where its byte was given; `last_output (B, D)` is that before this call."""
        outputs.last_hidden_state = self.restore(outputs.last_hidden_state, last_output)
        if self.order is None:  # right padding: everything else stands where it was given
            if outputs.hidden_states is not None:
                outputs.hidden_states = (*outputs.hidden_states[:-1], outputs.last_hidden_state)
            return
        if outputs.boundaries is not None:
            outputs.boundaries = self.restore(outputs.boundaries) & self.is_given
        if outputs.hidden_states is not None:
            states = (None if hidden is None else self.restore(hidden) for hidden in outputs.hidden_states[:-1])
            outputs.hidden_states = (*states, outputs.last_hidden_state)
        if outputs.attentions is not None:
            outputs.attentions = tuple(self.restore_attention(weights) for weights in outputs.attentions)


def _valid_bytes(
    attention_mask: torch.Tensor | None, num_past: int | None, input_ids: torch.Tensor
) -> torch.Tensor | None:
    """False at padding among the new bytes (B, T), or `None` without a mask."""
    if attention_mask is None:
        return None
    num_rows, num_bytes = input_ids.shape
    if attention_mask.shape != (num_rows, (num_past or 0) + num_bytes):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected "
            f"{(num_rows, (num_past or 0) + num_bytes)}: one value for each of {num_past or 0} cached and {num_bytes} "
            f"new bytes of {num_rows} rows. Masks with more axes have no meaning for patches"
        )
    return attention_mask[:, attention_mask.shape[1] - num_bytes :] != 0


def _is_static(tensor: torch.Tensor) -> bool:
    """Whether a graph is recorded, in which nothing may be decided by values."""
    return is_tracing(tensor) or is_torchdynamo_compiling()


def _gather_bytes(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`states` (B, T, ...) at the bytes `index` (B, N)."""
    if states.ndim == 2:
        return states.gather(1, index)
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
