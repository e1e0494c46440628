# SPDX-License-Identifier: Apache-2.0
"""Adversarial training of text classifiers (Miyato et al., arXiv:1605.07725, section 3).

    AdversarialTrainer(model, args, train_dataset=data, epsilon=5.0).train()

Half of the loss is that of the same batch with the embeddings of each row perturbed by `epsilon * g / |g|`, g the
gradient of the loss. The unit is the root mean square of the embeddings that have a gradient; the paper normalises all
embeddings instead, which would change the model. Its virtual variant, for texts without labels, is not here.

Shapes: B rows, T bytes, D byte width.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Trainer


class AdversarialTrainer(Trainer):
    """`Trainer` whose loss, in training, is the mean of the batch's and of the same batch's with perturbed embeddings.

    Perturbed is what `model.get_input_embeddings()` returns, (B, T, D): a choice is a row of its own, packed documents
    are one. An STLM adds its n-grams and matches to it as they are. Frozen embeddings, as under LoRA, are perturbed
    like trained ones. A step takes nearly twice the time, and dropout is resampled for the second half.

    Args:
        epsilon (`float`): Euclidean length of the perturbation of a row, as above; 0 is plain training.

    Raises:
        ValueError: if `epsilon` is negative or not finite; where it is not 0, with an optimizer that steps in the
            backward pass (DeepSpeed, LOMO, layerwise ones), with context parallelism and with prompt tuning; in the
            first step, if the loss does not depend on exactly one look-up of embeddings.
    """

    def __init__(self, *args, epsilon: float, **kwargs):
        if not 0 <= epsilon < float("inf"):
            raise ValueError(f"epsilon={epsilon} must be at least 0 and finite")
        super().__init__(*args, **kwargs)
        self.epsilon = epsilon
        if epsilon:
            self._check_arguments()

    def _check_arguments(self) -> None:
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if self.is_deepspeed_enabled or "lomo" in optimizer or optimizer.endswith("layerwise"):
            name = "DeepSpeed" if self.is_deepspeed_enabled else f"optim={optimizer!r}"
            raise ValueError(f"expected weights that stay for two backward passes, {name} changes them: use epsilon=0")
        if getattr(self.accelerator.parallelism_config, "cp_size", 1) > 1:
            raise ValueError(
                "expected whole rows in a process, got parts of them (context parallelism): use epsilon=0"
            )
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "expected ids, prompt tuning passes embeddings, and an STLM finds patches by ids: use epsilon=0"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """That of `Trainer`; half of it in training, once for each half of a step."""
        options = {"return_outputs": True, "num_items_in_batch": num_items_in_batch}
        loss, outputs = super().compute_loss(model, inputs, **options)
        if self.epsilon and model.training:
            loss = loss / 2
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.epsilon:
            return super().training_step(model, inputs, num_items_in_batch)
        layer, found = self.model.get_input_embeddings(), defaultdict(list)  # by device: `DataParallel` has several

        def keep(embeddings: torch.Tensor) -> torch.Tensor:
            if not embeddings.requires_grad:  # frozen
                embeddings = embeddings.detach().requires_grad_()
            embeddings.retain_grad()
            found[embeddings.device].append(embeddings)
            return embeddings

        with hooked_output(layer, keep):
            loss = super().training_step(model, inputs, num_items_in_batch)
        perturbations = {device: [perturbation(each, self.epsilon) for each in some] for device, some in found.items()}
        counts = [sum(each is not None for each in some) for some in perturbations.values()] or [0]
        if set(counts) != {1}:
            name = f"{type(layer).__name__} of {type(self.model).__name__}.get_input_embeddings()"
            raise ValueError(
                f"expected a loss that depends on one look-up in {name}, found {counts[0]}: pass input_ids"
            )

        def perturb(embeddings: torch.Tensor) -> torch.Tensor:
            change = perturbations[embeddings.device].pop(0)
            return embeddings if change is None else embeddings + change

        with hooked_output(layer, perturb):
            loss = loss + super().training_step(model, inputs, num_items_in_batch)
        if any(perturbations.values()):
            raise ValueError(
                "the second pass did not look up what the first did: was the model compiled before training?"
            )
        return loss


def perturbation(embeddings: torch.Tensor, epsilon: float) -> torch.Tensor | None:
    """That of `embeddings (B, T, D)` after a backward pass: zero in rows without a finite gradient, `None` without any."""
    if embeddings.grad is None:
        return None
    gradient, states = embeddings.grad.float(), embeddings.detach().float()
    counted = (gradient != 0).any(-1, keepdim=True)  # (B, T, 1): padding has no gradient
    mean_square = (states * counted).square().sum((1, 2)) / (counted.sum((1, 2)) * states.shape[-1])
    gradient = gradient / gradient.abs().amax((1, 2), keepdim=True)  # squares of float32 neither vanish nor overflow
    scale = epsilon * mean_square.sqrt() / gradient.norm(dim=(1, 2))  # not finite without a finite gradient
    return torch.where(scale.isfinite()[:, None, None], scale[:, None, None] * gradient, 0).to(embeddings.dtype)


@contextmanager
def hooked_output(layer: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Passes what `layer` returns through `function`."""
    handle = layer.register_forward_hook(lambda module, args, output: function(output))
    try:
        yield
    finally:
        handle.remove()


__all__ = ["AdversarialTrainer"]
