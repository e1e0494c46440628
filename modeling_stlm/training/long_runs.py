# SPDX-License-Identifier: Apache-2.0
"""Callbacks for long runs: nothing is lost on a signal, and checkpoints come by the clock."""

import os
import signal
import time
from types import FrameType

import torch
from accelerate.utils import gather
from transformers import Trainer, TrainerCallback, TrainingArguments


def largest(number: int, args: TrainingArguments) -> int:
    """The largest `number` of all processes: what one decides, all do."""
    if args.world_size == 1:
        return number
    return int(gather(torch.tensor([number], device=args.device)).max())


def is_training(frame: FrameType | None) -> bool:
    """Whether `frame` runs inside of `Trainer.train`."""
    while frame is not None and frame.f_code is not Trainer.train.__code__:
        frame = frame.f_back
    return frame is not None


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finishes the step, writes a checkpoint and stops; a second signal acts at once, and so does
    the first after a training that raised.

    `received` is the signal then, in all processes, and `None` before. An evaluation that runs is finished first. For
    training in the main thread; processes that load data die of a signal to the whole group, and the training with them:
    use `dataloader_num_workers=0`, or signal the main process alone. (`enable_jit_checkpoint` of `TrainingArguments`
    does this for SIGTERM alone, and nobody can tell afterwards that the training was cut.)
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._number, self._handlers, self._process = 0, {}, None

    def _receive(self, number, frame):
        self._restore()
        if os.getpid() == self._process and is_training(frame):
            self._number = number
        else:  # a forked child has inherited this handler, or a training that raised left it
            os.kill(os.getpid(), number)

    def _restore(self):
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._restore()  # a training that raised left them
        self.received, self._number, self._process = None, 0, os.getpid()
        self._handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_step_end(self, args, state, control, **kwargs):
        if number := largest(self._number, args):
            self.received = signal.Signals(number)
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
        if largest(int(time.monotonic() - self._last >= 60 * self.minutes), args):
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self._last = time.monotonic()
