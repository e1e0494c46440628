# SPDX-License-Identifier: Apache-2.0
"""Drafts of text that repeats itself: what is drafted, and that `generate` writes with them what it writes without."""

import random

import pytest
import torch
from transformers.generation import PromptLookupCandidateGenerator

from modeling_stlm.generation_stlm import RepeatCandidateGenerator

from .test_generate import PROMPT, generate
from .test_generate_modes import OUTPUTS, Replay
from .tiny import MIXERS, PATCHING, TEXT, assert_equal, ids_of, tiny_model


DRAFTS = {"prompt_lookup_num_tokens": 20}
GREEDY = {"do_sample": False, "eos_token_id": None}


def draft_by_search(ids: list[int], num_drafted: int, max_length: int, matched_bytes: int) -> list[int]:
    room = min(num_drafted, max_length - len(ids) - 1)
    for place in range(len(ids) - 1, matched_bytes - 1, -1):
        if ids[place - matched_bytes : place] == ids[len(ids) - matched_bytes :]:
            matched = next(n for n in range(place, 0, -1) if ids[place - n : place] == ids[len(ids) - n :])
            going_on = list(ids)
            for i in range(min(matched, room)):
                going_on.append(going_on[place + i])
            return going_on[len(ids) :]
    return []


@pytest.mark.parametrize("matched_bytes", [1, 2, 4])
@pytest.mark.parametrize("num_drafted", [1, 3, 20])
def test_drafts_are_what_followed_the_last_match(num_drafted, matched_bytes):
    generator_of_texts, drafted = random.Random(0), 0
    for _ in range(60):
        ids, max_length = [generator_of_texts.randrange(3)], generator_of_texts.randrange(20, 60)
        repeats = RepeatCandidateGenerator(num_drafted, max_length, matched_bytes)
        while len(ids) < max_length:
            found, logits = repeats.get_candidates(torch.tensor([ids]))
            draft = draft_by_search(ids, num_drafted, max_length, matched_bytes)
            assert found[0].tolist() == ids + draft and logits is None
            drafted += len(draft)
            kept = generator_of_texts.randint(0, len(draft))
            ids += [*draft[:kept], generator_of_texts.randrange(3)]
    assert drafted > 200


def test_periods_are_drafted_to_the_end():
    found, _ = RepeatCandidateGenerator(30, 1000).get_candidates(torch.tensor([ids_of("abc " * 9)]))
    assert bytes(found[0, 36:].tolist()) == ("abc " * 8)[:30].encode()


def passes(model, options: dict) -> tuple[int, object]:
    """How often the model ran, and what `generate` returned."""
    ids = torch.tensor([ids_of(TEXT[:60] * 2)])
    ran = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    found = generate(model, {"input_ids": ids}, True, **{"max_new_tokens": 90} | options)
    handle.remove()
    return len(ran), found


@pytest.mark.parametrize("patching", PATCHING)
@pytest.mark.parametrize("mixer", MIXERS)
def test_repeats_take_fewer_passes_to_the_same_logits(patching, mixer):
    model = tiny_model(**PATCHING[patching], **MIXERS[mixer])
    # Goes on as the prompt does, turns away, comes back, and repeats itself with a period below the fewest bytes matched.
    written = bytes(ids_of(TEXT[:25] + "Zoë!" + TEXT[5:40] + "so so so so so so so so so"))
    wanted = GREEDY | OUTPUTS | {"logits_processor": [Replay(written, 120)]}
    (many, expected), (few, got) = passes(model, wanted), passes(model, wanted | DRAFTS)
    assert many == 90 and few < 60
    assert torch.equal(got.sequences, expected.sequences)
    assert bytes(got.sequences[0, 120:].tolist()) == written[:90]
    assert_equal(torch.stack(got.logits, 1), torch.stack(expected.logits, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"valid_utf8": True, "max_new_tokens": 400},
        {"repetition_penalty": 1.05},
        {"max_length": 290, "max_new_tokens": None},
    ],
    ids=["greedy", "utf8", "penalty", "length"],
)
def test_repeats_change_no_byte_of_a_greedy_text(options):
    model = tiny_model(num_trunk_layers=1)  # its text repeats itself
    options = GREEDY | {"max_new_tokens": 200} | options
    (many, expected), (few, got) = passes(model, options), passes(model, options | DRAFTS)
    assert torch.equal(got, expected) and few < many == expected.shape[1] - 120


def test_a_text_ends_where_it_ended_without_drafts():
    model = tiny_model()
    written = bytes(ids_of(TEXT[:60]))
    end = GREEDY | {"eos_token_id": written[17], "min_new_tokens": 0, "logits_processor": [Replay(written, 120)]}
    (many, expected), (few, got) = passes(model, end), passes(model, end | DRAFTS)
    assert torch.equal(got, expected) and got.shape[1] == 120 + written.index(written[17]) + 1
    assert few < many


@pytest.mark.slow
def test_drafts_leave_the_distribution_of_samples_as_it_is():
    """Two sampled bytes, the first of which is drafted, against the probabilities of the model (chi-squared test)."""
    model, ids = tiny_model(), torch.tensor([ids_of(TEXT[:40] * 2)])
    drafted = RepeatCandidateGenerator(20, 1000).get_candidates(ids)[0][0, 80].item()
    logits = model(ids).logits[0, -1]
    bias = (logits.logsumexp(-1) - logits[drafted]).item()  # makes the drafted byte about as likely as all others
    both = torch.cat([ids.expand(320, -1), torch.arange(320)[:, None]], dim=1)
    logits = torch.stack([logits, *model(both).logits[:, -1]])
    logits[:, drafted] += bias
    first, *second = logits.softmax(-1)
    kinds = 1 + torch.arange(320) % 2  # the drafted byte, and two groups of others
    kinds[drafted] = 0
    probabilities, counts = torch.zeros(3, 3), torch.zeros(3, 3)
    for byte in range(320):
        probabilities[kinds[byte]].index_add_(0, kinds, first[byte] * second[byte])
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "eos_token_id": None}
    options |= {"sequence_bias": {(drafted,): bias}, "use_cache": True}
    torch.manual_seed(0)
    for _ in range(1000):
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **DRAFTS)
        counts[kinds[text[0, 80]], kinds[text[0, 81]]] += 1
    expected = 1000 * probabilities
    assert expected.min() > 5 and 300 < counts[0].sum() < 700
    assert ((counts - expected) ** 2 / expected).sum() < 26.1, "one run in a thousand, with 8 degrees of freedom"


def test_the_way_of_the_library_is_one_option_away():
    model, options = tiny_model(), {"input_ids": PROMPT, "inputs_tensor": PROMPT, "model_kwargs": {}}
    options["logits_processor"] = []
    for matching, kind in ((None, RepeatCandidateGenerator), (2, PromptLookupCandidateGenerator)):
        config, _ = model._prepare_generation_config(None, **DRAFTS, max_matching_ngram_size=matching, max_length=99)
        model._prepare_special_tokens(config, True)
        assert type(model._get_candidate_generator(generation_config=config, **options)) is kind


def test_numbers_of_drafted_bytes_are_checked():
    with pytest.raises(ValueError, match="num_output_tokens"):
        generate(tiny_model(), {"input_ids": PROMPT}, True, prompt_lookup_num_tokens=0)
    with pytest.raises(ValueError, match="got num_drafted=3 and matched_bytes=0"):
        RepeatCandidateGenerator(3, 100, matched_bytes=0)
