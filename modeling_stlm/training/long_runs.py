# SPDX-License-Identifier: Apache-2.0
"""Callbacks for long runs: nothing is lost on a signal, and checkpoints come by the clock."""

import signal
import time

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainingArguments


def any_process(flag: bool, args: TrainingArguments) -> bool:
    """Whether `flag` is set in any process: what one decides, all do."""
    if args.world_size == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=args.device), "sum") > 0)


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finishes the step, writes a checkpoint and stops; a second signal acts at once.

    `received` is the signal then, and `None` before. For training in the main thread. (`enable_jit_checkpoint` of
    `TrainingArguments` does this for SIGTERM alone, and nobody can tell afterwards that the training was cut.)
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._handlers = {}

    def _receive(self, number, frame):
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_train_begin(self, args, state, control, **kwargs):
        self.received = None
        self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args, state, control, **kwargs):
        if any_process(self.received is not None, args):
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._restore()


class SaveByTime(TrainerCallback):
    """A checkpoint whenever `minutes` have passed since the last one, beside those of `save_steps`."""

    def __init__(self, minutes: float):
        self.minutes, self._last = minutes, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._last = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if any_process(time.monotonic() - self._last >= 60 * self.minutes, args):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self._last = time.monotonic()
