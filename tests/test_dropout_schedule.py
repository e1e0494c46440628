# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import Trainer, TrainerCallback, set_seed

from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.dropout_schedule import SCHEDULES, DropoutSchedule, blocks_of

from .tiny import tiny_config, tiny_model
from .trainers import RAGGED, arguments, losses


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.2] * 13),
        ("linear", [0.2 * (12 - i) / 12 for i in range(13)]),
        ("early", [0.2] * 2 + [0.0] * 11),
        ("linear_early", [0.2, 0.1] + [0.0] * 11),
        ("rising", [0.2 * i / 12 for i in range(13)]),
        ("late", [0.0] * 2 + [0.2] * 11),
        ("triangular", [0.0, 0.1, 0.2, 0.1] * 3 + [0.0]),
        ([(0, 0.5), (0.5, 0.5), (1, 0)], [0.1] * 7 + [0.1 * i / 6 for i in (5, 4, 3, 2, 1, 0)]),
    ],
)
def test_the_probability_follows_the_schedule(name, expected):
    schedule = DropoutSchedule(name, probability=0.2)
    assert [schedule.at(i / 12) for i in range(13)] == pytest.approx(expected)


def test_every_schedule_is_tested():
    assert len(SCHEDULES) == 7


ROWS = [{"input_ids": RAGGED[0], "labels": RAGGED[0]}] * 8


class Record(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen.append({block.dropout for block in blocks_of(model)})
        if len(self.seen) == 3 and self.stop:
            control.should_save = control.should_training_stop = True


def trainer_of(folder, stop=False) -> tuple[Trainer, Record]:
    set_seed(1)
    record = Record()
    record.stop = stop
    model = STLMForCausalLM(tiny_config(hidden_dropout=0.05))
    callbacks = [DropoutSchedule("linear", probability=0.6), record]
    return Trainer(model=model, args=arguments(folder), train_dataset=ROWS, callbacks=callbacks), record


def test_all_blocks_have_the_probability_of_the_step_and_a_resumed_training_too(tmp_path):
    whole, record = trainer_of(tmp_path / "whole")
    whole.train()
    assert [min(seen) for seen in record.seen] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert all(len(seen) == 1 for seen in record.seen)
    assert len(blocks_of(whole.model)) == 3 + 2 * 2  # byte layers; attention and feed-forward of two trunk layers
    assert whole.model.config.hidden_dropout == 0.05
    trainer_of(tmp_path / "cut", stop=True)[0].train()
    resumed, record = trainer_of(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert [min(seen) for seen in record.seen] == pytest.approx([0.3, 0.2, 0.1])
    assert losses(resumed) == losses(whole)


def test_dropout_of_a_block_is_what_was_set():
    model, ids = tiny_model().train(), torch.tensor([RAGGED[0]])
    plain = model(ids).logits
    for block in blocks_of(model):
        block.dropout = 0.5
    assert not torch.allclose(model(ids).logits, plain)
    assert torch.equal(model.eval()(ids, use_cache=False).logits, plain)


def test_bad_input_is_refused_in_words():
    with pytest.raises(ValueError, match="schedule='cosine' must be one of"):
        DropoutSchedule("cosine")
    with pytest.raises(ValueError, match=r"must rise from 0 to 1, got \[0, 0.5\]"):
        DropoutSchedule([(0, 1), (0.5, 0)])
    with pytest.raises(ValueError, match="probability=1 times"):
        DropoutSchedule("linear", probability=1)
    with pytest.raises(ValueError, match="Linear has no blocks with a dropout"):
        blocks_of(torch.nn.Linear(1, 1))
