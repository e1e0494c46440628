# SPDX-License-Identifier: Apache-2.0
"""Spans of whole words from a model that has a class for every byte.

```python
from transformers import pipeline
from modeling_stlm.inference.spans import SpanPipeline

tagger = pipeline("token-classification", "runs/spans", pipeline_class=SpanPipeline, aggregation_strategy="first")
```
"""

import copy
import re
import warnings
from collections.abc import Iterator
from unicodedata import category

import numpy as np
from transformers import TokenClassificationPipeline
from transformers.pipelines.token_classification import AggregationStrategy


NO_SPACES = re.compile(  # between the words of Thai, Lao, Burmese, Khmer, Chinese, Japanese
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U0001b000-\U0001b2ff\U00020000-\U0003ffff]"
)
JOINERS = "_\u200c\u200d"


def is_in_word(character: str) -> bool:
    """Whether it stands in a word beside others: a letter, a digit, a mark on them, or what joins them."""
    return (category(character)[0] in "LMN" or character in JOINERS) and not NO_SPACES.match(character)


def of_same_kind(names: list[str]) -> np.ndarray:
    """Which labels are of the same kind, as `B-X` and `I-X` are: bool `(L, L)`."""
    kinds = [name[2:] if name.startswith(("B-", "I-")) else name for name in names]
    return np.equal.outer(kinds, kinds)


def scores_of_word(scores: np.ndarray, is_same: np.ndarray, strategy: AggregationStrategy) -> np.ndarray:
    """Those of a word `(L,)`, from those of its bytes `(T, L)`.

    The bytes that `strategy` names decide about X, the sum of `B-X` and `I-X`; the first byte divides it between them.
    """
    by_kind = scores @ is_same  # (T, L)
    rows = {
        AggregationStrategy.FIRST: by_kind[0],
        AggregationStrategy.AVERAGE: by_kind.mean(0),
        AggregationStrategy.MAX: by_kind[by_kind.max(-1).argmax()],
    }
    return rows[strategy] * scores[0] / np.maximum(by_kind[0], 1e-30)


def likeliest_labels(scores: np.ndarray, names: list[str]) -> list[int]:
    """The sequence of labels with the largest product of `scores (W, L)`; `I-X` stands only after `B-X` or `I-X`.

    Names without a `B-X`, or not of this form, may stand anywhere.
    """
    before = [{name, f"B{name[1:]}"} if name.startswith("I-") and f"B{name[1:]}" in names else None for name in names]
    is_allowed = np.array([[one is None or name in one for one in before] for name in names])  # (from, to)
    steps = np.where(is_allowed, 0, -np.inf)
    best = np.array([0 if one is None else -np.inf for one in before])  # of the sequences that end with each label
    came_from = []
    for score in np.log(np.maximum(scores, 1e-30)):
        paths = best[:, None] + steps if came_from else best[None]
        came_from.append(paths.argmax(0))
        best = paths.max(0) + score
    labels = [int(best.argmax())]
    for previous in came_from[:0:-1]:
        labels.append(int(previous[labels[-1]]))
    return labels[::-1]


class SpanPipeline(TokenClassificationPipeline):
    """
    The token-classification pipeline, with words that are words of the text.

    In the library's own, `aggregation_strategy="simple"` joins neighbouring bytes of one label and may cut words, and
    `"first"`, `"average"` and `"max"` take what stands between spaces for a word, punctuation included. Here a word is
    a run of letters and digits, and every other character is one of its own, as are those of scripts without spaces; a
    space belongs to the word before it and has no label of its own. The label of a word comes from its first byte
    (`"first"`), the mean over its bytes (`"average"`) or the byte with the largest probability (`"max"`); whether it
    starts a span, always from the first. Chosen is the likeliest sequence of labels in which a span goes on only after
    a word of the same label. Its `score` is the mean probability of the label over its words, `B-` and `I-` together. No
    span begins or ends with a space, and `word` is its text. Under `"none"` and `"simple"` labels are read as in the library.
    Exact F1 with and without these rules: `examples/research/LOG.md`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # On the left, the library pads an empty text with a whole row. Padding of either side changes no output, and the
        # tokenizer that was given stays as it is.
        self.tokenizer = copy.copy(self.tokenizer)
        self.tokenizer.padding_side = "right"

    def _sanitize_parameters(self, stride: int | None = None, **kwargs):
        if stride is not None:
            raise ValueError(
                f"got stride={stride}, but pieces of a text cut words: a model of this package reads it whole"
            )
        return super()._sanitize_parameters(**kwargs)

    def preprocess(self, sentence: str, **kwargs) -> Iterator[dict]:
        """As in the library, whose offsets of an empty text have no axis for their two ends, so that no batch holds them."""
        for inputs in super().preprocess(sentence, **kwargs):
            yield inputs | {"offset_mapping": inputs["offset_mapping"].reshape(1, -1, 2)}

    def gather_pre_entities(self, sentence: str, *args, **kwargs) -> list[dict]:
        """One for each byte, with whether it goes on with the word of the byte before, as spaces do."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tokenizer does not support real words")
            found = super().gather_pre_entities(sentence, *args, **kwargs)
        before = -2  # where the character of the byte before is
        for entity in found:
            at = entity["start"]
            is_next = at == before + 1 and is_in_word(sentence[before]) and is_in_word(sentence[at])
            entity["is_space"] = sentence[at].isspace()
            entity["is_subword"] = at == before or is_next or entity["is_space"]
            before = at
        return found

    def aggregate_words(self, entities: list[dict], aggregation_strategy: AggregationStrategy) -> list[dict]:
        """One for each word, with the label that it has in the likeliest sequence."""
        names = [name for _, name in sorted(self.model.config.id2label.items())]
        is_same, words, scores = of_same_kind(names), [], []
        for entity in entities:
            if entity["is_subword"] and words:
                words[-1].append(entity)
            elif not entity["is_space"]:
                words.append([entity])
        for word in words:
            own = [entity["scores"] for entity in word if not entity["is_space"]]
            scores.append(scores_of_word(np.stack(own), is_same, aggregation_strategy))
        labels = likeliest_labels(np.stack(scores), names) if words else []
        return [
            {
                "entity": names[label],
                "score": score @ is_same[label],
                "word": self.tokenizer.convert_tokens_to_string([entity["word"] for entity in word]),
                "start": word[0]["start"],
                "end": word[-1]["end"],
            }
            for word, score, label in zip(words, scores, labels, strict=True)
        ]

    def postprocess(self, all_outputs: list[dict], *args, **kwargs) -> list[dict]:
        sentence, found = all_outputs[0]["sentence"], []
        for entity in super().postprocess(all_outputs, *args, **kwargs):
            if "entity_group" in entity:
                text = sentence[entity["start"] : entity["end"]].rstrip()
                word, end = text.lstrip(), entity["start"] + len(text)
                entity |= {"word": word, "start": end - len(word), "end": end}
            if entity["word"]:
                found.append(entity)
        return found
