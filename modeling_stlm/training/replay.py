# SPDX-License-Identifier: Apache-2.0
"""Training in rounds: later rounds replay the windows that were hardest in the first (PanGu-pi Pro, arXiv:2402.02791).

Small models forget early data. The paper trains a second round on half of the data, drawn by the losses of the first;
on its 1B model that gained 2.9 points, and a third round nothing.
"""

import base64
from itertools import pairwise

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from modeling_stlm.modeling_stlm import without_first_bytes


class ReplayWindows(Dataset):
    """The windows of one epoch, out of all `windows`, as [`ReplayRounds`] orders them.

    An epoch of `Trainer` is as long as a later round: the `one_in`-th part of all windows. So the first round, which sees
    every window once, takes `one_in` epochs, and each later one takes one.

    Args:
        windows (`Dataset`): with items of one length, such as [`PackedWindows`].
        one_in (`int`, defaults to 2): a later round draws one window in so many.
    """

    def __init__(self, windows: Dataset, one_in: int = 2):
        if not 1 <= one_in <= len(windows):
            raise ValueError(f"one_in={one_in} must be from 1 to the number of windows, {len(windows)}")
        self.windows, self.one_in, self.order = windows, one_in, None

    def __len__(self) -> int:
        return len(self.windows) // self.one_in

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.order is None:
            raise ValueError("no round has begun: give Trainer callbacks=[ReplayRounds()]")
        window = int(self.order[index])
        return {**self.windows[window], "window": window}


class ReplayRounds(TrainerCallback, ExportableState):
    """Records the loss of every window in the first round, and draws the windows of each later round by these losses.

    Losses are those of the training step that saw the window: there is no second pass, where the paper's code runs one.
    A window of loss l nats per label has probability exp(l) / sum exp(l) among the windows of its part, without
    replacement. Parts, of which the paper makes 8, are stretches of the first round: the model was worse when it saw the
    first ones, and one draw over all would mostly repeat those.

    ```python
    args = TrainingArguments(num_train_epochs=3, **ReplayRounds.arguments)  # two epochs are round one
    Trainer(model, args, train_dataset=ReplayWindows(windows), callbacks=[ReplayRounds()]).train()
    ```

    For causal language models. Resumed runs, whatever seed they are given, and runs of several processes draw the same
    windows. What is left over of
    the windows after division by `one_in` is left out.

    Args:
        seed (`int`, defaults to 0): of the order of the windows and of the draws.
        parts (`int`, defaults to 8): stretches of the first round that are drawn from apart.

    Raises:
        ValueError: if `Trainer` is set up otherwise, or if a round begins without the records to draw from.
    """

    arguments = {
        "remove_unused_columns": False,  # the index of a window travels with it
        "dataloader_drop_last": False,  # every window of round 1 gets its loss
        "train_sampling_strategy": "sequential",
    }

    def __init__(self, seed: int = 0, parts: int = 8):
        if parts < 1:
            raise ValueError(f"parts={parts} must be at least 1")
        self.seed, self.parts = seed, parts
        self.losses, self._hooks = None, []
        self.is_first_round = False

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        dataset = train_dataloader.dataset
        self._check(args, state, dataset)
        if state.global_step == 0:
            self.losses = torch.full((len(dataset.windows),), torch.nan)
        else:
            self._resume(state)
        self._windows, self._recorded = None, []
        self.on_train_end(args, state, control)  # a training that raised left its hooks
        before = model.register_forward_pre_hook(self._take_windows, with_kwargs=True, prepend=True)
        self._hooks = [before, model.register_forward_hook(self._record, with_kwargs=True)]

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset, epoch = train_dataloader.dataset, int(state.epoch)
        self.is_first_round = epoch < dataset.one_in
        dataset.order = self.order(epoch, len(dataset), dataset.one_in)

    def on_step_end(self, args, state, control, **kwargs):
        recorded = [(windows.tolist(), losses.tolist()) for windows, losses in self._recorded]
        self._recorded = []
        if not self.is_first_round:
            return
        if not recorded:
            raise ValueError(f"step {state.global_step} of round 1 recorded no losses: its batches had no windows")
        for windows, losses in gather_object(recorded):
            self.losses[windows] = torch.tensor(losses)

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state(self) -> dict:
        records = None if self.losses is None else base64.b64encode(self.losses.numpy().tobytes()).decode()
        return {"args": {"seed": self.seed, "parts": self.parts}, "attributes": {"records": records}}

    def _resume(self, state: TrainerState) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None or saved["attributes"]["records"] is None:
            raise ValueError(f"step {state.global_step} is resumed without the losses of round 1 in its trainer state")
        records = base64.b64decode(saved["attributes"]["records"])
        self.losses = torch.from_numpy(np.frombuffer(records, np.float32).copy())
        self.seed, self.parts = saved["args"]["seed"], saved["args"]["parts"]

    def order(self, epoch: int, num_windows: int, one_in: int) -> torch.Tensor:
        """Windows of an epoch of `num_windows`, in order."""
        generator = torch.Generator().manual_seed(self.seed)
        first_round = torch.randperm(len(self.losses), generator=generator)[: one_in * num_windows]
        if epoch < one_in:
            return first_round[epoch * num_windows : (epoch + 1) * num_windows]
        generator.manual_seed(self.seed + epoch)
        drawn = first_round[draw(self.losses[first_round], one_in, self.parts, generator)]
        return drawn[torch.randperm(num_windows, generator=generator)]

    def _check(self, args, state, dataset) -> None:
        if not isinstance(dataset, ReplayWindows):
            raise ValueError(f"train_dataset is a {type(dataset).__name__}, expected ReplayWindows")
        for name, value in self.arguments.items():
            if getattr(args, name) != value:
                raise ValueError(
                    f"expected {name}={value!r}, got {getattr(args, name)!r}: TrainingArguments(**ReplayRounds.arguments)"
                )
        if args.dataloader_persistent_workers:
            raise ValueError("expected dataloader_persistent_workers=False: workers must learn of each round")
        if state.num_train_epochs <= dataset.one_in:
            raise ValueError(
                f"expected more than {dataset.one_in} epochs, which is what the first round takes, got "
                f"{state.num_train_epochs}"
            )

    def _take_windows(self, module, inputs, kwargs):
        self._windows = kwargs.pop("window", None)
        return inputs, kwargs

    @torch.no_grad()
    def _record(self, module, inputs, kwargs, outputs):
        if not (module.training and self.is_first_round and self._windows is not None):
            return
        if kwargs.get("labels") is None:
            raise ValueError("the model got no labels: label smoothing and compute_loss_func keep them from it")
        labels = without_first_bytes(kwargs["labels"], kwargs.get("attention_mask"))
        self._recorded.append((self._windows, window_losses(outputs["logits"], labels)))


def window_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats per label of each row (B,), given `logits (B, T, V)` and `labels (B, T)`, which are shifted here."""
    logits = logits[:, -labels.shape[1] :]  # prompt tuning has virtual tokens before the labels
    nats = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
    return nats.sum(1) / (labels[:, 1:] != -100).sum(1).clamp(min=1)


def draw(losses: torch.Tensor, one_in: int, parts: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of one in `one_in` of the windows with `losses (n,)`, drawn from each part in proportion to exp(loss).

    Raises:
        ValueError: if a window has no record.
    """
    if missing := int((~losses.isfinite()).sum()):
        raise ValueError(
            f"expected a finite loss of each of the {len(losses)} windows of round 1, got none of {missing}"
        )
    drawn = []
    ends = [len(losses) * part // parts for part in range(parts + 1)]
    for start, end in pairwise(ends):
        if count := end // one_in - start // one_in:
            probabilities = losses[start:end].double().softmax(0)
            drawn.append(start + torch.multinomial(probabilities, count, generator=generator))
    return torch.cat(drawn)
