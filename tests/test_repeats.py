# SPDX-License-Identifier: Apache-2.0
"""Drafts of text that repeats itself: what is drafted, and that `generate` writes with them what it writes without."""

import random

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TextStreamer,
    TopPLogitsWarper,
)
from transformers.generation import PromptLookupCandidateGenerator

from modeling_stlm import STLMTokenizer
from modeling_stlm.generation_stlm import RepeatCandidateGenerator

from .test_generate import PROMPT, generate
from .test_generate_modes import OUTPUTS, SHAPING
from .tiny import MIXERS, PATCHING, TEXT, assert_equal, ids_of, tiny_model


DRAFTS = {"prompt_lookup_num_tokens": 20}
PLAIN = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 90}
TWICE = ids_of(TEXT[:60] * 2)
# Goes on as the prompt does, turns away, comes back, and repeats itself with a period below the fewest bytes matched.
WRITTEN = bytes(ids_of(TEXT[:25] + "Zoë!" + TEXT[5:40] + "so so so so so so so so so so so"))


class Follow(LogitsProcessor):
    """Has a model write `written` behind a prompt of `num_prompt` ids, and forbids no others, so that they are drafted."""

    def __init__(self, num_prompt: int, written: bytes | list[int] = WRITTEN):
        self.num_prompt, self.written = num_prompt, written

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = self.written[(input_ids.shape[1] - self.num_prompt) % len(self.written)]
        return scores.index_fill(1, torch.tensor(written), 1e6)


def repeats(num_drafted: int, max_length: int = 1000, **options) -> RepeatCandidateGenerator:
    """That has read the prompt, of one byte."""
    generator = RepeatCandidateGenerator(num_drafted, max_length, 320, **options)
    assert generator.get_candidates(torch.tensor([[0]]))[0].tolist() == [[0]], "nothing is drafted for the first pass"
    return generator


def draft_by_search(ids: list[int], num_drafted: int, max_length: int, matched_bytes: int = 16) -> list[int]:
    room = min(num_drafted, max_length - len(ids) - 1)
    for end in range(len(ids) - 1, matched_bytes - 1, -1):
        if ids[end - matched_bytes : end] == ids[len(ids) - matched_bytes :]:
            matched = next(n for n in range(end, 0, -1) if ids[end - n : end] == ids[len(ids) - n :])
            going_on = list(ids)
            for i in range(min(matched, room)):
                going_on.append(going_on[end + i])
            return going_on[len(ids) :]
    return []


@pytest.mark.parametrize("matched_bytes", [1, 2, 4])
@pytest.mark.parametrize("num_drafted", [1, 3, 20])
def test_drafts_are_what_followed_the_last_match(num_drafted, matched_bytes):
    chance, drafted = random.Random(0), 0
    for _ in range(60):
        ids, max_length = [0, chance.randrange(3)], chance.randrange(20, 60)
        generator = repeats(num_drafted, max_length, matched_bytes=matched_bytes)
        while len(ids) < max_length:
            found, logits = generator.get_candidates(torch.tensor([ids]))
            draft = draft_by_search(ids, num_drafted, max_length, matched_bytes)
            assert found[0].tolist() == ids + draft and logits is None
            drafted += len(draft)
            kept = chance.randint(0, len(draft))
            ids += [*draft[:kept], chance.choice([1, 2, 300])]
    assert drafted > 200


def test_periods_are_drafted_to_the_end():
    found, _ = repeats(30).get_candidates(torch.tensor([[0, *ids_of("abc " * 9)]]))
    assert bytes(found[0, 37:].tolist()) == ("abc " * 8)[:30].encode()


def test_a_draft_ends_before_what_may_not_be_written():
    ids = torch.tensor([[0, *ids_of("one two three four. one two three ")]])
    options = {"matched_bytes": 8}

    def draft(**more) -> bytes:
        return bytes(repeats(20, **options, **more).get_candidates(ids)[0][0, ids.shape[1] :].tolist())

    assert draft() == b"four. one two "  # as long as the match
    suppress = SuppressTokensLogitsProcessor([ord(".")])
    assert draft(logits_processor=LogitsProcessorList([TopPLogitsWarper(0.1), suppress])) == b"four"
    # The byte that completes a stop string is left to the model: the library looks for one after each pass.
    for stops, expected in (
        (["our."], b"four"),
        (["three f", "z"], b""),
        ("u", b"fo"),
        (["x" * 100], b"four. one two "),
    ):
        assert draft(stopping_criteria=StopStringCriteria(STLMTokenizer(), stops)) == expected
    assert draft(eos_token_id=torch.tensor([32, 256])) == b"four."


def passes(model, options: dict, inputs: dict | None = None) -> tuple[list[int], object]:
    """How many bytes each pass of the model read, and what `generate` returned."""
    read = []

    def note(_, __, fed: dict) -> None:
        (fed_bytes,) = (fed[name].shape[1] for name in ("input_ids", "inputs_embeds") if fed.get(name) is not None)
        read.append(fed_bytes)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    found = generate(model, inputs or {"input_ids": torch.tensor([TWICE])}, True, **options)
    handle.remove()
    return read, found


@pytest.mark.parametrize("patching", PATCHING)
@pytest.mark.parametrize("mixer", MIXERS)
def test_repeats_take_fewer_passes_to_the_same_logits(patching, mixer):
    model = tiny_model(**PATCHING[patching], **MIXERS[mixer])
    wanted = PLAIN | OUTPUTS | {"output_hidden_states": True, "logits_processor": [Follow(120)]}
    (many, expected), (few, got) = passes(model, wanted), passes(model, wanted | DRAFTS)
    assert many == [120, *[1] * 89] and len(few) < 65
    assert sum(few) > sum(many) + 20, "some drafts were taken back"
    assert torch.equal(got.sequences, expected.sequences)
    assert bytes(got.sequences[0, 120:].tolist()) == WRITTEN[:90]
    assert_equal(torch.stack(got.logits, 1), torch.stack(expected.logits, 1))
    for states, expected_states in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert_equal(states[-1], expected_states[-1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_new_tokens": 400, "valid_utf8": True},
        {"repetition_penalty": 1.05},
        {"max_length": 290, "max_new_tokens": None},
        {"no_repeat_ngram_size": 40},
    ],
    ids=["greedy", "utf8", "penalty", "length", "ngrams"],
)
def test_repeats_change_no_byte_of_a_greedy_text(options):
    model = tiny_model(num_trunk_layers=1)  # its text repeats itself
    options = PLAIN | {"max_new_tokens": 200} | options
    (many, expected), (few, got) = passes(model, options), passes(model, options | DRAFTS)
    assert torch.equal(got, expected) and len(few) < len(many) - 5


@pytest.mark.parametrize(
    "end",
    [
        {"eos_token_id": WRITTEN[17]},
        {"eos_token_id": [7, WRITTEN[17]]},
        {"stop_strings": WRITTEN[14:18].decode(), "tokenizer": STLMTokenizer()},
        {"stop_strings": ["never", WRITTEN[17:18].decode()], "tokenizer": STLMTokenizer()},
    ],
    ids=["token", "tokens", "string", "strings"],
)
def test_a_text_ends_where_it_ended_without_drafts(end):
    model = tiny_model()
    end = PLAIN | {"min_new_tokens": 0, "logits_processor": [Follow(120)]} | end
    (many, expected), (few, got) = passes(model, end), passes(model, end | DRAFTS)
    assert torch.equal(got, expected) and got.shape[1] <= 120 + 18
    assert len(few) < len(many) - 5


def test_a_turn_ends_with_the_token_that_a_stop_string_names():
    model, turn = tiny_model(), [260, *ids_of("user\nthe same again?"), 261, 10]
    options = PLAIN | {"stop_strings": "<|im_end|>", "tokenizer": STLMTokenizer(), "min_new_tokens": 0}
    options |= {"logits_processor": [Follow(2 * len(turn), turn)]}
    inputs = {"input_ids": torch.tensor([turn * 2])}
    (many, expected), (few, got) = (passes(model, options | drafts, inputs) for drafts in ({}, DRAFTS))
    assert torch.equal(got, expected) and got[0, 2 * len(turn) :].tolist() == turn[:-1]
    assert len(few) < len(many) - 10


def test_a_grammar_is_asked_only_about_what_it_allows():
    model, text = tiny_model(), torch.tensor([*TWICE, *WRITTEN])

    def following(row: int, ids: torch.Tensor) -> list[int]:
        if torch.equal(ids, text[: len(ids)]):
            return [int(text[len(ids)])]
        raise AssertionError("a prefix that was never allowed")

    options = PLAIN | {"prefix_allowed_tokens_fn": following}
    (many, expected), (few, got) = passes(model, options), passes(model, options | DRAFTS)
    assert torch.equal(got, expected) and bytes(got[0, 120:].tolist()) == WRITTEN[:90]
    assert len(few) < len(many) - 20


@pytest.mark.parametrize("start", ["padded", "ids and embeddings", "embeddings", "one byte"])
def test_drafts_go_on_from_every_start(start):
    model, ids = tiny_model(), torch.tensor([TWICE])
    embeddings = model.get_input_embeddings()(ids).detach()
    padded = torch.nn.functional.pad(ids, (7, 0), value=256)
    inputs, num_prompt = {
        "padded": ({"input_ids": padded, "attention_mask": (padded != 256).long()}, 127),
        "ids and embeddings": ({"input_ids": ids, "inputs_embeds": embeddings}, 120),
        "embeddings": ({"inputs_embeds": embeddings}, 0),
        "one byte": ({"input_ids": ids[:, :1]}, 1),
    }[start]
    options = PLAIN | OUTPUTS | {"max_new_tokens": 200, "logits_processor": [Follow(num_prompt)]}
    (many, expected), (few, got) = (passes(model, options | drafts, inputs) for drafts in ({}, DRAFTS))
    assert torch.equal(got.sequences, expected.sequences) and len(few) < len(many) - 50
    assert_equal(torch.stack(got.logits, 1), torch.stack(expected.logits, 1))


class Pieces(TextStreamer):
    def __init__(self):
        super().__init__(STLMTokenizer(), skip_prompt=True)
        self.pieces = []

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())


def test_drafts_are_streamed_as_they_are_confirmed():
    model, pieces = tiny_model(), Pieces()
    passes(model, PLAIN | DRAFTS | {"logits_processor": [Follow(120)], "streamer": pieces})
    prompt, *written = pieces.pieces
    assert (
        prompt == TWICE
        and bytes(byte for piece in written for byte in piece) == WRITTEN[:90]
        and max(map(len, written)) > 5
    )


@pytest.mark.slow
def test_drafts_leave_the_distribution_of_samples_as_it_is():
    """Two drafted bytes, sampled, against the probabilities of the model (chi-squared test)."""
    model = tiny_model()
    # The first pass drafts nothing: it reads all but the last id and writes that one. The two ids behind it are drafted.
    start = next(n for n in range(len(TWICE) - 30, len(TWICE)) if len(set(draft_by_search(TWICE[:n], 2, 1000))) == 2)
    whole = torch.tensor([TWICE[:start]])
    ids, forced, drafted = whole[:, :-1], whole[0, -1:], torch.tensor(draft_by_search(TWICE[:start], 2, 1000))
    logits = model(whole).logits[0, -1]
    bias = logits.logsumexp(-1) - logits[drafted]  # makes each about as likely as all others together

    def processor(input_ids, scores):
        if input_ids.shape[1] == start - 1:
            return torch.full_like(scores, -torch.inf).index_fill(1, forced, 0.0)
        return scores.index_add(1, drafted, bias.expand(len(scores), -1))

    both = torch.cat([whole.expand(320, -1), torch.arange(320)[:, None]], dim=1)
    first = processor(whole, logits[None]).softmax(-1)[0]
    second = processor(both, model(both).logits[:, -1]).softmax(-1)
    kinds = torch.full((320,), 2)  # the two drafted bytes, and all others
    kinds[drafted] = torch.arange(2)
    probabilities, counts = torch.zeros(3, 3), torch.zeros(3, 3)
    for byte in range(320):
        probabilities[kinds[byte]].index_add_(0, kinds, first[byte] * second[byte])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 4, "eos_token_id": None, "min_new_tokens": 0}
    options |= DRAFTS | {"logits_processor": [processor]}
    assert passes(model, options, {"input_ids": ids})[0][:2] == [start - 1, 3], "two bytes are drafted"
    torch.manual_seed(0)
    for _ in range(1000):
        text = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
        counts[kinds[text[0, start]], kinds[text[0, start + 1]]] += 1
    expected = 1000 * probabilities
    assert expected.min() > 5 and expected[0, 1] > 50, "both drafts are confirmed often"
    assert ((counts - expected) ** 2 / expected).sum() < 26.1, "one run in a thousand, with 8 degrees of freedom"


@pytest.mark.parametrize(
    "drafts", [DRAFTS, DRAFTS | {"max_matching_ngram_size": 2}, {"assistant_model": tiny_model()}]
)
def test_drafts_on_a_cache_that_holds_a_turn_are_refused(drafts):
    model, ids = tiny_model(), torch.tensor([TWICE])
    cache = DynamicCache(config=model.config)
    generate(model, {"input_ids": ids}, True, **PLAIN, past_key_values=cache)
    with pytest.raises(ValueError, match="behind the 209 bytes that the cache holds"):
        generate(model, {"input_ids": ids.repeat(1, 3)}, True, **PLAIN, past_key_values=cache, **drafts)


@pytest.mark.parametrize("options", [{"guidance_scale": 2.0}, SHAPING["synth_id"]], ids=["guidance", "watermark"])
@pytest.mark.parametrize("matching", [None, 2])
def test_drafts_with_processors_that_count_their_calls_are_refused(options, matching):
    options = options | DRAFTS | {"max_matching_ngram_size": matching}
    with pytest.raises(ValueError, match="Processor counts its calls"):
        generate(tiny_model(), {"input_ids": PROMPT}, True, **options)


def test_the_way_of_the_library_is_one_option_away():
    model, options = tiny_model(), {"input_ids": PROMPT, "inputs_tensor": PROMPT}
    options["model_kwargs"] = {"past_key_values": DynamicCache(config=model.config)}
    options["logits_processor"] = LogitsProcessorList()
    for matching, kind in ((None, RepeatCandidateGenerator), (2, PromptLookupCandidateGenerator)):
        config, _ = model._prepare_generation_config(None, **DRAFTS, max_matching_ngram_size=matching, max_length=99)
        model._prepare_special_tokens(config, True)
        assert type(model._get_candidate_generator(generation_config=config, **options)) is kind


def test_numbers_of_drafted_bytes_are_checked():
    with pytest.raises(ValueError, match="num_output_tokens"):  # by the library
        generate(tiny_model(), {"input_ids": PROMPT}, True, prompt_lookup_num_tokens=0)
    with pytest.raises(ValueError, match="got num_drafted=3 and matched_bytes=0"):
        RepeatCandidateGenerator(3, 100, 320, matched_bytes=0)
