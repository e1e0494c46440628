# SPDX-License-Identifier: Apache-2.0
import math
import re
from itertools import combinations
from pathlib import Path

import evaluate
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from modeling_stlm.training import rouge


ROOT = Path(__file__).parents[1]
TEXTS = st.lists(st.sampled_from(["a", "b", "C", "d1"]), max_size=7).map(" ".join)


def f1(common: int, predicted: int, reference: int) -> float:
    precision, recall = (common / count if count else 0.0 for count in (predicted, reference))
    return 2 * precision * recall / (precision + recall) if common else 0.0


def common_ngrams(first: list[str], second: list[str], n: int) -> int:
    """By crossing out."""
    left = [tuple(second[i : i + n]) for i in range(len(second) - n + 1)]
    count = 0
    for i in range(len(first) - n + 1):
        if (gram := tuple(first[i : i + n])) in left:
            left.remove(gram)
            count += 1
    return count


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    for length in range(len(first), 0, -1):
        if {*combinations(first, length)} & {*combinations(second, length)}:
            return length
    return 0


@given(TEXTS, TEXTS)
def test_rouge_is_its_definition(prediction, reference):
    first, second = prediction.lower().split(), reference.lower().split()
    scores = rouge.rouge(prediction, reference)
    for n in (1, 2):
        counts = (max(0, len(words) - n + 1) for words in (first, second))
        assert scores[f"rouge{n}"] == pytest.approx(f1(common_ngrams(first, second, n), *counts))
    expected = f1(longest_common_subsequence(first, second), len(first), len(second))
    assert scores["rougeL"] == pytest.approx(expected)


def test_words_are_letters_and_digits_in_lower_case():
    assert rouge.words_of("It's Zoë's 2nd, isn't it?") == ["it", "s", "zo", "s", "2nd", "isn", "t", "it"]
    assert rouge.rouge("", "...") == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


def test_the_metrics_of_the_readme_need_no_hub(monkeypatch):
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n([^`]*accuracy_score.*?)```", readme, re.DOTALL)
    names = {"labels": [0, 1, 1, 2], "predicted": [0, 1, 2, 2], "texts": ["a b c"], "references": ["a c"]}
    names |= {"nats": [[math.log(2), 2 * math.log(2)]], "ids": [[65, 66]]}
    exec(snippet, names)
    assert names["accuracy"] == 0.75 and names["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert names["rouge"]["rouge1"] == pytest.approx(0.8) and names["bits"] == {"bits_per_byte": pytest.approx(1.5)}
    # Why: if this fails, the names work without the Hub, too.
    with pytest.raises(FileNotFoundError):
        evaluate.load("accuracy")


def test_evaluate_loads_it_from_the_file_and_takes_the_best_of_several_references():
    metric = evaluate.load(rouge.__file__)
    one = metric.compute(predictions=["a b c", "d"], references=["a c", "e"])
    assert one == pytest.approx({"rouge1": 0.4, "rouge2": 0.0, "rougeL": 0.4})
    best = metric.compute(predictions=["a b c", "d"], references=[["x", "a c", "b c"], ["d", "e"]])
    assert best == pytest.approx({"rouge1": 0.9, "rouge2": (2 / 3) / 2, "rougeL": 0.9})


@given(TEXTS, TEXTS)
def test_rouge_is_that_of_the_package(prediction, reference):
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = {name: score.fmeasure for name, score in scorer.score(reference, prediction).items()}
    assert rouge.rouge(prediction, reference) == pytest.approx(expected)
