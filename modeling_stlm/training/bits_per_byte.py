# SPDX-License-Identifier: Apache-2.0
"""Bits per byte: total nats / ln 2 / number of bytes predicted.

Comparable between models of any tokenizer. Special tokens count neither as nats nor as bytes; every byte of a
multi-byte character counts. Three ways to one function:

- `bits_per_byte(nats, num_bytes)`;
- `evaluate.load("modeling_stlm/training/bits_per_byte.py")`, from a checkout or from the installed file;
- `BitsPerByteEvaluator` for `Trainer`, which keeps two numbers instead of the logits of the whole set.
"""

import math
import weakref

import datasets
import evaluate
import torch
from accelerate.state import GradientState
from torch.nn import functional as F


NUM_BYTES = 256
VOCABULARY = 320  # ids of the byte vocabulary, special and reserved tokens included


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits per byte of a text of `num_bytes` bytes to which a model gave `nats` in total.

    Raises:
        ValueError: if there are no bytes.
    """
    if num_bytes <= 0:
        raise ValueError(f"bits per byte needs at least one byte, got {num_bytes}")
    return nats / math.log(2) / num_bytes


class BitsPerByte(evaluate.Metric):
    """`compute(predictions=nats, references=ids)`: for each text the nats of its bytes and the ids they were given to.

    Ids of 256 and more and negative ones are left out.
    """

    def _info(self):
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=self.__doc__, features=datasets.Features(features)
        )

    def _compute(self, predictions, references):
        nats, num_bytes = 0.0, 0
        for text_nats, ids in zip(predictions, references, strict=True):
            if len(text_nats) != len(ids):
                raise ValueError(f"a text has {len(text_nats)} predictions for {len(ids)} ids: give one for each")
            for value, token_id in zip(text_nats, ids, strict=True):
                if 0 <= token_id < NUM_BYTES:
                    nats += value
                    num_bytes += 1
        return {"bits_per_byte": bits_per_byte(nats, num_bytes)}


class BitsPerByteEvaluator:
    """Bits per byte inside `Trainer`.

    ```python
    evaluator = BitsPerByteEvaluator()
    trainer = Trainer(
        args=TrainingArguments(batch_eval_metrics=True, ...),
        preprocess_logits_for_metrics=evaluator.nats,
        compute_metrics=evaluator,
        ...
    )
    ```

    With `metric_for_best_model="bits_per_byte"`, give `greater_is_better=False`: the library takes more for better.

    Args:
        token_bytes (`torch.Tensor` of shape `(V,)`, *optional*):
            Number of bytes of each id, 0 for special tokens. Needed unless ids are bytes.

    Raises:
        ValueError: when called without `token_bytes` on ids that are not bytes, or on labels without any byte.
    """

    def __init__(self, token_bytes: torch.Tensor | None = None):
        self.token_bytes = token_bytes
        self.evaluation = None

    @staticmethod
    def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Nats of each label (B, T), what is left of `logits (B, T, V)`: 0 where there is none, and -1 up to the first byte of a row
        padded on the left, which nothing predicts: a model of this package has no logits but zeros there.
        """
        if isinstance(logits, tuple):
            logits = logits[0]
        logits = logits[:, -labels.shape[1] :]  # prompt tuning has virtual tokens before the labels
        nats = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
        is_first = ((labels != -100).cumsum(1)[:, :-1] == 0) & (logits[:, :-1] == 0).all(-1)
        return F.pad(nats.masked_fill(is_first, -1), (1, 0))

    def __call__(self, prediction, compute_result: bool = True) -> dict[str, float]:
        nats, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        labels = F.pad(labels[:, 1:], (1, 0), value=-100)  # the first id of a window has no prediction
        labels = labels.masked_fill(nats < 0, -100)
        if self.token_bytes is None:
            if (largest := int(labels.max())) >= VOCABULARY:
                raise ValueError(
                    f"label {largest} is not in the byte vocabulary of {VOCABULARY} ids: give BitsPerByteEvaluator "
                    "token_bytes, the number of bytes of each id"
                )
            token_bytes = ((labels >= 0) & (labels < NUM_BYTES)).long()
        else:
            token_bytes = self.token_bytes.to(labels.device)[labels.clamp(min=0)] * (labels >= 0)
        if (evaluation := running_evaluation()) != self.evaluation:
            self.evaluation, self.total_nats, self.total_bytes = evaluation, 0.0, 0
        self.total_nats += float(nats[token_bytes > 0].double().sum())
        self.total_bytes += int(token_bytes.sum())
        if not compute_result:
            return {}
        self.evaluation = None
        return {"bits_per_byte": bits_per_byte(self.total_nats, self.total_bytes), "bytes": self.total_bytes}


def running_evaluation() -> tuple:
    """Differs between evaluations by `Trainer`, which does not say when it starts one, and may not finish it.

    Each has a dataloader of its own, unless the workers are persistent; then accelerate lists it again.
    """
    loaders = GradientState().dataloader_references
    # `is None`: the truth of a loader is its length, which a stream does not have.
    return len(loaders), None if loaders[-1] is None else weakref.ref(loaders[-1])
