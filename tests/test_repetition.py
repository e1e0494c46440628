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
from modeling_stlm.training import repetition
from modeling_stlm.training.objectives import Step, with_objectives
from modeling_stlm.training.repetition import LearnedRepetitionPenalty, repeating_ids

from .tiny import PATCHING, TEXT, batch, ids_of, tiny_config, tiny_model
from .trainers import arguments


LOOP = "the old man saw a dog and "  # 26 bytes


def slow_repeating(text: bytes, context_bytes: int, distance: int) -> set[int]:
    """By regular expressions: what followed the last bytes of `text` earlier in it, if a word may begin now."""
    if len(text) <= context_bytes or re.search(rb"[0-9A-Za-z'\x80-\xff]\Z", text):
        return set()
    has_word = re.search(rb"[0-9A-Za-z'\x80-\xff]", text[-context_bytes:])
    repeated = rb"[0-9A-Za-z'\x80-\xff]" if has_word else b"(?s:.)"
    found = re.finditer(rb"(?=%b(%b))" % (re.escape(text[-context_bytes:]), repeated), text)
    return {each[1][0] for each in found if len(text) - each.start(1) <= distance}


@pytest.mark.parametrize(("context_bytes", "distance"), [(1, 400), (4, 50), (10, 256)])
def test_what_repeats(context_bytes, distance):
    texts = [
        (3 * LOOP + TEXT + LOOP).encode(),
        b"rows of - - - - - - - - - -\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n",
        "Zoë, Zoë. 東京 東京 don't, don't — 1 1 1".encode() * 2,
    ]
    found = 0
    for text in texts:
        for end in range(1, len(text) + 1):
            repeating = repeating_ids(list(text[:end]), context_bytes, distance)
            assert repeating == slow_repeating(text[:end], context_bytes, distance)
            found += len(repeating)
    assert found > 5


def test_distance_counts_to_the_byte_that_repeats():
    # "the old man saw a " for the second time: "dog" began 26 bytes before what follows.
    ids = ids_of(LOOP + LOOP[:18])
    assert repeating_ids(ids, 10, 26) == {ord("d")}
    assert repeating_ids(ids, 10, 25) == set()
    assert repeating_ids(ids[:-1], 10, 26) == set()  # within "a"
    assert repeating_ids(ids_of("Yes, a dog, a dog,"), 5, 50) == set()  # the space is no word


def one_by_one(objective: LearnedRepetitionPenalty, model, start, texts) -> float:
    """The divergence, byte by byte over texts alone."""
    total = count = 0.0
    for ids, prompt_length, _ in texts:
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


@pytest.mark.parametrize("patching", PATCHING)
def test_divergence_equals_texts_alone(patching):
    start = tiny_model(**PATCHING[patching])
    model = copy.deepcopy(start)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    objective = LearnedRepetitionPenalty(penalty=3.0, distance=60)
    objective.prepare(start)
    pairs = [(ids_of(3 * LOOP), 20), (ids_of(TEXT[:50]), 1), (ids_of(LOOP + "Zoë 東京, 東京"), 30)]
    texts = [objective.text(*pair) for pair in pairs]
    assert [bool(text.repeating) for text in texts] == [True, False, False]
    with torch.no_grad():
        expected = one_by_one(objective, model, start, texts)
        assert objective.divergence(model, texts).item() == pytest.approx(expected, rel=1e-4) and expected > 1e-3
        assert objective.divergence(start, texts[1:2]).item() == pytest.approx(0, abs=1e-6)  # nothing repeats
        assert objective.divergence(start, texts[:1]).item() > 1e-4


def step_of(model, rows: list[list[int]], labels: list[list[int]], documents: list[list[int]]) -> Step:
    ids = torch.tensor(rows)
    return Step(model, ids, torch.tensor(labels), torch.tensor(documents), None, None, {})


def test_prompts_are_bytes_of_one_document():
    row = [257, *ids_of("first text"), 258, 257, *ids_of("second"), 258]
    documents, labels = [0] * 12 + [1] * 8, [-100] * 3 + row[3:]
    step = step_of(None, [row, row], [labels, [-100] * len(row)], [documents, documents])
    random.seed(0)
    drawn = [LearnedRepetitionPenalty._prompts(step) for _ in range(50)]
    assert {len(prompts) for prompts in drawn} == {1}  # none of the row without labels
    decoded = {bytes(i for i in prompts[0] if i < 256).decode() for prompts in drawn}
    assert all("first text".startswith(text) or "second".startswith(text) for text in decoded)
    assert {"first text", "second"} <= decoded
    long = step_of(None, [ids_of("x" * 500)], [ids_of("x" * 500)], [[0] * 500])
    assert max(len(LearnedRepetitionPenalty._prompts(long)[0]) for _ in range(50)) == 200


def test_texts_are_greedy_whatever_the_generation_config_says():
    model = tiny_model()
    objective = LearnedRepetitionPenalty(text_bytes=40)
    prompts = [ids_of("The fox"), ids_of("Zoë 東京, and more"), ids_of("x")]
    alone = [model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=40)[0].tolist() for p in prompts]
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, num_return_sequences=3, max_length=30)
    own = model.generation_config
    texts = objective.write(model, prompts)
    assert [(text.ids, text.prompt_length) for text in texts] == [(a, len(p)) for a, p in zip(alone, prompts)]
    assert model.training and model.generation_config is own


@pytest.mark.parametrize("as_list", [False, True])
def test_texts_stop_after_the_end(as_list):
    model = tiny_model()
    prompts = [ids_of("The fox"), ids_of("x")]
    whole = [text.ids for text in LearnedRepetitionPenalty(text_bytes=40).write(model, prompts)]
    end = whole[0][len(prompts[0]) + 10]
    model.config.eos_token_id = [300, end] if as_list else end
    for text, prompt, ids in zip(LearnedRepetitionPenalty(text_bytes=40).write(model, prompts), prompts, whole):
        new = ids[len(prompt) :]
        assert text.ids == prompt + new[: new.index(end) + 1 if end in new else len(new)]
    model.config.pad_token_id = None
    assert LearnedRepetitionPenalty(text_bytes=40).write(model, prompts)[0].ids[-1] == end


def test_the_loss_has_the_mean_of_the_drawn_texts_from_the_48th_call_on():
    model = tiny_model()
    objective = LearnedRepetitionPenalty(num_texts=5, text_bytes=60, rows_per_call=5, context_bytes=1)
    trained = with_objectives(model, [(objective, 0.5)]).train()
    ids = torch.tensor([ids_of(TEXT)[:80], ids_of(TEXT)[80:160]])
    plain = model(ids, labels=ids).loss.item()
    for call in range(1, 50):
        with torch.no_grad():
            loss = trained(ids, labels=ids, num_items_in_batch=torch.tensor(400)).loss.item()
        assert len(objective.texts) == (0 if call < 48 else 5)
        expected = one_by_one(objective, model, model, objective.texts) if objective.texts else 0
        # 158 of 400 predicted bytes are of this call
        assert loss == pytest.approx((plain + 0.5 * expected) * 158 / 400, rel=1e-4)
    assert expected > 1e-3
    assert not trained(ids, labels=torch.full_like(ids, -100), num_items_in_batch=torch.tensor(400)).loss


@pytest.mark.parametrize("layout", ["left", "packed"])
def test_the_batch_follows_the_start(layout):
    """Before there are texts the objective is the divergence on the bytes with labels, whatever stands around them."""
    model = tiny_model()
    trained = with_objectives(copy.deepcopy(model), [LearnedRepetitionPenalty()]).train()
    with torch.no_grad():
        for weight in trained.parameters():
            weight.mul_(1.1)
    documents, total, count = [ids_of(TEXT)[:50], ids_of("Zoë 東京, and more")], 0.0, 0
    for ids in documents:
        before, after = (m.eval()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for m in (model, trained))
        total, count = total + (before.exp() * (before - after)).sum().item(), count + len(ids) - 1
    if layout == "packed":
        ids = torch.tensor([documents[0] + documents[1]])
        positions = torch.cat([torch.arange(len(each)) for each in documents])[None]
        inputs = {"position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    else:
        inputs = batch(documents, "left")
        ids = inputs.pop("input_ids")
        inputs["labels"] = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    plain = trained.eval()(ids, **inputs).loss.item()
    loss = trained.train()(ids, **inputs).loss.item()
    assert loss == pytest.approx(plain + total / count, rel=1e-4) and total > 1e-2


def test_embeddings_that_were_resized_are_refused():
    model = tiny_model()
    objective = LearnedRepetitionPenalty()
    objective.prepare(model)
    model.resize_token_embeddings(330)
    with pytest.raises(ValueError, match=r"expected the 320 ids of the model .* got 330"):
        objective.divergence(model, [objective.text(ids_of(LOOP), 5)])


def repeated_share(model) -> float:
    """Of the windows of 16 bytes in greedy texts."""
    repeated = count = 0
    for prompt in (LOOP[:8], LOOP[4:15], "saw a dog and the o"):
        ids = model.eval().generate(torch.tensor([ids_of(prompt)]), do_sample=False, max_new_tokens=120)[0].tolist()
        windows = [tuple(ids[i : i + 16]) for i in range(len(prompt), len(ids) - 15)]
        repeated, count = repeated + len(windows) - len(set(windows)), count + len(windows)
    return repeated / count


def test_breaks_loops(tmp_path, monkeypatch):
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
    monkeypatch.setattr(repetition, "CALLS_BETWEEN", 6)
    objective = LearnedRepetitionPenalty(num_texts=24, text_bytes=100, rows_per_call=8)
    for name, objectives in {"plain": [], "penalty": [(objective, 4.0)]}.items():
        trained = copy.deepcopy(model)
        trained = with_objectives(trained, objectives) if objectives else trained
        Trainer(trained, arguments(tmp_path / name, max_steps=60, **options), train_dataset=data).train()
        shares[name] = repeated_share(trained)
    assert shares["plain"] > 0.5 and shares["penalty"] < 0.5 * shares["plain"]
    assert all(torch.equal(value, start[name]) for name, value in objective.start[0].state_dict().items())

    trained.save_pretrained(tmp_path / "saved")
    saved, info = STLMForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert repeated_share(saved) == shares["penalty"]


@pytest.mark.parametrize("wrong", [{"penalty": 0.0}, {"penalty": math.inf}, {"num_texts": 0}, {"distance": 2.0}])
def test_wrong_values(wrong):
    with pytest.raises(ValueError, match="a penalty above 0 and whole numbers of at least 1, got"):
        LearnedRepetitionPenalty(**wrong)
