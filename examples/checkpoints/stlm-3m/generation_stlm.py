# SPDX-License-Identifier: Apache-2.0
"""What `generate` does with bytes: text that is always well-formed UTF-8 (RFC 3629), and drafts of text that repeats."""

import torch
from transformers import LogitsProcessor
from transformers.generation import CandidateGenerator


# States between two bytes of a text: between characters, or with so many continuation bytes to come; after E0, ED, F0
# and F4 only some of them may come next (no overlong forms, no surrogates, nothing above U+10FFFF).
BETWEEN, ONE, TWO, THREE, AFTER_E0, AFTER_ED, AFTER_F0, AFTER_F4 = range(8)
MISSING_BYTES = (0, 1, 2, 3, 2, 2, 3, 3)
# (state, first byte, last byte, next state)
TRANSITIONS = (
    (BETWEEN, 0x00, 0x7F, BETWEEN),
    (BETWEEN, 0xC2, 0xDF, ONE),
    (BETWEEN, 0xE1, 0xEF, TWO),
    (BETWEEN, 0xE0, 0xE0, AFTER_E0),
    (BETWEEN, 0xED, 0xED, AFTER_ED),
    (BETWEEN, 0xF1, 0xF3, THREE),
    (BETWEEN, 0xF0, 0xF0, AFTER_F0),
    (BETWEEN, 0xF4, 0xF4, AFTER_F4),
    (ONE, 0x80, 0xBF, BETWEEN),
    (TWO, 0x80, 0xBF, ONE),
    (THREE, 0x80, 0xBF, TWO),
    (AFTER_E0, 0xA0, 0xBF, ONE),
    (AFTER_ED, 0x80, 0x9F, ONE),
    (AFTER_F0, 0x90, 0xBF, TWO),
    (AFTER_F4, 0x80, 0x8F, TWO),
)


class UTF8LogitsProcessor(LogitsProcessor):
    """Allows only ids that keep the text well-formed: special tokens and new characters wait until one is complete.

    [`STLMForCausalLM`] uses it where `generation_config.valid_utf8` is set. A prompt may end inside a character; what
    is ill-formed in it already is left alone.

    Args:
        max_length (`int`, *optional*):
            Length in ids at which generation stops, the prompt included: no character is begun that would be cut off.
    """

    def __init__(self, max_length: int | None = None):
        self.max_length = max_length
        # Next state for state x id, -1 where it is not allowed; the last column is that of special tokens.
        self.next_state = torch.full((len(MISSING_BYTES), 257), -1)
        for state, first, last, after in TRANSITIONS:
            self.next_state[state, first : last + 1] = after
        self.next_state[BETWEEN, 256] = BETWEEN
        self.missing = torch.tensor(MISSING_BYTES)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`input_ids (B, T)` and `scores (B, V)`; returns scores with `-inf` at ids that are not allowed."""
        if self.next_state.device != scores.device:
            self.next_state, self.missing = self.next_state.to(scores.device), self.missing.to(scores.device)
        state = input_ids.new_full((len(input_ids),), BETWEEN)
        # A character that is not complete began in the last three bytes.
        for ids in input_ids[:, -3:].clamp(max=256).unbind(1):
            begun = self.next_state[BETWEEN, ids]
            state = self.next_state[state, ids]
            state = torch.where(state < 0, begun, state).clamp(min=BETWEEN)
        after = self.next_state[state]  # (B, 257)
        allowed = after >= 0
        if self.max_length is not None:
            fits = allowed & (self.missing[after] <= self.max_length - input_ids.shape[1] - 1)
            # A character begun by the prompt, or before a draft of an assistant, goes on even if it does not fit.
            allowed = torch.where(fits.any(-1, keepdim=True), fits, allowed)
        special = allowed[:, 256:].expand(-1, max(0, scores.shape[1] - 256))
        allowed = torch.cat([allowed[:, :256], special], dim=1)[:, : scores.shape[1]]
        return scores.masked_fill(~allowed, -torch.inf)


class RepeatCandidateGenerator(CandidateGenerator):
    """Drafts what followed the last bytes when they last came: prompt lookup decoding, lossless, made for bytes.

    A pass over n bytes costs a model of pooled bytes several steps, and a few bytes match somewhere in any text. So
    nothing is drafted unless `matched_bytes` bytes match, which is one lookup a byte, and then as many bytes as match.
    [`STLMForCausalLM`] drafts so where `generation_config.prompt_lookup_num_tokens` is set.

    Args:
        num_drafted (`int`): most bytes of a draft.
        max_length (`int`): length in ids at which generation stops, the prompt included.
        matched_bytes (`int`, defaults to 12): fewest bytes that must match.

    Raises:
        ValueError: if `num_drafted` or `matched_bytes` is less than one.
    """

    def __init__(self, num_drafted: int, max_length: int, matched_bytes: int = 12):
        if min(num_drafted, matched_bytes) < 1:
            raise ValueError(
                f"drafts have at least one byte and match at least one, got num_drafted={num_drafted} and "
                f"matched_bytes={matched_bytes}"
            )
        self.num_drafted, self.max_length, self.matched_bytes = num_drafted, max_length, matched_bytes
        self.ids: list[int] = []
        self.places: dict[tuple[int, ...], int] = {}  # of each run of `matched_bytes` ids: where its last one ended

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, None]:
        """`input_ids (1, T)`, which begin as in the call before; with a draft behind: (1, T + drafted)."""
        ids, size = self.ids, self.matched_bytes
        known, num_ids = len(ids), input_ids.shape[1]
        ids += input_ids[0, known:].tolist()
        for end in range(max(size, known), num_ids):
            self.places[tuple(ids[end - size : end])] = end
        room = min(self.num_drafted, self.max_length - num_ids - 1)
        place = self.places.get(tuple(ids[num_ids - size :])) if num_ids > size else None
        if place is None or room < 1:
            return input_ids, None
        while size < min(room, place) and ids[place - size - 1] == ids[num_ids - size - 1]:
            size += 1
        period = num_ids - place
        draft = [ids[place + i % period] for i in range(min(size, room))]
        return torch.cat([input_ids, input_ids.new_tensor([draft])], dim=1), None

    def update_candidate_strategy(self, *_) -> None:
        """Drafts depend on the text alone."""


__all__ = ["RepeatCandidateGenerator", "UTF8LogitsProcessor"]
