# SPDX-License-Identifier: Apache-2.0
"""Objectives beside the next byte equal slow loops over rows alone, and leave a plain causal model behind."""

import importlib
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, set_seed

from modeling_stlm import STLMForCausalLM, STLMForMaskedLM
from modeling_stlm.training import objectives as objectives_of_bytes
from modeling_stlm.training.objectives import (
    Denoising,
    EarlyExit,
    MaskedNextByte,
    MultiByte,
    NextThought,
    Objective,
    PatchReconstruction,
    random_spans,
    with_objectives,
)

from .test_distributed import run
from .tiny import PATCHING, SHARING, TEXT, batch, ids_of, randomize, tiny_config, tiny_model
from .trainers import RAGGED, arguments, assert_same_training, losses, weights


TEXTS = [
    ids_of("One sentence. Two words!\nThree 3? Four.Five\n\nSix"),
    ids_of("x"),
    ids_of("No end in sight, Zoë 東京"),
    ids_of(TEXT[:70]),
]
ALL = {
    "multi_byte": lambda: MultiByte(3),
    "patch_reconstruction": PatchReconstruction,
    "next_thought": NextThought,
    "masked_next_byte": lambda: MaskedNextByte(0.2),
    "denoising": lambda: Denoising(0.2, 0.2),
    "early_exit": lambda: EarlyExit(1),
}


# Slow references: the loss of one document alone, summed over its bytes.


def outputs_of(model: STLMForCausalLM, ids: list[int]):
    return model(torch.tensor([ids]), output_hidden_states=True, output_boundaries=True)


def nats(logits: torch.Tensor, target: int) -> torch.Tensor:
    return -logits.log_softmax(-1)[target]


def multi_byte(model, objective, ids, labels):
    hidden = outputs_of(model, ids).hidden_states[-1][0]
    total = torch.tensor(0.0)
    for t in range(len(ids)):
        for ahead in (2, 3):
            if t + ahead < len(ids):
                state = hidden[t] + objective.projections[ahead - 2](hidden[t])
                total = total + nats(model.lm_head(state), ids[t + ahead]) / 2
    return total


def patch_reconstruction(model, objective, ids, labels):
    outputs = outputs_of(model, ids)
    encoded = outputs.hidden_states[model.config.num_local_encoder_layers][0]
    total, start = torch.tensor(0.0), 0
    for end in outputs.boundaries[0].nonzero()[:, 0].tolist():
        pooled = torch.cat([encoded[start : end + 1].mean(0), encoded[end]])
        places = objective.places(model.model.patcher.patch_proj(pooled)).view(-1, model.config.hidden_size)
        for place, t in enumerate(range(start, end + 1)):
            if labels[t] != -100:
                total = total + nats(model.lm_head(places[place]), ids[t])
        start = end + 1
    return total


def next_thought(model, objective, ids, labels):
    hidden = outputs_of(model, ids).hidden_states[-1][0]
    sentences = [sentence for sentence in re.split(rb"(?<=\n)|(?<=[.!?] )", bytes(ids)) if sentence]
    total, start = torch.tensor(0.0), 0
    for sentence, following in pairwise(sentences):
        end = start + len(sentence)
        latent = hidden[end : end + len(following)].mean(0).detach()
        distance = 1 - F.cosine_similarity(objective.projection(hidden[end - 1]), latent, dim=0)
        total = total + distance * len(following)
        start = end
    return total


def is_masked(ids) -> torch.Tensor:
    """Instead of chance: bytes by their values, so that rows alone are masked as in a batch."""
    return ids % 4 == 1


def masked_next_byte(model, objective, ids, labels):
    encoder = STLMForMaskedLM(tiny_config(**model.overrides, is_causal=False))
    encoder.load_state_dict(model.state_dict())
    seen = torch.tensor([ids])
    seen = seen.masked_fill(is_masked(seen), 259)
    logits = encoder.eval()(seen).logits[0]
    positions = [t for t in range(1, len(ids)) if is_masked(torch.tensor(ids[t]))]
    return sum((nats(logits[t - 1], ids[t]) for t in positions), torch.tensor(0.0)) / 0.2


def denoising(model, objective, ids, labels):
    logits = model(objective.damage(torch.tensor([ids]))).logits[0]
    return sum((nats(logits[t - 1], ids[t]) for t in range(1, len(ids))), torch.tensor(0.0))


def early_exit(model, objective, ids, labels):
    shallow = STLMForCausalLM(tiny_config(**model.overrides, num_trunk_layers=1))
    shallow.load_state_dict(model.state_dict(), strict=False)
    logits = shallow.eval()(torch.tensor([ids])).logits[0]
    return sum((nats(logits[t - 1], ids[t]) for t in range(1, len(ids))), torch.tensor(0.0))


def inputs_of(layout: str) -> dict[str, torch.Tensor]:
    if layout == "packed":
        packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": ids} for ids in TEXTS])
        return {name: value for name, value in packed.items() if isinstance(value, torch.Tensor)}
    inputs = batch(TEXTS, "right" if layout == "packed and padded" else layout)
    if layout == "packed and padded":  # one more document after the others, in the padding
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        inputs["position_ids"] = torch.arange(ids.shape[1]).repeat(len(ids), 1) * mask
        ids[1, 1 : 1 + len(TEXTS[2])], mask[1, 1 : 1 + len(TEXTS[2])] = torch.tensor(TEXTS[2]), 1
        inputs["position_ids"][1, 1 : 1 + len(TEXTS[2])] = torch.arange(len(TEXTS[2]))
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def num_predicted(inputs: dict) -> int:
    """Labels of all bytes but the first of each row, of which there is one after padding on the left, too."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["labels"]))
    rows = (row[seen == 1][1:] for row, seen in zip(inputs["labels"], mask))
    return sum(int((row != -100).sum()) for row in rows)


@pytest.fixture
def without_chance(monkeypatch):
    monkeypatch.setattr(objectives_of_bytes, "random_spans", lambda like, share, span_bytes: is_masked(like))
    monkeypatch.setattr(Denoising, "damage", lambda self, ids: torch.where(is_masked(ids), ids ^ 1, ids))


def tiny(**overrides) -> STLMForCausalLM:
    model = tiny_model(**overrides)
    model.overrides = overrides
    return model


REFERENCES = [multi_byte, patch_reconstruction, next_thought, masked_next_byte, denoising, early_exit]


@pytest.mark.parametrize("patching", PATCHING)
@pytest.mark.parametrize("layout", ["right", "left", "packed", "packed and padded"])
@pytest.mark.parametrize("reference", REFERENCES)
def test_the_loss_is_that_of_the_documents_alone(reference, layout, patching, without_chance):
    model, objective = tiny(**PATCHING[patching]), ALL[reference.__name__]()
    trained = with_objectives(model, [(objective, 0.7)])
    randomize(objective)
    inputs = inputs_of(layout)
    with torch.no_grad():
        plain = model.train()(**inputs, use_cache=False).loss
        loss = trained.train()(**inputs, use_cache=False).loss
        model.eval()
        documents = [*TEXTS, *([TEXTS[2]] if layout == "packed and padded" else [])]
        # The collator of packed documents takes the label of their first bytes, which nothing predicts.
        labels = [[-100, *ids[1:]] if layout == "packed" else ids for ids in documents]
        expected = sum(reference(model, objective, *row) for row in zip(documents, labels))
    assert expected > 1
    torch.testing.assert_close(loss - plain, 0.7 * expected / num_predicted(inputs), rtol=1e-4, atol=1e-5)


class LabelSum(Objective):
    def forward(self, step):
        return (step.labels * (step.labels != -100)).sum().float()


def test_the_loss_is_the_next_byte_plus_the_weighted_objectives_per_predicted_byte():
    model, inputs = tiny_model(), inputs_of("left")
    trained = with_objectives(model, [LabelSum(), (LabelSum(), 0.5)]).train()
    extra = 1.5 * sum(map(sum, TEXTS))
    for options, count in (({}, num_predicted(inputs)), ({"num_items_in_batch": 7}, 7)):
        torch.testing.assert_close(
            trained(**inputs, **options).loss, model(**inputs, **options).loss + extra / count, rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("name", ALL)
def test_bytes_without_a_label_are_no_targets(name):
    inputs = inputs_of("right")
    inputs["labels"][:] = -100
    trained = with_objectives(tiny_model(), [ALL[name]()]).train()
    assert trained(**inputs, num_items_in_batch=1).loss == 0
    inputs["labels"][0, :20] = inputs["input_ids"][0, :20]
    assert trained(**inputs, num_items_in_batch=1).loss > 20


def test_spans_have_their_length_and_share():
    for share, length in ((0.15, 1), (0.15, 4), (0.5, 8)):
        spans = random_spans(torch.zeros(200, 500), share, length)
        assert spans.float().mean() == pytest.approx(share, abs=0.02)
        inner = spans[:, length:-length].int()
        runs = "".join(map(str, inner.flatten().tolist())).split("0")
        assert sum(len(run) >= length for run in runs if run) > 0.9 * sum(map(bool, runs))
    assert not random_spans(torch.zeros(3, 5), 0.0, 4).any()


def test_noise_misspells_letters_and_leaves_text():
    text = TEXT * 50
    ids = torch.tensor([ids_of(text)])
    damaged = Denoising(spans=0.0, noise=0.3)
    damaged.prepare(tiny_model())
    noisy = bytes(damaged.damage(ids)[0].tolist()).decode()
    letters = [(a, b) for a, b in zip(text, noisy) if a.isascii() and a.isalpha()]
    assert all(a == b for a, b in zip(text, noisy) if not (a.isascii() and a.isalpha()))
    assert all(b.isascii() and b.isalpha() for _, b in letters)
    assert sum(a.swapcase() == b for a, b in letters) / len(letters) == pytest.approx(0.15, abs=0.03)
    assert sum(a != b for a, b in letters) / len(letters) == pytest.approx(0.3, abs=0.03)
    masking = Denoising(spans=0.3, noise=0.0)
    masking.prepare(tiny_model())
    special = torch.tensor([[257, *ids_of(text), 258]])
    masked = masking.damage(special)
    assert masked[0, 0] == 257 and masked[0, -1] == 258
    assert ((masked == 259) | (masked == special)).all()
    assert (masked == 259).float().mean() == pytest.approx(0.3, abs=0.03)


def test_targets_of_a_masked_byte_do_not_see_it(monkeypatch):
    # Masked bytes may be any bytes: the logits that predict them stay the same.
    at = torch.zeros(1, 40, dtype=torch.bool)
    at[0, 13:17] = True
    seen = []
    monkeypatch.setattr(objectives_of_bytes, "random_spans", lambda *_: at)
    monkeypatch.setattr(
        objectives_of_bytes, "sum_of_nats", lambda logits, targets: seen.append(logits) or logits.sum()
    )
    trained = with_objectives(tiny_model(), [MaskedNextByte()]).train()
    ids = torch.tensor([ids_of(TEXT)[:40]])
    other = torch.where(at, 122 - ids % 8, ids)
    for row in (ids, other):
        trained(row, labels=row)
    assert not torch.equal(ids, other) and torch.equal(*seen)


@pytest.mark.parametrize("kind", ["autocast", "weights"])
@pytest.mark.parametrize("name", ALL)
def test_bfloat16_gives_the_loss_of_float32_but_for_rounding(name, kind, without_chance):
    dtype = torch.bfloat16 if kind == "weights" else torch.float32
    expected = with_objectives(tiny_model(), [ALL[name]()]).train()
    trained = with_objectives(tiny_model().to(dtype), [ALL[name]()]).train()
    trained.load_state_dict(expected.state_dict())
    inputs = inputs_of("left")
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = trained(**inputs).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected(**inputs).loss.item(), rel=0.05)
    assert all(p.grad.isfinite().all() for p in trained.parameters())


def test_one_byte_has_no_target():
    for name in ALL:
        trained = with_objectives(tiny_model(), [ALL[name]()]).train()
        ids = torch.tensor([[65]])
        assert trained(ids, labels=ids, num_items_in_batch=1).loss == 0, name


def test_in_evaluation_and_generation_the_model_is_the_plain_one():
    model = tiny_model()
    trained = with_objectives(model, [make() for make in ALL.values()])
    inputs, prompt = inputs_of("left"), torch.tensor([ids_of("The trunk")])
    assert not trained.training
    assert torch.equal(trained(**inputs).loss, model(**inputs).loss)
    options = {"max_new_tokens": 9, "do_sample": False}
    assert torch.equal(trained.generate(prompt, **options), model.generate(prompt, **options))
    plain = trained.plain()
    assert type(plain) is STLMForCausalLM and plain.model is model.model
    assert plain.lm_head.weight is model.model.embed_tokens.weight


DATA = [{"input_ids": ids, "labels": ids} for ids in RAGGED * 4]


def collate(rows):
    inputs = batch([row["input_ids"] for row in rows], "right")
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def trainer_of(folder, names=tuple(ALL), model=None, **options) -> Trainer:
    callbacks = options.pop("callbacks", None)
    set_seed(5)
    model = model or STLMForCausalLM(tiny_config(hidden_dropout=options.pop("dropout", 0.0)))
    chosen = [(ALL[name]() if name != "early_exit" else EarlyExit(1, layer_drop=0.5), 0.3) for name in names]
    return Trainer(
        model=with_objectives(model, chosen),
        args=arguments(folder, **options),
        train_dataset=DATA,
        data_collator=collate,
        callbacks=callbacks,
    )


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def test_a_resumed_training_is_one_that_was_not_cut(tmp_path):
    whole = trainer_of(tmp_path / "whole", dropout=0.1)
    whole.train()
    cut = trainer_of(tmp_path / "cut", dropout=0.1, callbacks=[StopAt(3)])
    cut.train()
    resumed = trainer_of(tmp_path / "cut", dropout=0.1)
    resumed.train(resume_from_checkpoint=True)
    assert losses(cut) == losses(whole)[:3] and losses(resumed) == losses(whole)
    expected = whole.model.state_dict()
    assert any(name.startswith("objectives.") for name in expected)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_what_is_saved_is_the_plain_model(tmp_path):
    trainer = trainer_of(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    plain = STLMForCausalLM(tiny_config())
    plain.save_pretrained(tmp_path / "plain")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["STLMForCausalLM"]
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names - {"training_args.bin"} == {path.name for path in (tmp_path / "plain").iterdir()}
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-2"):
        model, info = STLMForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, parameter in trainer.model.plain().named_parameters():
            assert torch.equal(model.get_parameter(name), parameter)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, checkpointing, without_chance):
    results = []
    names = [name for name in ALL if name != "early_exit"]  # layers are drawn for each call
    for options in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 2}):
        model = STLMForCausalLM(tiny_config(use_cache=False))
        randomize(model)
        options = {
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_steps": 3,
            "activation_checkpointing": checkpointing,
        } | options
        trainer = trainer_of(tmp_path, names, model, **options)
        start = weights(trainer.model)
        trainer.train()
        results.append(trainer)
        checkpointing = False
    whole, accumulated = results
    assert_same_training(accumulated.model, whole.model, start)
    assert losses(accumulated) == pytest.approx(losses(whole), rel=1e-4)


def test_every_parameter_of_an_objective_learns(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=20)
    start = weights(trainer.model)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 1
    assert [name for name, value in trainer.model.named_parameters() if torch.equal(value, start[name])] == []


def test_a_causal_model_stays_causal(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    for model in (trainer.model.eval(), trainer.model.plain()):
        ids = torch.tensor([ids_of(TEXT)])
        other = ids.clone()
        other[0, 30:] = 65
        with torch.no_grad():
            assert torch.equal(model(ids).logits[:, :30], model(other).logits[:, :30])


def test_masked_bytes_train_adapters_and_the_model_keeps_its_mode():
    base = with_objectives(tiny_model(), [MaskedNextByte(0.5)])
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    plain_loss = base.plain()(**inputs_of("right")).loss
    (model(**inputs_of("right")).loss - plain_loss).backward()
    lora = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert lora and all(p.grad.abs().sum() > 0 for p in lora.values())
    flags = [vars(m).get("is_causal", True) for m in model.modules()]
    assert all(flags) and base.model.patcher.mask_token_id is None


def test_lora_keeps_the_objectives_in_its_checkpoints(tmp_path):
    def trainer(name, **options):
        set_seed(5)
        base = with_objectives(tiny_model(), [make() for make in ALL.values()])
        lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["objectives"])
        return Trainer(
            model=get_peft_model(base, lora),
            args=arguments(tmp_path / name, learning_rate=1e-3),
            train_dataset=DATA,
            data_collator=collate,
            **options,
        )

    whole = trainer("whole")
    whole.train()
    trainer("cut", callbacks=[StopAt(3)]).train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    merged = whole.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert not [key for key in load_file(tmp_path / "merged" / "model.safetensors") if "objectives" in key]
    again = STLMForCausalLM.from_pretrained(tmp_path / "merged")
    inputs = inputs_of("right")
    torch.testing.assert_close(again(**inputs).logits, merged.eval()(**inputs).logits)


# Early exit


@pytest.mark.parametrize("sharing", SHARING)
def test_early_exit_drafts_what_greedy_search_says(sharing):
    model = tiny_model(**SHARING[sharing])
    objective = EarlyExit(1)
    with_objectives(model, [objective])
    prompt, options = torch.tensor([ids_of("The trunk runs")]), {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(prompt, use_cache=True, **options)
    slots = objective.slots(model.config)
    assert torch.equal(model.generate(prompt, use_cache=True, **options, assistant_early_exit=slots), expected)


def exit_loss(model: STLMForCausalLM) -> float:
    config = model.config
    config.num_hidden_layers -= 1
    ids = torch.tensor([ids_of(TEXT)])
    with torch.no_grad():
        loss = model.eval()(ids, labels=ids).loss
    config.num_hidden_layers += 1
    return loss.item()


def test_early_exit_trains_the_exit(tmp_path):
    results = []
    for objectives in ([], [(EarlyExit(1, layer_drop=0.2), 1.0)]):
        set_seed(5)
        model = STLMForCausalLM(tiny_config())
        ids = ids_of(TEXT)
        trainer = Trainer(
            model=with_objectives(model, objectives) if objectives else model,
            args=arguments(tmp_path, max_steps=60),
            train_dataset=[{"input_ids": ids, "labels": ids}] * 2,
        )
        trainer.train()
        results.append(exit_loss(model))
    assert results[1] < results[0] - 0.1


def test_layer_drop_leaves_out_later_layers_more_often():
    model = tiny_model(num_trunk_layers=3)
    objective = EarlyExit(1, layer_drop=0.8)
    with_objectives(model, [objective])
    schedule, kept = model.model.trunk.schedule, torch.zeros(3)
    for _ in range(600):
        with objective.during(model):
            kept += torch.tensor([layer in model.model.trunk.schedule for layer in schedule])
        assert model.model.trunk.schedule == schedule
    expected = 1 - 0.8 * torch.tensor([0, 2**0.5 - 1, 1])
    assert (kept / 600 - expected).abs().max() < 0.06
    assert objective.num_calls == 600


def test_a_layer_that_was_left_out_has_a_gradient_of_zero():
    model = tiny_model()
    trained = with_objectives(model, [EarlyExit(0, layer_drop=1.0)]).train()
    trained(**inputs_of("right")).loss.backward()
    last = model.model.trunk.feed_forward_blocks[1].feed_forward.up_proj.weight
    first = model.model.trunk.feed_forward_blocks[0].feed_forward.up_proj.weight
    assert last.grad.abs().sum() == 0 and first.grad.abs().sum() > 0


# Two processes

SCRIPT = """
import json, sys, torch
from transformers import Trainer, TrainingArguments
from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.objectives import *
settings = json.loads(sys.argv[1])
model = STLMForCausalLM.from_pretrained(settings["model"])
torch.manual_seed(0)
chosen = [MultiByte(3), PatchReconstruction(), NextThought(), EarlyExit(1, layer_drop=0.5)]
model = with_objectives(model, [*chosen, *([MaskedNextByte()] if settings["chance"] else [])])
rows = [list(b"A word. Another word"), list(b"x" * 20), list(b"1 2 3 4 5 6 7 8 9 0 "), list(b"y" * 20)] * 3
data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
args = TrainingArguments(output_dir=settings["out"], max_steps=3, learning_rate=0.01, optim="sgd", logging_steps=1,
                         save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
                         train_sampling_strategy="sequential", per_device_train_batch_size=4 // settings["processes"])
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
trainer.save_model(settings["out"] + "/saved")
if trainer.is_world_process_zero():
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    json.dump(losses, open(settings["out"] + "/losses.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_like_one(tmp_path):
    tiny_model(max_patch_bytes=64).save_pretrained(tmp_path / "start")
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}"
        out.mkdir()
        (out / "train.py").write_text(SCRIPT)
        settings = {"model": str(tmp_path / "start"), "out": str(out), "processes": processes, "chance": False}
        run(out / "train.py", processes, settings)
        results.append((json.loads((out / "losses.json").read_text()), load_file(out / "saved" / "model.safetensors")))
    (alone, state), (shared, other) = results
    assert shared == pytest.approx(alone, rel=1e-4) and alone[0] != alone[-1]
    for name, value in state.items():
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=0)
    run(tmp_path / "2" / "train.py", 2, settings | {"chance": True})  # nobody waits for anybody for ever


# Bad input


def test_bad_input_is_refused_in_words():
    model = tiny_model()
    trained = with_objectives(model, [MultiByte(2)])
    for wrong in (trained, get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")), model.model):
        with pytest.raises(
            ValueError, match=f"the model is a {type(wrong).__name__}, expected a plain STLMForCausalLM"
        ):
            with_objectives(wrong, [MultiByte(2)])
    with pytest.raises(ValueError, match="there are no objectives"):
        with_objectives(model, [])
    with pytest.raises(ValueError, match="num_bytes=1 must be at least 2"):
        MultiByte(1)
    with pytest.raises(ValueError, match="share=2 is a share of the bytes"):
        MaskedNextByte(2)
    with pytest.raises(ValueError, match="masks nothing"):
        MaskedNextByte(0)
    with pytest.raises(ValueError, match="noise=-1 is a share of the bytes"):
        Denoising(noise=-1)
    with pytest.raises(ValueError, match="passes=2 must be fewer than the 2 passes of the trunk"):
        with_objectives(model, [EarlyExit(2)])
    with pytest.raises(ValueError, match="passes=-1 must be 0 or more"):
        EarlyExit(-1)
    with pytest.raises(ValueError, match="mask_token_id is None"):
        with_objectives(tiny_model(mask_token_id=None), [MaskedNextByte()])
    with pytest.raises(ValueError, match="objectives need input_ids and labels in training"):
        trained.train()(torch.tensor([[1, 2]]))


def test_research_training_takes_objectives_by_name(monkeypatch):
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(examples)
    monkeypatch.syspath_prepend(examples / "research")
    train = importlib.import_module("train")
    text = str(examples / "data" / "shakespeare.txt")
    command = "--output c --max_steps 1 --objective NextThought 0.1 --objective Denoising 0.2 0.3 0.4"
    chosen = train.parse_arguments(["--train", text, "--validation", text, *command.split()]).objective
    thought, denoising = train.objectives_of(chosen)
    assert (type(thought[0]).__name__, thought[1]) == ("NextThought", 0.1)
    assert (type(denoising[0]).__name__, denoising[1]) == ("Denoising", 0.4)
    assert (denoising[0].spans, denoising[0].noise) == (0.2, 0.3)
    assert train.objectives_of([]) == []


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor and compute_loss_func take the labels away"):
        trainer_of(tmp_path, label_smoothing_factor=0.1).train()


def test_an_adapter_without_objectives_loads_onto_the_plain_model(tmp_path):
    base = with_objectives(tiny_model(), [MaskedNextByte(0.2), Denoising()])
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    inputs = inputs_of("right")
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
