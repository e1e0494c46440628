# SPDX-License-Identifier: Apache-2.0
"""Where patches end, and the way from bytes to patches and back: pure functions of tensors.

Shapes: B rows, T bytes of this call, P patches, D byte width, C bytes of context before this call.

A rule gives `boundary (B, T)`: True where a patch ends, decided from this byte and earlier ones only. Rows are compact:
their valid bytes come first. Every function works on a piece of a longer sequence; what it must know of earlier bytes
is a few bytes of context and the small `PatchState`. Several documents in one row never touch each other:
`positions[b, t]` counts the bytes of t's document before t.
"""

from typing import NamedTuple

import torch


# Kinds of bytes. Kinds WORD to LEAD4 make up words.
SPACE, WORD, CONTINUATION, LEAD3, LEAD4, SPECIAL, MISSING = range(7)
NUM_KINDS = 7
# What a byte does, seen from its kind and those of the bytes before it.
NOTHING, ENDS_WORD, IS_SPECIAL, ENDS_CHARACTER = range(4)
RULE_CONTEXT_BYTES = 3  # a rule looks this far back to see whether a multi-byte character is complete


def byte_kinds() -> torch.Tensor:
    """Kind of every byte, of any special token (entry 256) and of a byte that is not there (id -1). Shape (258,)."""
    kinds = torch.full((258,), SPACE)
    for first, last, kind in (
        (ord("0"), ord("9"), WORD),
        (ord("A"), ord("Z"), WORD),
        (ord("a"), ord("z"), WORD),
        (0x80, 0xBF, CONTINUATION),
        (0xC0, 0xDF, WORD),
        (0xE0, 0xEF, LEAD3),
        (0xF0, 0xF7, LEAD4),
        (0xF8, 0xFF, WORD),
        (256, 256, SPECIAL),
        (257, 257, MISSING),
    ):
        kinds[first : last + 1] = kind
    return kinds


def byte_events() -> torch.Tensor:
    """What a byte does, at the index `sum(kind[back] * 7**back)` over itself and the 3 bytes before. Shape (2401,)."""
    index = torch.arange(NUM_KINDS ** (RULE_CONTEXT_BYTES + 1))
    kind = [index // NUM_KINDS**back % NUM_KINDS for back in range(RULE_CONTEXT_BYTES + 1)]
    events = torch.full_like(index, NOTHING)
    events[(kind[0] == SPACE) & (kind[1] >= WORD) & (kind[1] <= LEAD4)] = ENDS_WORD
    events[kind[0] == SPECIAL] = IS_SPECIAL
    after_continuation = (kind[0] == CONTINUATION) & (kind[1] == CONTINUATION)
    four_bytes = (kind[2] == CONTINUATION) & (kind[3] == LEAD4)
    events[after_continuation & ((kind[2] == LEAD3) | four_bytes)] = ENDS_CHARACTER
    return events


class Rule(NamedTuple):
    """Where patches end. The tables are `byte_kinds()` and `byte_events()`, on the device of the ids."""

    kinds: torch.Tensor
    events: torch.Tensor
    spaces_end_patches: bool  # "spacelike"; otherwise only special tokens and the cap do ("fixed")
    cap_bytes: int
    cap_characters: int


class PatchState(NamedTuple):
    """What a rule remembers of the bytes before this call; both (B,), int64."""

    open_bytes: torch.Tensor  # bytes since the last boundary
    open_characters: torch.Tensor  # complete characters of three or more bytes since the last word ended


class Boundaries(NamedTuple):
    boundary: torch.Tensor  # (B, T) bool, False at padding
    patch_bytes: torch.Tensor  # (B, T) int64: bytes of t's patch up to and including t
    state: PatchState  # after the last valid byte


def shifted(context: torch.Tensor, num_bytes: int, back: int, positions: torch.Tensor | None) -> torch.Tensor:
    """The byte `back` bytes before each of the last `num_bytes` of `context` (B, C + T); -1 across a document start."""
    end = context.shape[1] - back
    earlier = context[:, end - num_bytes : end]
    return earlier if positions is None else earlier.masked_fill(positions < back, -1)


def _last_before(values: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """Running maximum of `values` (B, T) strictly before each position, starting from `initial` (B,)."""
    return torch.cat([initial[:, None], values], dim=1).cummax(dim=1)[0][:, :-1]


def _at_end(initial: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """`values` (B, T) at the last valid byte of each row, `initial` (B,) in rows without any."""
    if lengths is None:
        return values[:, -1].clone() if values.shape[1] else initial  # no view of all bytes
    return torch.cat([initial[:, None], values], dim=1).gather(1, lengths[:, None])[:, 0]


def find_boundaries(
    rule: Rule,
    context: torch.Tensor,
    num_bytes: int,
    state: PatchState,
    lengths: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> Boundaries:
    """Ends of patches among the last `num_bytes` ids of `context`.

    Three levels, each of which depends only on the ones above, so that nothing is sequential: (1) special tokens and,
    under `"spacelike"`, the first space-like byte after a word (SpaceByte, arXiv:2404.14408, section 3); (2) every
    `cap_characters`-th complete character of three or more bytes since (1); (3) every `cap_bytes`-th byte since (2).

    Args:
        context (`torch.LongTensor` of shape `(B, C + T)`): ids with at least 3 earlier ones in front; -1 where none.
        num_bytes (`int`): T.
        state (`PatchState`): what came before this call.
        lengths (`torch.LongTensor` of shape `(B,)`, *optional*): valid bytes of each row; all T if left out.
        positions (`torch.LongTensor` of shape `(B, T)`, *optional*): bytes since the document's start, where a row
            holds several documents.
    """
    time = torch.arange(num_bytes, device=context.device)
    near = context[:, -(num_bytes + RULE_CONTEXT_BYTES) :].clamp(max=256)
    code = torch.zeros_like(near[:, RULE_CONTEXT_BYTES:])
    for back in range(RULE_CONTEXT_BYTES, -1, -1):
        code = code * NUM_KINDS + rule.kinds[shifted(near, num_bytes, back, positions)]
    event = rule.events[code]  # (B, T)

    level1 = event == IS_SPECIAL
    if rule.spaces_end_patches:
        level1 = level1 | (event == ENDS_WORD)
        complete = event == ENDS_CHARACTER
        seen = complete.cumsum(1)  # (B, T) complete characters up to and including t
        seen_at_anchor = _last_before(seen.masked_fill(~level1, -rule.cap_characters), -state.open_characters)
        if positions is not None:
            first = (seen - complete.long()).masked_fill(positions != 0, -rule.cap_characters).cummax(1)[0]
            seen_at_anchor = torch.maximum(seen_at_anchor, first)
        characters = seen - seen_at_anchor
        level2 = level1 | (complete & (characters % rule.cap_characters == 0))
        open_characters = (characters % rule.cap_characters).masked_fill(level1, 0)
    else:
        level2 = level1
        open_characters = torch.zeros_like(event)

    anchor = _last_before(torch.where(level2, time, -1 - rule.cap_bytes), -1 - state.open_bytes)
    if positions is not None:
        anchor = torch.maximum(anchor, time - positions - 1)
    since_anchor = time - anchor  # (B, T), at least 1
    boundary = level2 | (since_anchor % rule.cap_bytes == 0)
    patch_bytes = (since_anchor - 1) % rule.cap_bytes + 1

    new_state = PatchState(
        _at_end(state.open_bytes, patch_bytes.masked_fill(boundary, 0), lengths),
        _at_end(state.open_characters, open_characters, lengths),
    )
    if lengths is not None:
        boundary = boundary & (time < lengths[:, None])
    return Boundaries(boundary, patch_bytes, new_state)


def close_patches(boundaries: Boundaries, ahead: torch.Tensor, lengths: torch.Tensor | None) -> Boundaries:
    """Let the last byte of every document end a patch too: those with `ahead (B, T)` = 0 bytes after them."""
    last = ahead == 0
    if lengths is not None:
        last = last & (torch.arange(last.shape[1], device=last.device) < lengths[:, None])
    return boundaries._replace(boundary=boundaries.boundary | last)


def step_boundary(rule: Rule, context: torch.Tensor, state: PatchState) -> tuple[torch.Tensor, PatchState]:
    """`find_boundaries` for one byte, the last of `context`, in a tenth of the operations: boundary (B,) and state."""
    kind = rule.kinds[context[:, -1 - RULE_CONTEXT_BYTES :].clamp(max=256)]
    code = kind[:, 0]
    for i in range(1, RULE_CONTEXT_BYTES + 1):
        code = torch.add(kind[:, i], code, alpha=NUM_KINDS)
    event = rule.events[code]
    open_bytes = state.open_bytes + 1
    boundary = (event == IS_SPECIAL) | (open_bytes == rule.cap_bytes)
    open_characters = state.open_characters
    if rule.spaces_end_patches:
        characters = open_characters + (event == ENDS_CHARACTER)
        full = characters == rule.cap_characters
        ends_word = (event == ENDS_WORD) | (event == IS_SPECIAL)
        boundary = boundary | ends_word | full
        open_characters = characters.masked_fill(ends_word | full, 0)
    return boundary, PatchState(open_bytes.masked_fill(boundary, 0), open_characters)


class PatchIndex(NamedTuple):
    """Which bytes make up which of the P patches that end in this call. Entries past a row's count mean nothing."""

    patch_of: torch.Tensor  # (B, T): patch each byte goes into; P for bytes of no patch that ends here
    ends: torch.Tensor  # (B, P): byte at which the patch ends
    num_bytes: torch.Tensor  # (B, P): bytes of the patch, those before this call included
    counts: torch.Tensor  # (B,): patches that end in this call


def index_patches(boundaries: Boundaries, max_patches: int | None = None) -> PatchIndex:
    """Index of the patches that end in this call. `max_patches` fixes P; without it P is the largest count, at least 1."""
    boundary, patch_bytes, _ = boundaries
    num_rows, num_bytes = boundary.shape
    ended = boundary.cumsum(1)  # (B, T)
    counts = ended[:, -1]
    if max_patches is None:
        max_patches = max(1, int(counts.max()))
    time = torch.arange(num_bytes, device=boundary.device).expand(num_rows, -1)
    patch_of = ended - boundary.long()  # (B, T); the patch left open at the end has index counts[b]
    # A patch that ends writes its end into its slot, every other byte writes into a spare slot that is cut off.
    ends = time.new_zeros(num_rows, max_patches + 1).scatter_(1, patch_of.masked_fill(~boundary, max_patches), time)
    sizes = patch_bytes.gather(1, ends)
    # A byte before the start of its patch was left open by an earlier document of the row: it goes nowhere. So do the
    # bytes after the last boundary.
    start = (ends - sizes).gather(1, patch_of.clamp(max=max_patches))
    inside = (patch_of < counts[:, None]) & (time > start)
    return PatchIndex(
        patch_of.masked_fill(~inside, max_patches), ends[:, :max_patches], sizes[:, :max_patches], counts
    )


def sum_patches(hidden_states: torch.Tensor, patch_of: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Sum of the bytes (B, T, D) of each patch, in float32: (B, num_patches, D). Other indices are left out."""
    num_rows, _, width = hidden_states.shape
    row = torch.arange(num_rows, device=patch_of.device)[:, None] * (num_patches + 1)
    sums = hidden_states.new_zeros(num_rows * (num_patches + 1), width, dtype=torch.float32)
    sums = sums.index_add(0, (row + patch_of).flatten(), hidden_states.float().flatten(0, 1))
    return sums.view(num_rows, num_patches + 1, width)[:, :num_patches]


def pool_patches(
    hidden_states: torch.Tensor, index: PatchIndex, open_sum: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and last byte of every patch that ends here.

    Mean pooling beats sub-sampling (dynamic pooling, arXiv:2211.09761, table 3); the last byte beside it gains another
    percent in our trials.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`): front output.
        open_sum (`torch.Tensor` of shape `(B, D)`, *optional*): sum over the bytes of the open patch before this call.

    Returns:
        The pooled patches, shape `(B, P, 2 * D)`.
    """
    num_patches = index.ends.shape[1]
    sums = sum_patches(hidden_states, index.patch_of, num_patches)  # (B, P, D)
    if open_sum is not None:
        sums = torch.cat([sums[:, :1] + open_sum[:, None], sums[:, 1:]], dim=1)
    mean = sums / index.num_bytes.clamp(min=1)[..., None]
    last = hidden_states.gather(1, index.ends[..., None].expand(-1, -1, hidden_states.shape[-1]))
    return torch.cat([mean.to(hidden_states.dtype), last], dim=-1)


def unpool_patches(patches: torch.Tensor, patch_seen: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """What each byte sees of the trunk: patch `patch_seen (B, T)` of `patches (B, P, D)`, or `start (D,)` where -1."""
    index = patch_seen.clamp(min=0)[..., None].expand(-1, -1, patches.shape[-1])
    visible = patches.gather(1, index)
    return visible if start is None else torch.where((patch_seen >= 0)[..., None], visible, start)
