# SPDX-License-Identifier: Apache-2.0
"""What the tests of training share: arguments for a `Trainer` on a CPU, its losses, texts of several lengths."""

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from modeling_stlm import STLMTokenizer

from .tiny import TEXT, ids_of


TOKENIZER = STLMTokenizer()
# Patches of all lengths, one row without any: the sums over a batch cannot be those of equal rows.
RAGGED = [ids_of(text) for text in (TEXT[:90], "one two", "x", "Zoë 東京, and more words. ", "a b c d", TEXT[60:130])]


def arguments(folder: Path, arguments_class=TrainingArguments, **overrides) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return arguments_class(**(defaults | overrides))


def losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_training(ours: torch.nn.Module, reference: torch.nn.Module, start: dict[str, torch.Tensor]) -> None:
    """Equal weights after a training that moved them far more than they may differ."""
    reference = dict(reference.named_parameters())
    assert max((reference[name] - first).abs().max() for name, first in start.items()) > 1e-2
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter, reference[name], atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
