# SPDX-License-Identifier: Apache-2.0
"""What `generate` does with bytes: text that is always well-formed UTF-8 (RFC 3629)."""

import functools
import inspect
from collections.abc import Iterable

import torch
import transformers
from transformers import GenerationMixin, LogitsProcessor


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
        pad_token_id (`int`, *optional*):
            Id that is passed over: padding may stand between a prompt and its continuation.
    """

    def __init__(self, max_length: int | None = None, token_ids: Iterable[int] = (), pad_token_id: int | None = None):
        self.max_length, self.pad_token_id = max_length, pad_token_id
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
        last = input_ids[:, -3:]
        if self.pad_token_id is not None and (last == self.pad_token_id).any():
            last = input_ids.gather(1, (input_ids != self.pad_token_id).int().argsort(dim=1, stable=True)[:, -3:])
        for ids in last.clamp(max=256).unbind(1):
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


def refuse_empty_rows(attention_mask: torch.Tensor | None, copies: int) -> None:
    """Raise a `ValueError` for a prompt of padding alone: its logits are all zero, and its text would be noise."""
    if attention_mask is None or attention_mask.ndim != 2:
        return
    is_empty = ~(attention_mask != 0).any(-1)
    if is_empty.any():
        raise ValueError(
            f"row {int(is_empty.int().argmax()) // copies} is empty, nothing but padding: there is nothing to predict its first byte "
            "from. Begin it with bos_token, as `generate` does without inputs"
        )


# transformers 5.24 reads the whole text again after a cache that is not empty when bytes are drafted, and silently writes
# other bytes. Set to the release that fixes it, as (5, 25); `tests/test_private_api.py` tells.
DRAFTS_AFTER_A_CACHE_FIXED_IN: tuple[int, int] | None = None


class STLMGenerationMixin(GenerationMixin):
    """`generate` with one more option, `valid_utf8`, in its arguments or in the generation config.

    It never writes ids of tokens added to a tokenizer, which the model does not know: for those pass
    `logits_processor=LogitsProcessorList([UTF8LogitsProcessor(max_length, ids)])` in its place.

    The library has no public way to add an option or to check one, so this extends five of its private methods. They
    stand here together, and `tests/test_private_api.py` says what changed when one of them does.
    """

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        tokenizer = kwargs.get("tokenizer")
        extracted = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        # The library drops the streamer of a callable, whose reader would wait for ever, its assistant, and the tokenizer,
        # without which there are no stop strings.
        if callable(custom_generate):
            accepted = inspect.signature(custom_generate).parameters
            for name, value in (("streamer", streamer), ("assistant_model", assistant_model)):
                if value is not None and name not in accepted:
                    raise ValueError(f"custom_generate={custom_generate!r} takes no {name}")
            given = {"streamer": streamer, "assistant_model": assistant_model, "tokenizer": tokenizer}
            extracted |= {name: value for name, value in given.items() if value is not None and name in accepted}
        return extracted

    def _get_candidate_generator(self, *args, generation_config, model_kwargs, **kwargs):
        if (slots := generation_config.assistant_early_exit) is not None:
            first = getattr(self.config, "num_byte_layers", None)
            if first is None:
                raise ValueError("a committee has no assistant_early_exit: its members leave at different slots")
            if slots <= first:
                raise ValueError(
                    f"assistant_early_exit={slots} counts cache slots, expected at least {first + 1}: one for each of the "
                    f"{first} byte layers, one for patches, and one for each pass of the trunk that runs"
                )
        fixed, release = DRAFTS_AFTER_A_CACHE_FIXED_IN, tuple(map(int, transformers.__version__.split(".")[:2]))
        is_broken = fixed is None or release < fixed
        if is_broken and (num_past := model_kwargs["cache"].get_seq_length()):
            raise ValueError(
                f"the cache holds {num_past} bytes, after which transformers {transformers.__version__} would read the whole "
                "text again: with drafts (assistant_model, prompt_lookup_num_tokens), start with an empty cache"
            )
        return super()._get_candidate_generator(
            *args, generation_config=generation_config, model_kwargs=model_kwargs, **kwargs
        )

    @functools.wraps(GenerationMixin._assisted_decoding)  # whose parameters the library looks up
    def _assisted_decoding(self, *args, **kwargs):
        # An early exit lowers the number of slots for each draft, and one that fails would leave it so.
        num_slots = self.config.num_hidden_layers
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            if self.config.num_hidden_layers != num_slots:
                self.config.num_hidden_layers = num_slots

    def _prepare_generation_config(self, generation_config, *, valid_utf8: bool | None = None, **kwargs):
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if valid_utf8 is not None:
            generation_config.valid_utf8 = valid_utf8
        return generation_config, model_kwargs

    def _get_logits_processor(self, generation_config, *args, model_kwargs: dict | None = None, **kwargs):
        # All modes come by here, before the first forward pass, which cannot know that a row stays empty.
        copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)  # of each prompt
        refuse_empty_rows((model_kwargs or {}).get("attention_mask"), copies)
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        if getattr(generation_config, "valid_utf8", False):
            # The last place may be taken by an end of text.
            forced = generation_config.forced_eos_token_id is not None
            ends = generation_config._eos_token_tensor
            ends = () if ends is None else ends.flatten().tolist()
            # First, so that top-k and top-p choose among what is allowed.
            processors.insert(
                0, UTF8LogitsProcessor(generation_config.max_length - forced, ends, generation_config.pad_token_id)
            )
        return processors

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs):
        """With a static cache: the mask of the new bytes (B, T), or `None` if none is padding, so that shapes stay."""
        if attention_mask is None:
            return None
        attention_mask = attention_mask[:, attention_mask.shape[1] - inputs_embeds.shape[1] :]
        return None if attention_mask.all() else attention_mask


__all__ = ["STLMGenerationMixin", "UTF8LogitsProcessor"]
