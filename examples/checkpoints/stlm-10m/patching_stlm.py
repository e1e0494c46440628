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
from transformers.utils.import_utils import is_torchdynamo_exporting


# Kinds of bytes. Kinds WORD to LEAD4 make up words.
SPACE, WORD, CONTINUATION, LEAD3, LEAD4, SPECIAL, MISSING = range(7)
NUM_KINDS = 7
HASH_BASE, HASH_PRIME = 65599, 2**31 - 1
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


def kind_weights() -> torch.Tensor:
    """Weights (4,) of the kinds of the 3 bytes before a byte, oldest first, and of itself: the index of its event."""
    return NUM_KINDS ** torch.arange(RULE_CONTEXT_BYTES, -1, -1)


def step_table(spaces_end_patches: bool, cap_bytes: int, cap_characters: int) -> torch.Tensor:
    """What one byte changes: whether a patch ends, open bytes, characters, for each of `(event, open bytes, characters)`.

    Shape `(3, 4 * cap_bytes * cap_characters)`.
    """
    rows = []
    for event in (NOTHING, ENDS_WORD, IS_SPECIAL, ENDS_CHARACTER):
        for open_bytes in range(cap_bytes):
            for characters in range(cap_characters):
                seen = characters + (spaces_end_patches and event == ENDS_CHARACTER)
                ends_word = event == IS_SPECIAL or (spaces_end_patches and event == ENDS_WORD)
                starts_anew = ends_word or seen == cap_characters
                boundary = starts_anew or open_bytes + 1 == cap_bytes
                rows.append((boundary, 0 if boundary else open_bytes + 1, 0 if starts_anew else seen))
    return torch.tensor(rows, dtype=torch.long).t().contiguous()


def hash_weights(order: int) -> list[int]:
    """Weights (n,) of the n bytes of an n-gram, oldest first: it hashes to their sum with `byte + 1`, modulo the prime."""
    return [pow(HASH_BASE, i, HASH_PRIME) for i in range(order)]


def word_ends() -> torch.Tensor:
    """Whether a byte ends the word so far, by the kind of the byte before it and its own. Shape (7, 7), bool."""
    before, kind = torch.arange(NUM_KINDS)[:, None], torch.arange(NUM_KINDS)
    return ((kind == SPACE) & (before >= WORD) & (before <= LEAD4)) | (kind == SPECIAL)


def word_so_far(
    kinds: torch.Tensor, ends: torch.Tensor, context: torch.Tensor, longest: int, positions: torch.Tensor | None
) -> torch.Tensor:
    """Which of the last `longest` bytes up to each byte, oldest first, belong to its word: (B, T, longest) bool.

    A word goes on up to and including the first space-like byte behind it; special tokens end one, too. `context` is of
    shape `(B, longest + T)`, `kinds` is `byte_kinds()` and `ends` is `word_ends()`.
    """
    kind = kinds[context.clamp(max=256)]
    kind_before, kind = kind[:, :-1], kind[:, 1:]
    if positions is not None:  # the byte before a document's start says nothing
        kind_before = kind_before.clone()
        kind_before[:, longest - 1 :].masked_fill_(positions == 0, MISSING)
    ended = ends[kind_before, kind]
    before = (ended.cumsum(1) - ended.long()).unfold(1, longest, 1)  # word ends up to the byte before each
    return before == before[..., -1:]


def prefix_edges(pieces: list[bytes], longest: int) -> torch.Tensor:
    """Trie of all prefixes of up to `longest` bytes of `pieces`, as one sorted vector (E,) of `node * 256 + byte`.

    The root is node 0, and edge i leads to node i + 1: nodes are numbered level by level. All single bytes are in it.
    """
    level = [(0, {bytes([byte]) for byte in range(256)} | {piece[:longest] for piece in pieces if piece})]
    edges = []
    while level:
        following = []
        for node, rests in level:
            children = {}
            for rest in rests:
                children.setdefault(rest[0], set()).add(rest[1:])
            for byte in sorted(children):
                edges.append(node * 256 + byte)
                if rests := children[byte] - {b""}:
                    following.append((len(edges), rests))
        level = following
    return torch.tensor(edges)


class Rule(NamedTuple):
    """Where patches end. The tables are on the device of the ids."""

    kinds: torch.Tensor  # `byte_kinds()`
    events: torch.Tensor  # `byte_events()`
    kind_weights: torch.Tensor  # `kind_weights()`
    steps: torch.Tensor | None  # `step_table(...)` of the three fields below; not for "vocabulary"
    spaces_end_patches: bool  # "spacelike"; otherwise special tokens, the cap and what follows here do
    cap_bytes: int
    cap_characters: int
    edges: torch.Tensor | None = None  # "vocabulary": `prefix_edges`
    surprise: torch.Tensor | None = None  # "entropy": (rows,) entropy of what follows these bytes
    surprise_threshold: float = 0.0  # "entropy": a patch ends above it
    surprise_weights: torch.Tensor | None = None  # "entropy": (n,), of the bytes that are hashed, oldest first


class PatchState(NamedTuple):
    """What a rule remembers of the bytes before this call; both (B,), int64."""

    open_bytes: torch.Tensor  # bytes since the last boundary
    # "spacelike": complete characters of three or more bytes since the last word ended; "vocabulary": node of the trie
    memory: torch.Tensor


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
    routed: torch.Tensor | None = None,
) -> Boundaries:
    """Ends of patches among the last `num_bytes` ids of `context`.

    Three levels, each of which depends only on the ones above, so that nothing is sequential: (1) special tokens and,
    under `"spacelike"`, the first space-like byte after a word (SpaceByte, arXiv:2404.14408, section 3), under
    `"entropy"`, bytes after which the next one is hard to guess (BLT, arXiv:2412.09871, section 2.3); (2) every
    `cap_characters`-th complete character of three or more bytes since (1); (3) every `cap_bytes`-th byte since (2).

    Args:
        context (`torch.LongTensor` of shape `(B, C + T)`): ids with at least 3 earlier ones in front; -1 where none.
        num_bytes (`int`): T.
        state (`PatchState`): what came before this call.
        lengths (`torch.LongTensor` of shape `(B,)`, *optional*): valid bytes of each row; all T if left out.
        positions (`torch.LongTensor` of shape `(B, T)`, *optional*): bytes since the document's start, where a row
            holds several documents.
        routed (`torch.BoolTensor` of shape `(B, T)`, *optional*): more ends on level (1), those of a router.
    """
    if rule.edges is not None:
        return _find_pieces(rule, context, num_bytes, state, lengths, positions)
    time = torch.arange(num_bytes, device=context.device)
    near = context[:, -(num_bytes + RULE_CONTEXT_BYTES) :].clamp(max=256)
    code = torch.zeros_like(near[:, RULE_CONTEXT_BYTES:])
    for back in range(RULE_CONTEXT_BYTES, -1, -1):
        code = code * NUM_KINDS + rule.kinds[shifted(near, num_bytes, back, positions)]
    event = rule.events[code]  # (B, T)

    level1 = event == IS_SPECIAL
    if routed is not None:
        level1 = level1 | routed
    if rule.spaces_end_patches:
        level1 = level1 | (event == ENDS_WORD)
        complete = event == ENDS_CHARACTER
        seen = complete.cumsum(1)  # (B, T) complete characters up to and including t
        seen_at_anchor = _last_before(seen.masked_fill(~level1, -rule.cap_characters), -state.memory)
        if positions is not None:
            first = (seen - complete.long()).masked_fill(positions != 0, -rule.cap_characters).cummax(1)[0]
            seen_at_anchor = torch.maximum(seen_at_anchor, first)
        characters = seen - seen_at_anchor
        level2 = level1 | (complete & (characters % rule.cap_characters == 0))
        open_characters = (characters % rule.cap_characters).masked_fill(level1, 0)
    else:
        if rule.surprise is not None:
            level1 = level1 | _is_surprising(rule, context, num_bytes, positions)
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
        _at_end(state.memory, open_characters, lengths),
    )
    if lengths is not None:
        boundary = boundary & (time < lengths[:, None])
    return Boundaries(boundary, patch_bytes, new_state)


def _is_surprising(rule: Rule, context: torch.Tensor, num_bytes: int, positions: torch.Tensor | None) -> torch.Tensor:
    """Whether what follows each byte is hard to guess from the bytes up to it: (B, T)."""
    order = len(rule.surprise_weights)
    digest = torch.zeros_like(context[:, -num_bytes:])
    for back in range(order):
        digest = digest + (shifted(context, num_bytes, back, positions) + 1) * rule.surprise_weights[order - 1 - back]
    return rule.surprise[digest % HASH_PRIME % len(rule.surprise)] > rule.surprise_threshold


def _doubling_steps(length: int) -> int:
    """Steps of doubling width that cross `length` entries; in an exported graph, where it is open, those of a million."""
    return 20 if is_torchdynamo_exporting() else (length - 1).bit_length()


def _child(rule: Rule, node: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
    """Node behind the edge `byte` of `node`; -1 if there is none."""
    edge = node * 256 + byte
    at = torch.searchsorted(rule.edges, edge).clamp(max=len(rule.edges) - 1)
    found = (rule.edges[at] == edge) & (byte >= 0) & (byte < 256)
    return (at + 1).masked_fill(~found, -1)


def _find_pieces(rule: Rule, context, num_bytes: int, state: PatchState, lengths, positions) -> Boundaries:
    """`find_boundaries` under `"vocabulary"`.

    A walk through the trie of pieces fails at the byte that proves that the piece has ended: the patch ends there, and
    the next walk starts with that byte (behind it, if no piece can start with it). Where the walk from each byte fails
    does not depend on the other walks; which walks take place is found by following them in doubling jumps.

    Columns: 0 is the walk that came into this call, 1 + t the walk from byte t, T + 1 the end.
    """
    num_rows, device = context.shape[0], context.device
    ids = context[:, context.shape[1] - num_bytes :]
    time = torch.arange(num_bytes, device=device)
    padded = torch.cat([ids, ids.new_full((num_rows, 1), -1)], 1)  # (B, T + 1)
    column = torch.arange(-1, num_bytes + 1, device=device)  # byte from which the walk of each column starts
    if positions is None:
        stop = column.new_full((num_rows, num_bytes + 2), num_bytes)
    else:
        # A walk stops at the start of the next document.
        start = torch.where(positions == 0, time, num_bytes)
        upcoming = start.flip(1).cummin(1)[0].flip(1)  # (B, T) first start at or after t
        stop = torch.cat([upcoming, upcoming.new_full((num_rows, 2), num_bytes)], 1)
    node = torch.zeros_like(stop)
    node[:, 0] = state.memory
    at = column.clamp(min=0).expand(num_rows, -1).clone()  # (B, T + 2) next byte of each walk
    for _ in range(rule.cap_bytes):
        child = _child(rule, node, padded.gather(1, at.clamp(max=num_bytes)))
        goes_on = (child >= 0) & (at < stop)
        node, at = torch.where(goes_on, child, node), at + goes_on
    # What follows: byte `at`, which fails, ends a patch, unless a document starts there or the call ends.
    fails = at < stop
    restarts = _child(rule, torch.zeros_like(node), padded.gather(1, at.clamp(max=num_bytes))) >= 0
    following = (torch.where(fails & ~restarts, at + 1, at) + 1).clamp(max=num_bytes + 1)
    following[:, -1] = num_bytes + 1

    taken = torch.zeros_like(fails)
    taken[:, 0] = True
    jump = following
    for _ in range(_doubling_steps(num_bytes + 2)):
        taken = taken | torch.zeros_like(taken, dtype=torch.int32).scatter_add_(1, jump, taken.int()).bool()
        jump = jump.gather(1, jump)
    ends = (taken & fails).int()
    boundary = torch.zeros(num_rows, num_bytes + 1, dtype=torch.int32, device=device)
    boundary = boundary.scatter_add_(1, at.clamp(max=num_bytes), ends)[:, :num_bytes].bool()

    last_end = _last_before(torch.where(boundary, time, -1 - rule.cap_bytes), -1 - state.open_bytes)
    if positions is not None:
        last_end = torch.maximum(last_end, time - positions - 1)
    patch_bytes = time - last_end

    # The walk that leaves this call, from the last start on. Only with the row's last byte can it fail.
    length = lengths if lengths is not None else ids.new_full((num_rows,), num_bytes)
    start = torch.where(taken & (column < length[:, None]), column, -1).amax(1)  # (B,); -1: still the first walk
    node = torch.where(start < 0, state.memory, 0)
    at = start.clamp(min=0)
    for _ in range(rule.cap_bytes):
        inside = at < length
        child = _child(rule, node, padded.gather(1, at.clamp(max=num_bytes)[:, None])[:, 0])
        node, at = torch.where(inside, child.clamp(min=0), node), at + inside
    new_state = PatchState(_at_end(state.open_bytes, patch_bytes.masked_fill(boundary, 0), lengths), node)
    if lengths is not None:
        boundary = boundary & (time < length[:, None])
    return Boundaries(boundary, patch_bytes, new_state)


def close_patches(boundaries: Boundaries, ahead: torch.Tensor, lengths: torch.Tensor | None) -> Boundaries:
    """Let the last byte of every document end a patch too: those with `ahead (B, T)` = 0 bytes after them."""
    last = ahead == 0
    if lengths is not None:
        last = last & (torch.arange(last.shape[1], device=last.device) < lengths[:, None])
    return boundaries._replace(boundary=boundaries.boundary | last)


def step_boundary(
    rule: Rule, context: torch.Tensor, state: PatchState, routed: torch.Tensor | None = None
) -> tuple[torch.Tensor, PatchState]:
    """`find_boundaries` for one byte, the last of `context`, in a tenth of the operations: boundary (B,) and state."""
    if rule.edges is not None:
        child, root = _child(rule, state.memory, context[:, -1]), torch.zeros_like(state.memory)
        boundary = child < 0
        node = torch.where(boundary, _child(rule, root, context[:, -1]).clamp(min=0), child)
        return boundary, PatchState((state.open_bytes + 1).masked_fill(boundary, 0), node)
    kinds = rule.kinds[context[:, -1 - RULE_CONTEXT_BYTES :].clamp(max=256)]
    event = rule.events[(kinds * rule.kind_weights).sum(-1)]
    if rule.surprise is not None:
        event = event.masked_fill(_is_surprising(rule, context, 1, None)[:, 0], IS_SPECIAL)
    if routed is not None:
        event = event.masked_fill(routed, IS_SPECIAL)
    index = torch.add(state.memory, state.open_bytes, alpha=rule.cap_characters)
    index = torch.add(index, event, alpha=rule.cap_bytes * rule.cap_characters)
    ends, open_bytes, memory = rule.steps[:, index].unbind(0)
    return ends != 0, PatchState(open_bytes, memory)


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
    hidden_states: torch.Tensor, terms: torch.Tensor, index: PatchIndex, open_sum: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the bytes of every patch that ends here, and its last byte.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, T, D)`): front output.
        terms (`torch.Tensor` of shape `(B, T, S)`): what is summed.
        open_sum (`torch.Tensor` of shape `(B, S)`, *optional*): sum over the bytes of the open patch before this call.

    Returns:
        Sums `(B, P, S)` in float32 and last bytes `(B, P, D)`.
    """
    sums = sum_patches(terms, index.patch_of, index.ends.shape[1])
    if open_sum is not None:
        sums = torch.cat([sums[:, :1] + open_sum[:, None], sums[:, 1:]], dim=1)
    last = hidden_states.gather(1, index.ends[..., None].expand(-1, -1, hidden_states.shape[-1]))
    return sums, last


def unpool_patches(patches: torch.Tensor, patch_seen: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
    """What each byte sees of the trunk: patch `patch_seen (B, T)` of `patches (B, P, D)`, or `start (D,)` where -1."""
    index = patch_seen.clamp(min=0)[..., None].expand(-1, -1, patches.shape[-1])
    visible = patches.gather(1, index)
    return visible if start is None else torch.where((patch_seen >= 0)[..., None], visible, start)


def smooth_patches(patches: torch.Tensor, share: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Moving average `y[p] = share[p] * patches[p] + (1 - share[p]) * y[p - 1]` (H-Net, arXiv:2507.07955, eq. 5).

    In doubling steps, so that nothing is sequential and a share of one forgets exactly.

    Args:
        patches (`torch.Tensor` of shape `(B, P, D)`).
        share (`torch.Tensor` of shape `(B, P)`).
        before (`torch.Tensor` of shape `(B, D)`, *optional*): what stands for `y[-1]`; zero if left out.
    """
    keep, sums = (1 - share)[..., None], share[..., None] * patches
    if before is not None:
        sums = torch.cat([sums[:, :1] + keep[:, :1] * before[:, None], sums[:, 1:]], dim=1)
    patch = torch.arange(patches.shape[1], device=patches.device)
    for step in range(_doubling_steps(patches.shape[1])):
        earlier = patch - 2**step
        exists, earlier = (earlier >= 0)[:, None], earlier.clamp(min=0)
        sums = sums + torch.where(exists, keep * sums[:, earlier], 0)
        keep = torch.where(exists, keep * keep[:, earlier], 0)
    return sums.to(patches.dtype)
