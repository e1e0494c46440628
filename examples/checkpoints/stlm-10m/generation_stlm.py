# SPDX-License-Identifier: Apache-2.0
"""What `generate` does with bytes: text that is always well-formed UTF-8 (RFC 3629), and drafts of text that repeats."""

from collections.abc import Iterable

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
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


# Ids between the named special tokens and the end of the default vocabulary: rows of the embedding without a token.
RESERVED_IDS = range(262, 320)


class UTF8LogitsProcessor(LogitsProcessor):
    """Allows only ids that keep the text well-formed UTF-8.

    - Inside a character: the bytes that may continue it.
    - Between characters: the bytes that begin one and, if `max_length` is given, leave room to complete it; the named
      special tokens (ids 256 to 261); ids of 320 and more, which exist only where a vocabulary was enlarged; `token_ids`.
    - Never: bytes that no text contains, and the reserved ids 262 to 319 unless they are among `token_ids`.

    [`STLMForCausalLM`] uses it if `generation_config.valid_utf8` is set. A prompt may end inside a character; ill-formed
    bytes in the prompt are left alone.

    Args:
        max_length (`int`, *optional*):
            Length in ids at which generation stops, including the prompt. A character begun by the prompt is continued
            even if it does not fit.
        token_ids (`Iterable[int]`, *optional*):
            Reserved ids that have a meaning: those of tokens added to the tokenizer, or that end a text.
    """

    def __init__(self, max_length: int | None = None, token_ids: Iterable[int] = ()):
        self.max_length = max_length
        self.has_meaning = torch.ones(RESERVED_IDS.stop, dtype=torch.bool)
        self.has_meaning[sorted(set(RESERVED_IDS) - set(token_ids))] = False
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
            self.has_meaning = self.has_meaning.to(scores.device)
        state = input_ids.new_full((len(input_ids),), BETWEEN)
        # An incomplete character began within the last three bytes.
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
        allowed[:, : RESERVED_IDS.stop] &= self.has_meaning[: scores.shape[1]]
        return scores.masked_fill(~allowed, -torch.inf)


# Processors that forbid no byte of which a model is sure, and those that drafts would confuse.
KEEP_THE_LIKELIEST = TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper
COUNT_THEIR_CALLS = SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor


class RepeatCandidateGenerator(CandidateGenerator):
    """Drafts what followed the last bytes when they last came: prompt lookup decoding, with thresholds made for bytes.

    A pass over n bytes costs a model of pooled bytes several steps, and in any text a few bytes came before. So nothing is
    drafted unless `matched_bytes` bytes match, and then as many bytes as match. Nor is anything drafted for the first pass,
    which reads the prompt. [`STLMForCausalLM`] drafts so if `generation_config.prompt_lookup_num_tokens` is set and
    `max_matching_ngram_size` is not.

    Args:
        num_drafted (`int`): most bytes of a draft; taking back more than 63 is slow.
        max_length (`int`): length in ids at which generation stops, the prompt included.
        vocab_size (`int`): V, of the scores that `logits_processor` gets.
        eos_token_id (`torch.Tensor`, *optional*): ids that end a text, and a draft before them.
        logits_processor (`LogitsProcessorList`, *optional*): a draft ends before an id that it forbids.
        stopping_criteria (`StoppingCriteria`, *optional*): a draft ends before an id with which a text stops. The library
            asks only after each pass.
        matched_bytes (`int`, defaults to 16): fewest bytes that must match.

    Raises:
        ValueError: if `num_drafted` or `matched_bytes` is less than one.
    """

    def __init__(
        self,
        num_drafted: int,
        max_length: int,
        vocab_size: int,
        eos_token_id: torch.Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteria | None = None,
        matched_bytes: int = 16,
    ):
        if min(num_drafted, matched_bytes) < 1:
            raise ValueError(
                f"drafts have at least one byte and match at least one, got num_drafted={num_drafted} and "
                f"matched_bytes={matched_bytes}"
            )
        self.num_drafted, self.max_length, self.vocab_size = num_drafted, max_length, vocab_size
        self.matched_bytes, self.stopping_criteria = matched_bytes, stopping_criteria
        self.ends = set() if eos_token_id is None else set(eos_token_id.flatten().tolist())
        self.logits_processor = [p for p in logits_processor or () if not isinstance(p, KEEP_THE_LIKELIEST)]
        self.text: str | None = None  # a character for each id

    def get_candidates(self, input_ids: torch.LongTensor, **kwargs) -> tuple[torch.LongTensor, None]:
        """`input_ids (1, T)`, which go on from those of the call before; with a draft behind: (1, T + drafted)."""
        if self.text is None:
            self.text = _as_text(input_ids[0].tolist())
            return input_ids, None
        self.text += _as_text(input_ids[0, len(self.text) :].tolist())
        draft = self._allowed(input_ids, self._draft())
        return torch.cat([input_ids, input_ids.new_tensor([draft])], dim=1) if draft else input_ids, None

    def _draft(self) -> list[int]:
        text, matched = self.text, self.matched_bytes
        num_ids, room = len(text), min(self.num_drafted, self.max_length - len(text) - 1)
        end = matched + text.rfind(text[-matched:], 0, num_ids - 1)
        if num_ids <= matched or end < matched or room < 1:
            return []
        while matched < min(room, end) and text[end - matched - 1] == text[num_ids - matched - 1]:
            matched += 1
        period = num_ids - end
        return [ord(text[end + i % period]) for i in range(min(matched, room))]

    def _allowed(self, input_ids: torch.LongTensor, draft: list[int]) -> list[int]:
        """`draft` up to the first id that ends the text, or that is forbidden even to a model that is sure of it."""
        for i, drafted in enumerate(draft):
            if drafted in self.ends:
                return draft[:i]
            if not self.logits_processor and self.stopping_criteria is None:
                continue
            text = torch.cat([input_ids, input_ids.new_tensor([draft[: i + 1]])], dim=1)
            if self.stopping_criteria is not None and self.stopping_criteria(text, None).any():
                return draft[:i]
            scores = torch.zeros(1, self.vocab_size, device=input_ids.device).index_fill_(1, text[0, -1], 1e4)
            for processor in self.logits_processor:
                scores = processor(text[:, :-1], scores)
            if scores[0, drafted] <= torch.finfo(scores.dtype).min:
                return draft[:i]
        return draft


def _as_text(ids: Iterable[int]) -> str:
    return "".join(map(chr, ids))


__all__ = ["RepeatCandidateGenerator", "UTF8LogitsProcessor"]
