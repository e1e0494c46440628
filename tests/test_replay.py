# SPDX-License-Identifier: Apache-2.0
"""Rounds that replay the hardest windows."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.corpus import PackedWindows
from modeling_stlm.training.replay import ReplayRounds, ReplayWindows, draw

from .test_distributed import run
from .test_examples import refused
from .test_examples import run as run_example
from .tiny import TEXT, tiny_config
from .trainers import TOKENIZER, arguments, weights


@pytest.fixture(scope="module")
def windows(tmp_path_factory) -> PackedWindows:
    """17 windows: the odd one is left over."""
    path = tmp_path_factory.mktemp("corpus") / "text.bin"
    path.write_bytes((TEXT * 9).encode()[: 17 * 64 - 2])
    return PackedWindows(path, TOKENIZER, 64)


def fresh_model() -> STLMForCausalLM:
    torch.manual_seed(0)
    return STLMForCausalLM(tiny_config())


class Seen(TrainerCallback):
    """The windows of every forward pass in training, by epoch."""

    def __init__(self):
        self.windows, self.hook = {}, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        def look(module, inputs, kwargs):
            if module.training:
                self.windows.setdefault(int(state.epoch), []).extend(kwargs["window"].tolist())

        # Now that all others are there: before those of `ReplayRounds`.
        self.hook = self.hook or model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)

    def on_train_end(self, *args, **kwargs):
        self.hook.remove()


def make_trainer(folder: Path, windows, one_in: int = 2, rounds: ReplayRounds | None = None, **options) -> Trainer:
    options = {"max_steps": -1, "num_train_epochs": one_in + 1} | ReplayRounds.arguments | options
    callbacks = [rounds or ReplayRounds(parts=2), Seen()]
    return Trainer(
        model=fresh_model(),
        args=arguments(folder, **options),
        train_dataset=ReplayWindows(windows, one_in),
        callbacks=callbacks,
    )


def callback(trainer: Trainer, kind: type) -> TrainerCallback:
    """`Trainer` builds exportable ones anew when it resumes."""
    (found,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, kind))
    return found


def inclusion(probabilities: list[float], count: int) -> list[float]:
    """Probability of each to be among `count` drawn one after the other, by all sequences."""
    total = [0.0] * len(probabilities)

    def follow(chosen: tuple[int, ...], chance: float) -> None:
        if len(chosen) == count:
            for i in chosen:
                total[i] += chance
            return
        left = 1 - sum(probabilities[i] for i in chosen)
        for i, p in enumerate(probabilities):
            if i not in chosen:
                follow((*chosen, i), chance * p / left)

    follow((), 1.0)
    return total


def test_windows_are_drawn_with_the_probabilities_of_the_paper():
    losses = [0.5, 2.0, 1.0, 3.0, 0.1, 1.5]
    powers = [math.exp(loss) for loss in losses]
    expected = inclusion([power / sum(powers) for power in powers], 3)
    generator, counts, trials = torch.Generator().manual_seed(0), Counter(), 4000
    for _ in range(trials):
        drawn = draw(torch.tensor(losses), 2, 1, generator).tolist()
        assert len(set(drawn)) == 3
        counts.update(drawn)
    assert min(expected) < 0.2 and max(expected) > 0.9
    for i, probability in enumerate(expected):
        assert counts[i] / trials == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(("num_windows", "one_in", "parts"), [(24, 2, 8), (9, 3, 2), (4, 2, 8), (7, 1, 3), (30, 3, 4)])
def test_each_part_gives_its_share(num_windows, one_in, parts):
    losses = torch.linspace(9, 0, num_windows)  # one draw over all would take the first windows
    drawn = sorted(draw(losses, one_in, parts, torch.Generator().manual_seed(1)).tolist())
    assert len(set(drawn)) == len(drawn) == num_windows // one_in
    for part in range(parts):
        start, end = num_windows * part // parts, num_windows * (part + 1) // parts
        assert abs(sum(start <= i < end for i in drawn) - (end - start) / one_in) < 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 3},
        {"dataloader_num_workers": 1},
        {"bf16": True},
    ],
    ids=str,
)
def test_the_first_round_records_every_window_and_the_second_draws_half(windows, tmp_path, options):
    trainer = make_trainer(tmp_path, windows, learning_rate=0.0, **options)
    trainer.train()
    seen, rounds = callback(trainer, Seen).windows, callback(trainer, ReplayRounds)
    assert trainer.state.global_step == trainer.state.max_steps
    assert [len(seen[epoch]) for epoch in range(3)] == [8, 8, 8]
    first = seen[0] + seen[1]
    assert len(set(first)) == 16 and len(set(seen[2])) == 8 and set(seen[2]) < set(first)
    # With a rate of zero, a window has the same loss before and after.
    tolerance = 2e-2 if options.get("bf16") else 1e-5
    for window in range(17):
        item = {name: value[None] for name, value in windows[window].items()}
        with torch.no_grad():
            loss = float(trainer.model.eval()(**item).loss)
        if window in first:
            assert float(rounds.losses[window]) == pytest.approx(loss, abs=tolerance)
        else:
            assert rounds.losses[window].isnan()
    generator = torch.Generator().manual_seed(2)  # seed 0 + epoch 2
    drawn = draw(rounds.losses[first], 2, 2, generator)
    assert {first[i] for i in drawn.tolist()} == set(seen[2])
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_the_losses_of_a_tuned_prompt_are_those_of_the_labels(windows, tmp_path):
    model = get_peft_model(fresh_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    options = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 0.0} | ReplayRounds.arguments
    rounds = ReplayRounds(parts=2)
    Trainer(model, arguments(tmp_path, **options), train_dataset=ReplayWindows(windows), callbacks=[rounds]).train()
    seen = rounds.losses.isfinite().nonzero()[:, 0].tolist()
    assert len(seen) == 16
    for window in seen:
        ids, labels = (windows[window][name][None] for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model.eval()(ids).logits[:, 4:]
        expected = F.cross_entropy(logits[0, :-1], labels[0, 1:]).item()
        assert rounds.losses[window].item() == pytest.approx(expected, rel=1e-4)


def test_later_rounds_draw_again(windows, tmp_path):
    trainer = make_trainer(tmp_path, windows, one_in=4, num_train_epochs=7, per_device_train_batch_size=4)
    trainer.train()
    seen = callback(trainer, Seen).windows
    assert len(set(seen[0] + seen[1] + seen[2] + seen[3])) == 16
    assert len({tuple(sorted(seen[epoch])) for epoch in (4, 5, 6)}) > 1


@pytest.mark.parametrize("step", [3, 8, 10])  # in round one, between the rounds, in round two
def test_resumed_equals_uninterrupted(windows, tmp_path, step):
    whole = make_trainer(tmp_path, windows, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = make_trainer(tmp_path, windows, rounds=ReplayRounds(seed=7, parts=1))  # the checkpoint knows better
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    expected = callback(whole, Seen).windows
    assert callback(resumed, Seen).windows[2] == expected[2][max(0, 2 * step - 16) :]
    torch.testing.assert_close(
        callback(resumed, ReplayRounds).losses, callback(whole, ReplayRounds).losses, equal_nan=True, atol=0, rtol=0
    )
    for name, weight in weights(resumed.model).items():
        assert torch.equal(weight, whole.model.get_parameter(name)), name


TWO_PROCESSES = """
import json, sys, torch
from pathlib import Path
from transformers import Trainer, TrainingArguments
from modeling_stlm import STLMForCausalLM, STLMTokenizer
from modeling_stlm.training.corpus import PackedWindows
from modeling_stlm.training.replay import ReplayRounds, ReplayWindows
settings = json.loads(sys.argv[1])
rounds, data = ReplayRounds(parts=2), ReplayWindows(PackedWindows(settings["text"], STLMTokenizer(), 64))
args = TrainingArguments(output_dir=settings["out"], num_train_epochs=3, per_device_train_batch_size=settings["rows"],
                         learning_rate=0.0, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
                         **ReplayRounds.arguments)
model = STLMForCausalLM.from_pretrained(settings["model"])
Trainer(model=model, args=args, train_dataset=data, callbacks=[rounds]).train()
result = {"losses": rounds.losses.nan_to_num(-1).tolist(), "drawn": data.order.tolist()}
Path(settings["out"], f"{args.world_size}-{args.process_index}.json").write_text(json.dumps(result))
"""


@pytest.mark.timeout(300)
def test_two_processes_draw_the_windows_of_one(windows, tmp_path):
    fresh_model().save_pretrained(tmp_path / "model")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    for processes in (1, 2):  # batches of three rows: the last one of an epoch is filled up
        settings = {"model": str(tmp_path / "model"), "text": str(windows.path), "out": str(tmp_path), "rows": 3}
        run(tmp_path / "train.py", processes, settings)
    alone, main, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert main == other and main["drawn"] == alone["drawn"]
    assert main["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def test_a_round_without_records_is_refused(windows, tmp_path):
    losses = torch.tensor([1.0, math.nan, 2.0, math.inf])
    with pytest.raises(ValueError, match="a finite loss of each of the 4 windows of round 1, got none of 2"):
        draw(losses, 2, 1, torch.Generator())
    with pytest.raises(ValueError, match="no round has begun"):
        ReplayWindows(windows)[0]
    trainer = make_trainer(tmp_path, windows, save_strategy="steps", save_steps=2)
    trainer.train()
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    content = json.loads(state.read_text())
    del content["stateful_callbacks"]["ReplayRounds"]
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="step 2 is resumed without the losses of round 1"):
        make_trainer(tmp_path, windows).train(resume_from_checkpoint=str(state.parent))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remove_unused_columns": True}, "expected remove_unused_columns=False, got True"),
        ({"train_sampling_strategy": "random"}, "expected train_sampling_strategy='sequential'"),
        ({"dataloader_drop_last": True}, "expected dataloader_drop_last=False, got True"),
        ({"num_train_epochs": 2}, "expected more than 2 epochs, which is what the first round takes, got 2"),
        ({"dataloader_num_workers": 1, "dataloader_persistent_workers": True}, "persistent_workers=False"),
        ({"label_smoothing_factor": 0.1}, "the model got no labels"),
    ],
)
def test_a_trainer_that_is_set_up_otherwise_is_refused(windows, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, windows, **options).train()


def test_arguments_without_a_meaning_are_refused(windows, tmp_path):
    for one_in in (0, 18):
        with pytest.raises(ValueError, match=f"one_in={one_in} must be from 1 to the number of windows, 17"):
            ReplayWindows(windows, one_in)
    with pytest.raises(ValueError, match="parts=0 must be at least 1"):
        ReplayRounds(parts=0)
    options = {"max_steps": -1, "num_train_epochs": 3} | ReplayRounds.arguments
    trainer = Trainer(fresh_model(), arguments(tmp_path, **options), train_dataset=windows, callbacks=[ReplayRounds()])
    with pytest.raises(ValueError, match="train_dataset is a PackedWindows, expected ReplayWindows"):
        trainer.train()


def test_the_example_compares_runs_of_equal_steps(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 12)
    files = ["--train", tmp_path / "text.txt", "--validation", tmp_path / "text.txt", "--block_bytes", 64]
    options = ["--seeds", 3, "--output", tmp_path / "runs", "--batch_size", 8]
    printed = run_example("research/replay.py", *files, *options, cwd=tmp_path)
    histories = [
        json.loads((tmp_path / "runs" / f"{name}-s3" / "results.json").read_text()) for name in ("random", "replay")
    ]
    plain, replayed = histories
    windows = (len((TEXT * 12).encode()) + 2) // 64
    assert plain["steps"] == replayed["steps"] == 3 * math.ceil(windows // 2 / 8)
    scores = [history["bits_per_byte"]["validation"] for history in histories]
    assert f"| 3 | {scores[0]:.4f} | {scores[1]:.4f} |" in printed
    assert (
        re.search(r"replay minus random order: ([+-][\d.]+) on average", printed)[1] == f"{scores[1] - scores[0]:+.4f}"
    )
    assert run_example("research/replay.py", *files, *options, cwd=tmp_path) == printed
    told = refused("research/replay.py", *files, *options, cwd=tmp_path, one_in=4, batch_size=4)
    assert "begun.json was made with" in told


def test_a_training_after_one_that_raised_is_a_new_one(windows, tmp_path):
    class Fault(TrainerCallback):
        is_armed = True

        def on_step_begin(self, args, state, control, **kwargs):
            if self.is_armed and state.global_step == 1:
                self.is_armed = False
                raise RuntimeError("fault")

    trainer = make_trainer(tmp_path, windows)
    trainer.remove_callback(Seen)
    trainer.add_callback(Fault())
    with pytest.raises(RuntimeError, match="fault"):
        trainer.train()
    trainer.train()
    assert callback(trainer, ReplayRounds).losses.isfinite().sum() == 16
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks
