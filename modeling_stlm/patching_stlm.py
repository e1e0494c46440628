# SPDX-License-Identifier: Apache-2.0
"""From bytes to patches and back: the rules that decide where patches end, pooling and unpooling.

The model calls a rule through one method, with the ids and local encoder outputs of this call and the state of the rows:

    ends, rule_state = rule.advance(hidden_states, context, batch, state)

`ends (B, T)` is True where a patch ends, decided from this byte and earlier ones only. Everything works on a piece of a
longer text; all that is known of earlier bytes is in `PatchState`. A call without a past starts from a fresh state.

Shapes: B rows, T bytes of this call, C ids of context before it, P patches that end in it, D byte width, G trunk width.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils.import_utils import is_torchdynamo_compiling, is_tracing

from .batching_stlm import STLMBatch
from .configuration_stlm import STLMConfig


# Kinds of bytes. Kinds WORD to LEAD4 make up words.
SPACE, WORD, CONTINUATION, LEAD3, LEAD4, SPECIAL, MISSING = range(7)
NUM_KINDS = 7
CHARACTER_BYTES = 4  # longest character of UTF-8
# What a byte does to the open patch, given its kind and the kinds of the bytes before it.
NOTHING, ENDS_WORD, IS_SPECIAL, ENDS_CHARACTER = range(4)


class PatchState(NamedTuple):
    """What a row remembers of the bytes before this call."""

    last_ids: torch.Tensor  # (B, C) int64 last valid ids, -1 where there is none
    num_bytes: torch.Tensor  # (B,) int64 valid bytes so far
    num_patches: torch.Tensor  # (B,) int64 completed patches
    open_bytes: torch.Tensor  # (B,) int64 bytes of the open patch
    open_sum: torch.Tensor  # (B, D) float32 sum over the bytes of the open patch
    rule_state: torch.Tensor  # (B, ...) defined by the rule
    visible: torch.Tensor  # (B, D) the last completed patch as bytes see it; the start vector before the first
    last_output: torch.Tensor  # (B, D) final output of the last valid byte; zero before the first


class PatchEnds(NamedTuple):
    """Where patches end in this call."""

    ends: torch.Tensor  # (B, T) bool, False at padding
    rule_state: torch.Tensor
    confidence: torch.Tensor | None = None  # (B, T) float32 probability of an end, of a learned rule


class Constants:
    """Tensors that never change, on any device.

    They are no buffers: tools average, cast, offload and save buffers, and loading leaves unsaved ones uninitialised.
    """

    def __init__(self, **tensors: torch.Tensor):
        self._by_device = {"cpu": tensors}

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        key = str(device)
        if key in self._by_device:
            return self._by_device[key]
        tensors = {name: tensor.to(device) for name, tensor in self._by_device["cpu"].items()}
        if not is_tracing() and device.type != "meta":  # a graph would leave its own kind of tensors here
            self._by_device[key] = tensors
        return tensors


def byte_kinds() -> torch.Tensor:
    """Kind of every byte, of any special token (entry 256) and of a byte that is not there (id -1). Shape (258,)."""
    kinds = torch.full((258,), SPACE, device="cpu")
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
    index = torch.arange(NUM_KINDS**CHARACTER_BYTES, device="cpu")
    kind = [index // NUM_KINDS**back % NUM_KINDS for back in range(CHARACTER_BYTES)]
    events = torch.full_like(index, NOTHING)
    events[(kind[0] == SPACE) & (kind[1] >= WORD) & (kind[1] <= LEAD4)] = ENDS_WORD
    events[kind[0] == SPECIAL] = IS_SPECIAL
    after_continuation = (kind[0] == CONTINUATION) & (kind[1] == CONTINUATION)
    four_bytes = (kind[2] == CONTINUATION) & (kind[3] == LEAD4)
    events[after_continuation & ((kind[2] == LEAD3) | four_bytes)] = ENDS_CHARACTER
    return events


def last_before(values: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """Running maximum of `values` (B, T) strictly before each position, starting from `initial` (B,)."""
    return torch.cat([initial[:, None], values], dim=1).cummax(dim=1)[0][:, :-1]


def doubling_steps(length: int) -> int:
    """Steps of doubling width that cover `length` entries; those of a million in a graph, which leaves the length open."""
    return 20 if is_torchdynamo_compiling() else (length - 1).bit_length()


class PatchingRule(nn.Module):
    """Base of the rules. Special tokens and a cap on the bytes of a patch are used by every rule except `vocabulary`."""

    context_bytes = CHARACTER_BYTES - 1  # ids before a byte that the rule looks at

    def __init__(self, config: STLMConfig):
        super().__init__()
        self.cap_bytes = config.patch_bytes if config.patching == "fixed" else config.max_patch_bytes
        self.constants = Constants(
            kinds=byte_kinds(),
            events=byte_events(),
            weights=NUM_KINDS ** torch.arange(CHARACTER_BYTES - 1, -1, -1, device="cpu"),
        )

    def fresh_state(self, like: torch.Tensor) -> torch.Tensor:
        """State (B, ...) of rows without a past; `like` (B, D) has the device and dtype of hidden states."""
        return torch.zeros(like.shape[0], dtype=torch.long, device=like.device)

    def advance(
        self, hidden_states: torch.Tensor, context: torch.Tensor, batch: STLMBatch, state: PatchState
    ) -> PatchEnds:
        """Ends of patches among the bytes of this call.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, T, D)`): local encoder outputs.
            context (`torch.LongTensor` of shape `(B, C + T)`): ids, preceded by those of `state.last_ids`.
        """
        raise NotImplementedError

    def events(self, context: torch.Tensor, batch: STLMBatch) -> torch.Tensor:
        """What each byte does to the open patch: (B, T)."""
        tables = self.constants.on(context.device)
        near = context[:, context.shape[1] - batch.num_bytes - CHARACTER_BYTES + 1 :].clamp(max=256)
        kinds = tables["kinds"][near].unfold(1, CHARACTER_BYTES, 1)  # (B, T, 4), the byte itself last
        if batch.positions is not None:  # bytes of an earlier document are not there
            back = torch.arange(CHARACTER_BYTES - 1, -1, -1, device=kinds.device)
            kinds = kinds.masked_fill(batch.positions[..., None] < back, MISSING)
        return tables["events"][(kinds * tables["weights"]).sum(-1)]

    def cap(self, wanted: torch.Tensor, batch: STLMBatch, state: PatchState) -> torch.Tensor:
        """`wanted` ends (B, T), and one after every `cap_bytes` bytes without any."""
        if batch.is_one_byte:
            return wanted | (state.open_bytes + 1 == self.cap_bytes)[:, None]
        time = torch.arange(batch.num_bytes, device=wanted.device)
        anchor = last_before(torch.where(wanted, time, -1 - self.cap_bytes), -1 - state.open_bytes)
        if batch.positions is not None:
            anchor = torch.maximum(anchor, time - batch.positions - 1)
        ends = wanted | ((time - anchor) % self.cap_bytes == 0)
        return ends if batch.lengths is None else ends & batch.is_valid


class FixedRule(PatchingRule):
    """Every `patch_bytes` bytes (MegaByte, arXiv:2305.07185), and at special tokens."""

    def advance(self, hidden_states, context, batch, state):
        return PatchEnds(self.cap(self.events(context, batch) == IS_SPECIAL, batch, state), state.rule_state)


class SpacelikeRule(PatchingRule):
    """At the first space-like byte after a word (SpaceByte, arXiv:2404.14408, section 3).

    The state counts the complete characters of three or more bytes since the last word ended: every
    `max_patch_characters`-th ends a patch, too.
    """

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.cap_characters = config.max_patch_characters

    def advance(self, hidden_states, context, batch, state):
        events, cap = self.events(context, batch), self.cap_characters
        word_ends, complete = (events == ENDS_WORD) | (events == IS_SPECIAL), events == ENDS_CHARACTER
        if batch.is_one_byte:
            characters = (state.rule_state[:, None] + complete) % cap
            ends = self.cap(word_ends | (complete & (characters == 0)), batch, state)
            return PatchEnds(ends, characters.masked_fill(word_ends, 0)[:, 0])
        seen = complete.cumsum(1)  # (B, T) complete characters up to and including each byte
        seen_at_anchor = last_before(seen.masked_fill(~word_ends, -cap), -state.rule_state)
        if batch.positions is not None:
            first = (seen - complete.long()).masked_fill(batch.positions != 0, -cap).cummax(1)[0]
            seen_at_anchor = torch.maximum(seen_at_anchor, first)
        characters = (seen - seen_at_anchor) % cap
        ends = self.cap(word_ends | (complete & (characters == 0)), batch, state)
        return PatchEnds(ends, batch.at_end(characters.masked_fill(word_ends, 0), state.rule_state))


class RouterProjection(nn.Linear):
    """A matrix of the router. It starts as the identity, so that bytes are compared as they are."""


class LearnedRule(PatchingRule):
    """Where a byte is unlike the one before it: dynamic chunking of H-Net (arXiv:2507.07955, section 2.2).

    Trunk outputs are smoothed over patches by the confidence of their ends, and gradients reach this router through that
    and through a straight-through estimator. The ratio loss holds the average length near `patch_bytes`, which may
    change while training (`PatchLengthCurriculum`). The state is the last hidden state (B, D).
    """

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.q_proj = RouterProjection(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = RouterProjection(config.hidden_size, config.hidden_size, bias=False)
        self.patch_bytes = float(config.patch_bytes)

    def fresh_state(self, like):
        return torch.zeros_like(like)

    def advance(self, hidden_states, context, batch, state):
        before = state.rule_state.to(hidden_states.dtype)
        previous = torch.cat([before[:, None], hidden_states[:, :-1]], dim=1)
        if batch.positions is not None:
            previous = previous.masked_fill((batch.positions == 0)[..., None], 0)
        # The first byte has no predecessor: probability 0.5, which ends a patch.
        query, key = self.q_proj(hidden_states).float(), self.k_proj(previous).float()
        probability = 0.5 - 0.5 * F.cosine_similarity(query, key, dim=-1)
        wanted = (probability >= 0.5) | (self.events(context, batch) == IS_SPECIAL)
        return PatchEnds(self.cap(wanted, batch, state), batch.at_end(hidden_states, before), probability)

    def ratio_loss(self, found: PatchEnds, batch: STLMBatch) -> torch.Tensor:
        """One where one byte in `patch_bytes` ends a patch with that confidence on average (H-Net, equation 10)."""
        valid = torch.ones_like(found.ends) if batch.lengths is None else batch.is_valid
        count, n = valid.sum().clamp(min=1), self.patch_bytes
        share, mean = found.ends.sum() / count, (found.confidence * valid).sum() / count
        return n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean))


class VocabularyRule(PatchingRule):
    """At the byte that proves that a piece of a vocabulary has ended (the BPE pooling of arXiv:2405.14159, causal).

    A walk through the trie of all pieces fails at that byte: the patch ends there, and the next walk starts with it (after
    it, if no piece can start with it). Where the walk from each byte fails does not depend on the other walks; which
    walks take place is found by following them in doubling jumps. The state is the node of the current walk.
    """

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.constants = Constants(edges=prefix_edges(byte_pieces(config.patch_vocabulary), self.cap_bytes - 1))

    def _child(self, node: torch.Tensor, byte: torch.Tensor) -> torch.Tensor:
        """Node after the edge `byte` of `node`; -1 if there is none."""
        edges, edge = self.constants.on(byte.device)["edges"], node * 256 + byte
        at = torch.searchsorted(edges, edge).clamp(max=len(edges) - 1)
        found = (edges[at] == edge) & (byte >= 0) & (byte < 256)
        return (at + 1).masked_fill(~found, -1)

    def advance(self, hidden_states, context, batch, state):
        num_rows, num_bytes, device = context.shape[0], batch.num_bytes, context.device
        ids = context[:, context.shape[1] - num_bytes :]
        time = torch.arange(num_bytes, device=device)
        padded = torch.cat([ids, ids.new_full((num_rows, 1), -1)], 1)  # (B, T + 1)
        # Columns: 0 is the walk that came into this call, 1 + t the walk from byte t, T + 1 the end.
        column = torch.arange(-1, num_bytes + 1, device=device)  # byte from which the walk of each column starts
        if batch.positions is None:
            stop = column.new_full((num_rows, num_bytes + 2), num_bytes)
        else:  # a walk stops at the start of the next document
            start = torch.where(batch.positions == 0, time, num_bytes)
            upcoming = start.flip(1).cummin(1)[0].flip(1)  # (B, T) first start at or after t
            stop = torch.cat([upcoming, upcoming.new_full((num_rows, 2), num_bytes)], 1)
        node = torch.cat([state.rule_state[:, None], torch.zeros_like(stop[:, 1:])], 1)
        at = column.clamp(min=0).expand(num_rows, -1)  # (B, T + 2) next byte of each walk
        for _ in range(self.cap_bytes):
            child = self._child(node, padded.gather(1, at.clamp(max=num_bytes)))
            goes_on = (child >= 0) & (at < stop)
            node, at = torch.where(goes_on, child, node), at + goes_on
        # Byte `at`, where the walk fails, ends a patch, unless a document starts there or the call ends.
        fails = at < stop
        restarts = self._child(torch.zeros_like(node), padded.gather(1, at.clamp(max=num_bytes))) >= 0
        following = (torch.where(fails & ~restarts, at + 1, at) + 1).clamp(max=num_bytes + 1)
        following = torch.cat([following[:, :-1], torch.full_like(following[:, :1], num_bytes + 1)], 1)

        taken = (column == -1).expand_as(fails)
        jump = following
        for _ in range(doubling_steps(num_bytes + 2)):
            taken = taken | torch.zeros_like(jump).scatter_add(1, jump, taken.long()).bool()
            jump = jump.gather(1, jump)
        ends = torch.zeros_like(padded).scatter_add(1, at.clamp(max=num_bytes), (taken & fails).long())
        ends = ends[:, :num_bytes].bool()

        # The walk that leaves this call, from the last start on. Only with the row's last byte can it fail.
        length = batch.lengths if batch.lengths is not None else ids.new_full((num_rows,), num_bytes)
        start = torch.where(taken & (column < length[:, None]), column, -1).amax(1)  # (B,); -1: still the first walk
        node = torch.where(start < 0, state.rule_state, 0)
        at = start.clamp(min=0)
        for _ in range(self.cap_bytes):
            inside = at < length
            child = self._child(node, padded.gather(1, at.clamp(max=num_bytes)[:, None])[:, 0])
            node, at = torch.where(inside, child.clamp(min=0), node), at + inside
        return PatchEnds(ends if batch.lengths is None else ends & batch.is_valid, node)


RULES = {"spacelike": SpacelikeRule, "fixed": FixedRule, "vocabulary": VocabularyRule, "learned": LearnedRule}


def byte_pieces(patch_vocabulary: str) -> list[bytes]:
    """The pieces of `config.patch_vocabulary` as bytes.

    Raises:
        ValueError: if a piece is not in the alphabet of byte-level BPE.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import, and rarely needed

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    words = patch_vocabulary.split()
    if foreign := [word for word in words if not byte_of.keys() >= set(word)]:
        raise ValueError(
            f"patch_vocabulary has {len(foreign)} pieces that are not in the alphabet of byte-level BPE, such as "
            f"{foreign[:3]}: take the vocabulary of a byte-level tokenizer (GPT-2, Llama 3), without added tokens"
        )
    return [bytes(byte_of[character] for character in word) for word in words]


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
    return torch.tensor(edges, device="cpu")
