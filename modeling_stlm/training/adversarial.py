# SPDX-License-Identifier: Apache-2.0
"""Adversarial training: each step also learns from its batch with the embeddings moved to where the loss rises most.

    AdversarialTrainer(model, args, train_dataset=data, norm=1.0).train()

After Miyato et al. (arXiv:1605.07725, section 3), for fine-tuning on few labelled texts. The paper moves the normalised
embeddings of each text; here the tables are moved, those of bytes, n-grams and matches together, by one vector for the batch,
and the model stays as it is.
"""

import torch
from torch import nn
from transformers import Trainer


class AdversarialTrainer(Trainer):
    """`Trainer` whose gradients are those of the batch plus those of the same batch with other embeddings.

    The second half sees the embedding tables moved by `norm` g / |g|, g their gradient in the first. A step takes about
    twice the time. The loss in the logs is that of the first half; evaluation is that of `Trainer`.

    Args:
        norm (`float`, defaults to 1.0): Euclidean length of the move, of all tables together; 0 is plain training.

    Raises:
        ValueError: if `norm` is negative or no number, if no table is trained (adapters freeze them), or if the weights
            are spread over devices (FSDP, DeepSpeed), where no process has the length of the gradient.
    """

    def __init__(self, *args, norm: float = 1.0, **kwargs):
        super().__init__(*args, **kwargs)
        if not 0 <= norm < float("inf"):
            raise ValueError(f"norm={norm} must be at least 0 and finite")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("adversarial training needs whole weights: expected no FSDP and no DeepSpeed")
        self.norm = norm
        if not self._tables():
            raise ValueError(f"no embedding table of {type(self.model).__name__} is trained: there is nothing to move")

    def _tables(self) -> list[nn.Parameter]:
        tables = [module.weight for module in self.model.modules() if isinstance(module, nn.Embedding)]
        return [table for table in tables if table.requires_grad]

    def training_step(self, model, inputs, num_items_in_batch=None):
        tables = self._tables()
        # Gradients of earlier batches are there while they accumulate.
        before = [None if table.grad is None else table.grad.clone() for table in tables]
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        if not self.norm:
            return loss
        moves = [table.grad if old is None else table.grad - old for table, old in zip(tables, before)]
        length = torch.stack([move.float().norm() for move in moves]).norm()
        if not 0 < length < torch.inf:  # also not where float16 overflows
            return loss
        kept = [table.detach().clone() for table in tables]
        try:
            with torch.no_grad():
                for table, move in zip(tables, moves):
                    table.add_(move * (self.norm / length))
            super().training_step(model, dict(inputs), num_items_in_batch)
        finally:
            with torch.no_grad():
                for table, old in zip(tables, kept):
                    table.copy_(old)
        return loss


__all__ = ["AdversarialTrainer"]
