# SPDX-License-Identifier: Apache-2.0
"""Adversarial training of text classifiers (Miyato et al., arXiv:1605.07725, section 3).

    AdversarialTrainer(model, args, train_dataset=data, epsilon=5.0).train()

Half of the loss is that of the batch with its embeddings moved to where it rises most: those of each row by
`epsilon * g / |g|`, g the gradient of the loss, in units of the root mean square of the row's embeddings. The paper
normalises the embeddings instead, which would change the model; its virtual variant, for texts without labels, is not here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import Trainer


class AdversarialTrainer(Trainer):
    """`Trainer` whose loss, in training, is the mean of the batch's and of the same batch's with moved embeddings.

    A step takes twice the time, and dropout draws anew for the second half. What is moved is the output of
    `model.get_input_embeddings()`; n-grams and matches of an STLM are added to it. Trained and frozen
    embeddings (adapters) are treated alike.

    Args:
        epsilon (`float`): Euclidean length of the move of a row, as above; 0 is plain training.

    Raises:
        ValueError: if `epsilon` is negative or not finite; where it is not 0, with `torch_compile=True`, which does not see the
            move, with several GPUs in one process, and in the first step, if no embeddings are looked up (`inputs_embeds`).
    """

    def __init__(self, *args, epsilon: float, **kwargs):
        if not 0 <= epsilon < float("inf"):
            raise ValueError(f"epsilon={epsilon} must be at least 0 and finite")
        super().__init__(*args, **kwargs)
        if epsilon and self.args.torch_compile:
            raise ValueError(
                "torch_compile=True does not see that embeddings are moved: use torch_compile=False or epsilon=0"
            )
        if epsilon and self.args.n_gpu > 1:
            raise ValueError(
                f"expected a process for each GPU, got one for {self.args.n_gpu}: use `accelerate launch`"
            )
        self.epsilon = epsilon

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        options = {"return_outputs": True, "num_items_in_batch": num_items_in_batch}
        loss, outputs = super().compute_loss(model, inputs, **options)
        if self.epsilon and model.training:
            loss = loss / 2
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        if not self.epsilon:
            return super().training_step(model, inputs, num_items_in_batch)
        layer, found = self.model.get_input_embeddings(), []

        def keep(embeddings: torch.Tensor) -> torch.Tensor:
            if not embeddings.requires_grad:  # frozen
                embeddings = embeddings.detach().requires_grad_()
            embeddings.retain_grad()
            found.append(embeddings)
            return embeddings

        with outputs_through(layer, keep):
            loss = super().training_step(model, dict(inputs), num_items_in_batch)  # a label smoother takes labels away
        if all(embeddings.grad is None for embeddings in found):
            raise ValueError(
                "the loss depends on no embedding that was looked up: pass input_ids, and a model that is not compiled"
            )
        moves = iter([0 if each.grad is None else adversarial_move(each, self.epsilon) for each in found])
        with outputs_through(layer, lambda embeddings: embeddings + next(moves)):
            return loss + super().training_step(model, dict(inputs), num_items_in_batch)


def adversarial_move(embeddings: torch.Tensor, epsilon: float) -> torch.Tensor:
    """What `embeddings (B, T, D)`, whose gradient is known, are moved by; zero in rows without a finite gradient.

    The root mean square is that of the positions that have a gradient: padding has none.
    """
    gradient, states = embeddings.grad.double(), embeddings.detach().double()
    counted = (gradient != 0).any(-1, keepdim=True)  # (B, T, 1)
    mean_square = (states * counted).square().sum((1, 2)) / (counted.sum((1, 2)) * states.shape[-1]).clamp(min=1)
    length = gradient.norm(dim=(1, 2))
    scale = torch.where((length > 0) & length.isfinite(), epsilon * mean_square.sqrt() / length, 0)
    move = torch.where(scale[:, None, None] > 0, scale[:, None, None] * gradient, 0)
    return move.to(embeddings.dtype)


@contextmanager
def outputs_through(layer: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Passes what `layer` returns through `function`."""
    handle = layer.register_forward_hook(lambda module, args, output: function(output))
    try:
        yield
    finally:
        handle.remove()


__all__ = ["AdversarialTrainer"]
