# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of documents under any causal language model, through `Trainer.evaluate`."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows, write_corpus


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Bytes behind each id, 0 for special tokens."""
    # A byte-level vocabulary writes each byte as one character.
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return torch.tensor([0 if i in special else len(piece) for i, piece in enumerate(pieces)])


def bytes_per_token(ids: torch.Tensor, sizes: torch.Tensor) -> float:
    return float(sizes[ids].sum() / len(ids))


def bits_of_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str | bytes],
    block_bytes: int = 1024,
    bytes_of_a_token: float = 1.0,
) -> dict[str, float]:
    """Windows of about `block_bytes` bytes without overlap: `{"bits_per_byte": ..., "bytes": ...}`.

    What is left over at the end is dropped, so texts of less than a window raise a `ValueError`.
    """
    evaluator = BitsPerByteEvaluator(token_bytes(tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        path = write_corpus(Path(folder) / "text.bin", documents, tokenizer)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                batch_eval_metrics=True,
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            eval_dataset=PackedWindows(path, tokenizer, round(block_bytes / bytes_of_a_token)),
            compute_metrics=evaluator,
            preprocess_logits_for_metrics=evaluator.nats,
        )
        metrics = trainer.evaluate()
    return {"bits_per_byte": metrics["eval_bits_per_byte"], "bytes": metrics["eval_bytes"]}
