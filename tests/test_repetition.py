# SPDX-License-Identifier: Apache-2.0
"""The learned repetition penalty equals a slow loop over texts alone, and breaks the loops of a model that it trains."""

import copy
import math
import random
import re

import pytest
import torch
from transformers import Trainer, set_seed

from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.objectives import Step, with_objectives
from modeling_stlm.training.repetition import LearnedRepetitionPenalty, repeating_ids

from .tiny import TEXT, ids_of, randomize, tiny_config, tiny_model
from .trainers import arguments


LOOP = "the old man saw a dog and "  # 26 bytes


def slow_repeating(text: bytes, context_bytes: int, distance: int) -> set[int]:
    """By regular expressions: what followed the last bytes of `text` earlier in it, if a word may begin now."""
    if len(text) <= context_bytes or re.search(rb"[0-9A-Za-z'\x80-\xff]\Z", text):
        return set()
    found = re.finditer(rb"(?s)(?=%b(.))" % re.escape(text[-context_bytes:]), text)
    return {each[1][0] for each in found if len(text) - each.start(1) <= distance}


@pytest.mark.parametrize(("context_bytes", "distance"), [(1, 400), (4, 50), (10, 256)])
def test_what_repeats(context_bytes, distance):
    texts = [(3 * LOOP + TEXT + LOOP).encode(), "Zoë, Zoë. 東京 東京 don't, don't — 1 1 1".encode() * 2]
    found = 0
    for text in texts:
        for end in range(1, len(text) + 1):
            repeating = repeating_ids(list(text[:end]), context_bytes, distance)
            assert repeating == slow_repeating(text[:end], context_bytes, distance)
            found += len(repeating)
    assert found > 5


def test_distance_counts_to_the_byte_that_repeats():
    ids = ids_of(
        LOOP + LOOP[:18]
    )  # "the old man saw a " for the second time: "dog" began 26 bytes before what follows
    assert repeating_ids(ids, 10, 26) == {ord("d")}
    assert repeating_ids(ids, 10, 25) == set()
    assert repeating_ids(ids[:-1], 10, 26) == set()  # within "a"


def one_by_one(objective: LearnedRepetitionPenalty, model, start, texts) -> float:
    """The divergence, byte by byte over texts alone."""
    total = count = 0.0
    for ids, prompt_length in texts:
        logits, before = (m(torch.tensor([ids])).logits[0].double() for m in (model, start))
        for i in range(prompt_length, len(ids)):
            repeating = repeating_ids(ids[:i], objective.context_bytes, objective.distance)
            wanted = before[i - 1].clone()
            for each in repeating:
                wanted[each] -= objective.penalty
            p, q = wanted.softmax(-1), logits[i - 1].softmax(-1)
            weight = 10 if repeating else 1
            total += weight * sum(p[v].item() * math.log(p[v].item() / q[v].item()) for v in range(len(p)))
            count += weight
    return total / count


def test_divergence_equals_texts_alone():
    start, model = tiny_model(), randomize(tiny_model())
    objective = LearnedRepetitionPenalty(penalty=3.0, distance=60)
    objective.prepare(start)
    texts = [(ids_of(3 * LOOP), 20), (ids_of(TEXT[:50]), 1), (ids_of(LOOP + "Zoë 東京, 東京"), 30)]
    with torch.no_grad():
        assert objective.divergence(model, texts).item() == pytest.approx(
            one_by_one(objective, model, start, texts), abs=1e-5
        )
        assert objective.divergence(start, texts[1:2]).item() == pytest.approx(0, abs=1e-6)  # nothing repeats
        assert objective.divergence(start, texts[:1]).item() > 1e-3


def step_of(model, rows: list[list[int]], labels: list[list[int]], documents: list[list[int]]) -> Step:
    ids = torch.tensor(rows)
    return Step(model, ids, torch.tensor(labels), torch.tensor(documents), None, None, {})


def test_prompts_are_bytes_of_one_document():
    objective, row = LearnedRepetitionPenalty(), [257, *ids_of("first text"), 258, 257, *ids_of("second"), 258]
    documents, labels = [0] * 12 + [1] * 8, [-100] * 3 + row[3:]
    random.seed(0)
    for _ in range(50):
        objective._collect(step_of(None, [row, row], [labels, [-100] * len(row)], [documents, documents]))
    assert len(objective.prompts) == 50  # none of the row without labels
    decoded = {bytes(i for i in prompt if i < 256).decode() for prompt in objective.prompts}
    assert all("first text".startswith(text) or "second".startswith(text) for text in decoded)
    assert {"first text", "second"} <= decoded
    objective._collect(step_of(None, [ids_of("x" * 500)], [ids_of("x" * 500)], [[0] * 500]))
    assert len(objective.prompts[-1]) <= 200


def test_texts_are_those_of_generate():
    model = tiny_model()
    objective = LearnedRepetitionPenalty(text_bytes=40)
    prompts = [ids_of("The fox"), ids_of("Zoë 東京, and more"), ids_of("x")]
    texts = objective._write(model, prompts)
    assert model.training
    for prompt, (ids, length) in zip(prompts, texts, strict=True):
        alone = model.eval().generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0].tolist()
        assert (ids, length) == (alone, len(prompt))


def repeated_share(model) -> float:
    """Of the windows of 16 bytes in greedy texts."""
    repeated = count = 0
    for prompt in (LOOP[:8], LOOP[4:15], "saw a dog and the o"):
        ids = model.eval().generate(torch.tensor([ids_of(prompt)]), do_sample=False, max_new_tokens=120)[0].tolist()
        windows = [tuple(ids[i : i + 16]) for i in range(len(prompt), len(ids) - 15)]
        repeated, count = repeated + len(windows) - len(set(windows)), count + len(windows)
    return repeated / count


def test_breaks_loops(tmp_path):
    """A model that goes on with the same words for ever leaves them after some steps with the penalty, and not without."""
    set_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in [ids_of(4 * LOOP)] * 8]
    options = {"learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_strategy": "no"}
    model = STLMForCausalLM(tiny_config(match_bytes=4, match_doublings=1))
    Trainer(model, arguments(tmp_path / "loops", max_steps=60, **options), train_dataset=data).train()
    assert repeated_share(model) > 0.6
    start = copy.deepcopy(model.state_dict())

    words = LOOP.split()
    texts = [ids_of(" ".join(words[i:] + words[:i]) + " ") for i in range(len(words))]  # in which nothing repeats
    data = [{"input_ids": ids, "labels": ids} for ids in texts * 8]
    shares = {}
    objective = LearnedRepetitionPenalty(num_texts=24, text_bytes=100, rows_per_call=8)
    for name, objectives in {"plain": [], "penalty": [objective]}.items():
        trained = copy.deepcopy(model)
        trained = with_objectives(trained, objectives) if objectives else trained
        Trainer(trained, arguments(tmp_path / name, max_steps=60, **options), train_dataset=data).train()
        shares[name] = repeated_share(trained)
    assert shares["penalty"] < 0.5 * shares["plain"]
    assert all(torch.equal(value, start[name]) for name, value in objective.start[0].state_dict().items())

    trained.save_pretrained(tmp_path / "saved")
    saved, info = STLMForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert repeated_share(saved) == shares["penalty"]


@pytest.mark.parametrize("wrong", [{"penalty": 0.0}, {"num_texts": 0}, {"distance": -1}, {"context_bytes": 0}])
def test_wrong_values(wrong):
    with pytest.raises(ValueError, match="penalty above 0 and sizes of at least 1"):
        LearnedRepetitionPenalty(**wrong)
