# SPDX-License-Identifier: Apache-2.0
"""ROUGE-1, -2 and -L (Lin, 2004), as the package `rouge_score` computes them without a stemmer.

`evaluate.load("rouge")` asks the Hub for its script; `evaluate.load("modeling_stlm/training/rouge.py")`, from a checkout
or from the installed file, asks nobody.
"""

import re
from collections import Counter

import datasets
import evaluate


def words_of(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def f_measure(common: int, predicted: int, reference: int) -> float:
    """Harmonic mean of precision and recall."""
    return 2 * common / (predicted + reference) if common else 0.0


def rouge_n(prediction: list[str], reference: list[str], n: int) -> float:
    """F-measure of common n-grams."""
    grams = [Counter(zip(*(words[i:] for i in range(n)))) for words in (prediction, reference)]
    return f_measure((grams[0] & grams[1]).total(), *(counts.total() for counts in grams))


def rouge_l(prediction: list[str], reference: list[str]) -> float:
    """F-measure of the longest common subsequence."""
    row = [0] * (len(reference) + 1)  # its length up to each word of the reference
    for word in prediction:
        before, row = row, [0]
        for i, other in enumerate(reference):
            row.append(before[i] + 1 if word == other else max(before[i + 1], row[i]))
    return f_measure(row[-1], len(prediction), len(reference))


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """`{"rouge1": ..., "rouge2": ..., "rougeL": ...}` between 0 and 1."""
    words = words_of(prediction), words_of(reference)
    return {"rouge1": rouge_n(*words, 1), "rouge2": rouge_n(*words, 2), "rougeL": rouge_l(*words)}


class Rouge(evaluate.Metric):
    """`compute(predictions=texts, references=texts)`: means over the texts.

    A reference may be a list of texts; each of the three is that of the best one.
    """

    def _info(self):
        text = datasets.Value("string")
        features = [
            datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            datasets.Features({"predictions": text, "references": text}),
        ]
        return evaluate.MetricInfo(
            description=__doc__, citation="", inputs_description=self.__doc__, features=features
        )

    def _compute(self, predictions, references):
        totals = Counter()
        for prediction, several in zip(predictions, references, strict=True):
            scores = [rouge(prediction, text) for text in ([several] if isinstance(several, str) else several)]
            totals.update({name: max(score[name] for score in scores) for name in scores[0]})
        return {name: total / len(predictions) for name, total in totals.items()}
