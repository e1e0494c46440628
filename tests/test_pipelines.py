# SPDX-License-Identifier: Apache-2.0
"""The library's pipelines on our models: one by one and in batches, against the model called by hand."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from transformers import pipeline

from modeling_stlm import (
    STLMForMaskedLM,
    STLMForSequenceClassification,
    STLMForTokenClassification,
    STLMModel,
    STLMTokenizer,
)
from modeling_stlm.inference.spans import SpanPipeline, likeliest_labels

from . import reference
from .tiny import assert_equal, ids_of, randomize, tiny_config, tiny_model


TEXTS = ["One. Two", "Zoë met 東京 Bob.", "x"]
ENTAILMENT = {"entailment": 0, "neutral": 1, "contradiction": 2}


def pipe(task: str, model, **options):
    return pipeline(task, model=model, tokenizer=STLMTokenizer(), device="cpu", **options)


def class_logits(model, ids: list[int]) -> torch.Tensor:
    """From the slow reference."""
    with torch.no_grad():
        return model.score(reference.hidden_states(model.model, ids).mean(0))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_generation(batch_size):
    model = tiny_model(use_cache=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "valid_utf8": True}
    for text, out in zip(TEXTS, pipe("text-generation", model)(TEXTS, batch_size=batch_size, **settings)):
        new = model.generate(torch.tensor([ids_of(text)]), **settings)
        assert out[0]["generated_text"] == STLMTokenizer().decode(new[0], skip_special_tokens=True)


def test_fill_mask():
    model = randomize(STLMForMaskedLM(tiny_config(is_causal=False)))
    found = pipe("fill-mask", model)("a w<mask>rd", top_k=3)
    expected = reference.logits(model, [*b"a w", 259, *b"rd"])[3].softmax(-1)
    assert [entry["token"] for entry in found] == expected.topk(3).indices.tolist()
    assert [entry["score"] for entry in found] == pytest.approx(expected.topk(3).values.tolist(), rel=1e-4)
    assert found[0]["sequence"] == "a w" + STLMTokenizer().decode([found[0]["token"]]) + "rd"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_text_classification(batch_size):
    model = randomize(STLMForSequenceClassification(tiny_config(num_labels=3)))
    for text, out in zip(TEXTS, pipe("text-classification", model)(TEXTS, batch_size=batch_size)):
        expected = class_logits(model, ids_of(text)).softmax(-1)
        assert out["label"] == f"LABEL_{expected.argmax()}"
        assert out["score"] == pytest.approx(expected.max().item(), rel=1e-4)


def test_zero_shot_classification():
    labels = {"label2id": ENTAILMENT, "id2label": {number: name for name, number in ENTAILMENT.items()}}
    model = randomize(STLMForSequenceClassification(tiny_config(num_labels=3, **labels)))
    out = pipe("zero-shot-classification", model)(
        "One. Two", candidate_labels=["red", "blue"], hypothesis_template="{}"
    )
    entails = {name: class_logits(model, [*b"One. Two", 258, *name.encode()])[0].item() for name in ("red", "blue")}
    expected = torch.tensor(list(entails.values())).softmax(-1).tolist()
    assert dict(zip(out["labels"], out["scores"])) == pytest.approx(dict(zip(entails, expected)), rel=1e-3)


def test_token_classification_finds_words_by_their_characters():
    model = randomize(STLMForTokenClassification(tiny_config(num_labels=3)))
    text = TEXTS[1]
    with torch.no_grad():
        classes = model.score(reference.hidden_states(model.model, ids_of(text))).argmax(-1).tolist()
    found = pipe("token-classification", model)(text)
    assert [entry["entity"] for entry in found] == [f"LABEL_{label}" for label in classes]
    characters = [i for i, character in enumerate(text) for _ in character.encode()]
    assert [entry["start"] for entry in found] == characters
    # Groups with one label cover the text without a gap; a character of several bytes may be in two of them.
    groups = pipe("token-classification", model, aggregation_strategy="first")(text)
    for before, after in pairwise(groups):
        assert after["start"] == before["end"] or (
            after["start"] == before["end"] - 1 and len(text[after["start"]].encode()) > 1
        )
    assert (groups[0]["start"], groups[-1]["end"]) == (0, len(text))
    assert groups[0]["entity_group"] == f"LABEL_{classes[0]}"


BIO = dict(enumerate(["O", "B-A", "I-A", "B-B", "I-B"]))
WORDS = {  # the words of texts whose bytes a random model labels
    "One. Two's e\u0301te\u0301 Zo\u00eb_9, x": [
        "One",
        ".",
        " ",
        "Two",
        "'",
        "s",
        " ",
        "e\u0301te\u0301",
        " ",
        "Zo\u00eb_9",
        ",",
        " ",
        "x",
    ],
    " \u6771\u4eac\u30bf\u30ef\u30fc tower\u0e44\u0e17\u0e22\U0001f642\U0001f642": [
        *" \u6771\u4eac\u30bf\u30ef\u30fc ",
        "tower",
        *"\u0e44\u0e17\u0e22\U0001f642\U0001f642",
    ],
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd, \u0645\u06cc\u200c\u0631\u0648\u0645": [
        "\u0939\u093f\u0928\u094d\u0926\u0940",
        " ",
        "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd",
        ",",
        " ",
        "\u0645\u06cc\u200c\u0631\u0648\u0645",
    ],
}


def spans_of_words(words: list[str], scores: torch.Tensor, strategy: str) -> list[tuple[int, int, str]]:
    """Start, end and label of each span, from probabilities `scores (bytes, labels)`, word by word."""
    parts, of_words, byte, at = [], [], 0, 0
    for word in words:
        own = scores[byte : byte + len(word.encode())]
        byte += len(word.encode())
        if word.isspace():
            if parts:
                parts[-1] += word
            else:
                at += len(word)
            continue
        parts.append(word)
        kinds = own.clone()
        for first in (1, 3):
            kinds[:, first : first + 2] = own[:, first : first + 2].sum(1, keepdim=True)
        row = {"first": kinds[0], "average": kinds.mean(0), "max": max(kinds, key=lambda of_byte: of_byte.max())}
        of_words.append((row[strategy] * own[0] / kinds[0]).tolist())
    labels = likeliest_labels(np.array(of_words), list(BIO.values()))
    spans = []
    for part, number in zip(parts, labels, strict=True):
        label = BIO[number]
        if label.startswith("I"):
            assert spans[-1][2] == label[2:]
            spans[-1] = (spans[-1][0], at + len(part), label[2:])
        else:
            spans.append((at, at + len(part), label[2:] or "O"))
        at += len(part)
    text = "".join(words)
    found = [(text[start:end], start, kind) for start, end, kind in spans if kind != "O"]
    stripped = [(part.strip(), start + len(part) - len(part.lstrip()), kind) for part, start, kind in found]
    return [(start, start + len(part), kind) for part, start, kind in stripped if part]


@pytest.mark.parametrize("names", [[*BIO.values()], ["O", "B-A", "I-A", "I-B", "C"], ["LABEL_0", "LABEL_1"]])
def test_the_likeliest_labels_are_those_of_a_search_through_all(names):
    def is_allowed(labels):
        begun = {name[2:] for name in names if name.startswith("B-")}
        ends = (None, *labels)
        return all(
            label[:2] != "I-"
            or label[2:] not in begun
            or (before and before[:2] in ("B-", "I-") and before[2:] == label[2:])
            for before, label in pairwise(ends)
        )

    generator = np.random.default_rng(0)
    for words in (1, 2, 4, 4, 4, 4):
        scores = generator.dirichlet(np.full(len(names), 0.5), words)
        sequences = [
            found for found in product(range(len(names)), repeat=words) if is_allowed([names[i] for i in found])
        ]
        best = max(sequences, key=lambda found: np.prod(scores[range(words), found]))
        assert likeliest_labels(scores, names) == list(best)


class Scripted(torch.nn.Module):
    """Probabilities of the labels of `BIO` for each byte, whatever the text is."""

    def __init__(self, probabilities: list[list[float]]):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()[None]

    def forward(self, hidden_states):
        return self.logits


def scripted(text: str, **by_place: list[float]) -> STLMForTokenClassification:
    """A model that says `O` but at the bytes `b0`, `b1` and so on."""
    options = {"is_causal": False, "id2label": BIO, "label2id": {name: i for i, name in BIO.items()}}
    model = STLMForTokenClassification(tiny_config(**options))
    model.score = Scripted([by_place.get(f"b{i}", [0.8, 0.05, 0.05, 0.05, 0.05]) for i in range(len(text.encode()))])
    return model


def spans_found(text: str, **by_place: list[float]) -> list[tuple[str, str]]:
    model = scripted(text, **by_place)
    tagger = pipe("token-classification", model, pipeline_class=SpanPipeline, aggregation_strategy="first")
    return [(span["word"], span["entity_group"]) for span in tagger(text)]


def test_a_name_of_two_words_is_one_span_where_the_model_is_not_sure():
    begins, inside = [0.01, 0.9, 0.03, 0.03, 0.03], [0.01, 0.03, 0.9, 0.03, 0.03]
    assert spans_found("Al Bo x", b0=begins, b3=inside) == [("Al Bo", "A")]  # the space is labelled O
    assert spans_found("Al Bo x", b0=begins, b3=begins) == [("Al", "A"), ("Bo", "A")]
    # The kind likeliest for each word alone is B, then A: a span of B cannot go on as one of A.
    unsure = [0.01, 0.44, 0.01, 0.53, 0.01]
    assert spans_found("Al Bo x", b0=unsure, b3=inside) == [("Al Bo", "A")]
    # The score is that of the kind, over the words.
    model = scripted("Al Bo x", b0=begins, b3=unsure)
    tagger = pipe("token-classification", model, pipeline_class=SpanPipeline, aggregation_strategy="first")
    (span,) = tagger("Al Bo x")[:1]
    assert (span["word"], span["entity_group"]) == ("Al", "A") and span["score"] == pytest.approx(0.93, abs=1e-4)
    assert spans_found("   ", b0=begins) == [] == spans_found("\u3000", b0=begins)
    # Spaces at the start of a text are no word that a span could begin with.
    assert spans_found("  Al x", b0=begins, b2=[0.3, 0.05, 0.6, 0.03, 0.02]) == spans_found(
        "Al x", b0=[0.3, 0.05, 0.6, 0.03, 0.02]
    )
    # A span begins before it goes on.
    assert spans_found("Al x", b0=[0.2, 0.3, 0.48, 0.01, 0.01]) == [("Al", "A")]


@pytest.mark.parametrize("strategy", ["first", "average", "max"])
@pytest.mark.parametrize("text", WORDS)
def test_spans_are_whole_words(text, strategy):
    config = tiny_config(is_causal=False, id2label=BIO, label2id={name: i for i, name in BIO.items()})
    model, found = randomize(STLMForTokenClassification(config)), set()
    tagger = pipe("token-classification", model, pipeline_class=SpanPipeline, aggregation_strategy=strategy)
    for seed in range(10):
        torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            scores = model.score(reference.hidden_states(model.model, ids_of(text))).softmax(-1)
        spans = [(span["start"], span["end"], span["entity_group"]) for span in tagger(text)]
        assert spans == spans_of_words(WORDS[text], scores, strategy)
        assert [span["word"] for span in tagger(text)] == [text[start:end] for start, end, _ in spans]
        found |= set(spans)
    assert len(found) > len(WORDS[text])


def test_spans_are_not_looked_for_in_pieces_of_a_text():
    model = randomize(STLMForTokenClassification(tiny_config(num_labels=3)))
    with pytest.raises(ValueError, match="stride=2"):
        pipe("token-classification", model, pipeline_class=SpanPipeline, aggregation_strategy="first", stride=2)


def test_bytes_of_spans_are_those_of_the_library():
    model = randomize(STLMForTokenClassification(tiny_config(num_labels=3)))
    by_class = [
        pipe("token-classification", model, **options)(TEXTS) for options in ({}, {"pipeline_class": SpanPipeline})
    ]
    assert by_class[0] == by_class[1]


@pytest.mark.parametrize("options", [{}, {"is_causal": False}, {"classifier_pooling": "last"}])
def test_an_empty_text_has_no_evidence_for_any_class(options):
    model = randomize(STLMForSequenceClassification(tiny_config(num_labels=3, **options)))
    (found,) = pipe("text-classification", model, top_k=None)([""])
    assert [entry["score"] for entry in found] == pytest.approx([1 / 3] * 3)
    tagger = randomize(STLMForTokenClassification(tiny_config(num_labels=3, **options)))
    assert pipe("token-classification", tagger)("") == []
    together = model(torch.tensor([[*b"One"], [256] * 3])).logits[1]  # beside another text it is a row of padding
    assert torch.equal(together, model(torch.zeros(1, 0)).logits[0])
    with pytest.raises(ValueError, match="expected"):
        model.train()(torch.zeros(1, 0, dtype=torch.long), labels=torch.tensor([0]))


def test_an_empty_text_in_a_batch():
    # On the left the library's pipelines pad it with the whole row: the examples save tokenizers that pad on the right.
    texts, tokenizer = ["One. Two", "", "x"], STLMTokenizer(padding_side="right")
    model = randomize(STLMForSequenceClassification(tiny_config(num_labels=3, is_causal=False)))
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    for alone, batched in zip(classify(texts), classify(texts, batch_size=3), strict=True):
        assert [entry["score"] for entry in batched] == pytest.approx([entry["score"] for entry in alone], rel=1e-4)
    tagger = randomize(STLMForTokenClassification(tiny_config(num_labels=3, is_causal=False)))
    options = {"tokenizer": tokenizer, "device": "cpu", "pipeline_class": SpanPipeline}
    tag = pipeline("token-classification", model=tagger, aggregation_strategy="first", **options)
    alone, batched = tag(texts), tag(texts, batch_size=3)
    assert alone[1] == batched[1] == [] and alone[0]
    left = STLMTokenizer(padding_side="left")  # as that of a causal checkpoint
    tag = pipeline("token-classification", model=tagger, aggregation_strategy="first", **options | {"tokenizer": left})
    assert tag(texts, batch_size=3) == batched and left.padding_side == "left"
    assert [[entry["word"] for entry in row] for row in batched] == [[entry["word"] for entry in row] for row in alone]


def test_an_encoder_has_no_states_of_no_bytes():
    empty = STLMTokenizer()([""], return_tensors="pt")
    assert STLMModel(tiny_config(is_causal=False)).eval()(**empty).last_hidden_state.shape == (1, 0, 16)
    with pytest.raises(ValueError, match="expected"):
        STLMModel(tiny_config()).eval()(**empty)


def test_feature_extraction():
    model = randomize(STLMModel(tiny_config()))
    out = torch.tensor(pipe("feature-extraction", model)("One. Two"))[0]
    assert_equal(out, reference.hidden_states(model, ids_of("One. Two")))


def test_question_answering_is_gone_from_the_library():
    # The head is there; when the pipeline comes back this test will say so.
    with pytest.raises(KeyError, match="removed from transformers"):
        pipeline("question-answering")
