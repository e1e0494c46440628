# SPDX-License-Identifier: Apache-2.0
"""How long a training took, with the parts before an interruption."""

import time

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds of training, evaluation and saving included: `wall_seconds` and `cpu_seconds` of this process.

    A resumed run counts on from its checkpoint.
    """

    def __init__(self):
        self.wall_seconds = self.cpu_seconds = 0.0
        self._last = None

    def _tick(self) -> None:
        now = time.monotonic(), time.process_time()
        if self._last is not None:
            self.wall_seconds += now[0] - self._last[0]
            self.cpu_seconds += now[1] - self._last[1]
        self._last = now

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            vars(self).update(saved["attributes"])
        self._last = None
        self._tick()

    def on_step_end(self, args, state, control, **kwargs):
        self._tick()

    def on_train_end(self, args, state, control, **kwargs):
        self._tick()

    def state(self) -> dict:
        return {"args": {}, "attributes": {"wall_seconds": self.wall_seconds, "cpu_seconds": self.cpu_seconds}}
