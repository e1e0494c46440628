# SPDX-License-Identifier: Apache-2.0
"""Train for a given time instead of a given number of steps."""

import time

import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState


class TimeBudget(TrainerCallback, ExportableState):
    """Stops after `minutes` and sets the learning rate by the share of that time that has passed.

    Linear warm-up, then constant, then linear decay to zero at the end of the budget, with a checkpoint there. Use with
    `lr_scheduler_type="constant"`. A resumed run goes on where it was cut, under the budget that is given now; every other
    run starts a new one, also from a checkpoint without a budget. Evaluation and saving do not count. Among several processes, the clock of the main one decides
    for all.

    Args:
        minutes (`float`): length of the training.
        warmup (`float`), decay (`float`): shares of it spent warming up and decaying.
        clock (`str`): `"wall"`, or `"cpu"` for the time of the process on all cores, which a busy machine does not
            stretch.
    """

    def __init__(self, minutes: float, warmup: float = 0.02, decay: float = 0.6, clock: str = "wall"):
        if clock not in ("wall", "cpu"):
            raise ValueError(f"clock={clock!r} must be 'wall' or 'cpu'")
        if minutes <= 0:
            raise ValueError(f"minutes={minutes} must be positive")
        self.minutes, self.warmup, self.decay, self.clock = minutes, warmup, decay, clock
        self.elapsed_seconds = 0.0
        self._last = None

    def _now(self) -> float:
        return time.process_time() if self.clock == "cpu" else time.monotonic()

    def _tick(self, args: TrainingArguments) -> float:
        """Share of the budget that has passed."""
        now = self._now()
        self.elapsed_seconds += now - self._last
        self._last = now
        if args.world_size > 1:
            # Processes whose clocks differ would train with different rates and wait for each other at the last step.
            elapsed = torch.tensor(self.elapsed_seconds, dtype=torch.float64, device=args.device)
            self.elapsed_seconds = broadcast(elapsed).item()
        return self.elapsed_seconds / (60 * self.minutes)

    def learning_rate_factor(self, fraction: float) -> float:
        phases = (fraction, self.warmup), (1 - fraction, self.decay)
        return max(0.0, min(1.0, *(elapsed / share for elapsed, share in phases if share)))

    def on_train_begin(self, args, state, control, **kwargs):
        self.elapsed_seconds = 0.0
        # A checkpoint may have none; the library looks for one when it saves the next.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self.elapsed_seconds = saved["attributes"]["elapsed_seconds"]
        self._last = self._now()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        factor = self.learning_rate_factor(self._tick(args))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def on_log(self, args, state, control, logs, **kwargs):
        # The scheduler, which is constant, logged its own rate.
        if "learning_rate" in logs:
            logs["learning_rate"] *= self.learning_rate_factor(self.elapsed_seconds / (60 * self.minutes))
            state.log_history[-1]["learning_rate"] = logs["learning_rate"]

    def on_step_end(self, args, state, control, **kwargs):
        if self._tick(args) >= 1:
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        self._last = self._now()

    def on_save(self, args, state, control, **kwargs):
        self._last = self._now()

    def state(self) -> dict:
        return {
            "args": {"minutes": self.minutes, "warmup": self.warmup, "decay": self.decay, "clock": self.clock},
            "attributes": {"elapsed_seconds": self.elapsed_seconds},
        }
