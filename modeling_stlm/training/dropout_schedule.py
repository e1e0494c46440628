# SPDX-License-Identifier: Apache-2.0
"""Dropout that changes while training (Dropout in super tiny language models, arXiv:2409.05423)."""

from torch import nn
from transformers import TrainerCallback


# (share of `max_steps`, factor of the probability), linear in between. Two points at one share are a jump.
SCHEDULES = {
    "constant": [(0, 1), (1, 1)],
    "linear": [(0, 1), (1, 0)],
    "early": [(0, 1), (1 / 6, 1), (1 / 6, 0), (1, 0)],  # off after 5,000 of the paper's 30,000 steps
    "linear_early": [(0, 1), (1 / 6, 0), (1, 0)],
    "rising": [(0, 0), (1, 1)],
    "late": [(0, 0), (1 / 6, 0), (1 / 6, 1), (1, 1)],
    "triangular": [(i / 6, i % 2) for i in range(7)],  # three times up and down
}


class DropoutSchedule(TrainerCallback):
    """Sets `hidden_dropout` of an STLM before every step; the config keeps its own value.

    Nothing is counted here: the probability follows from the step, so that a resumed training has that of an
    uninterrupted one. `max_steps` has to be the length of the training: with
    [`TimeBudget`], which has none, a schedule stays where it starts.

    Args:
        schedule (`str` or `list[tuple[float, float]]`):
            A name in `SCHEDULES`, or points (share of `max_steps`, factor), in order.
        probability (`float`, defaults to 0.1): where the factor is one.

    Raises:
        ValueError: if these make no sense or, when training begins, if the model is no STLM.
    """

    def __init__(self, schedule: str | list[tuple[float, float]], probability: float = 0.1):
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} must be one of {list(SCHEDULES)} or a list of points")
        self.points = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        shares = [share for share, _ in self.points]
        if not shares or shares != sorted(shares) or (shares[0], shares[-1]) != (0, 1):
            raise ValueError(f"the shares of a schedule must rise from 0 to 1, got {shares}")
        if not all(0 <= factor * probability < 1 for _, factor in self.points):
            raise ValueError(f"probability={probability} times {self.points} must be at least 0 and less than 1")
        self.probability = probability

    def at(self, share: float) -> float:
        """The probability after `share` of the training."""
        after = next((i for i, (point, _) in enumerate(self.points) if point > share), len(self.points) - 1)
        (start, first), (end, last) = self.points[after - 1 : after + 1]
        return self.probability * (first + (last - first) * (share - start) / (end - start))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        probability = self.at(state.global_step / state.max_steps)
        for module in blocks_of(model):
            module.dropout = probability


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The residual blocks with a dropout, whatever wraps the model (peft, DDP, `torch.compile`)."""
    blocks = [module for module in model.modules() if isinstance(vars(module).get("dropout"), (int, float))]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks with a dropout: this is for STLM")
    return blocks
