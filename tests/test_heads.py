# SPDX-License-Identifier: Apache-2.0
"""Looking both ways, and the heads on top: against the loop, through the Auto classes, in training and in pipelines."""

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from modeling_stlm import (
    STLMForMaskedLM,
    STLMForMultipleChoice,
    STLMForQuestionAnswering,
    STLMForSequenceClassification,
    STLMForTokenClassification,
    STLMModel,
    STLMTokenizer,
)
from modeling_stlm.configuration_stlm import HEADS

from . import reference
from .tiny import (
    MIXERS,
    PATCHING,
    SHARING,
    TEXT,
    assert_equal,
    batch,
    ids_of,
    randomize,
    tiny_config,
    tiny_model,
)


MASK = 259
MASKED = [MASK if t in (3, 4, 30, 31, 32, 70) else byte for t, byte in enumerate(ids_of(TEXT))]
ROWS = [MASKED, ids_of("A short one. "), ids_of("x"), ids_of("Ends mid wor"), [257, *ids_of("ab c"), MASK, 258]]
CLASSIFIERS = [
    STLMForSequenceClassification,
    STLMForTokenClassification,
    STLMForQuestionAnswering,
    STLMForMultipleChoice,
]


def cases(*tables):
    return [pytest.param(options, id=name) for table in tables for name, options in table.items()]


def masked_lm(**options) -> STLMForMaskedLM:
    return randomize(STLMForMaskedLM(tiny_config(is_causal=False, **options)))


# Looking both ways


@pytest.mark.parametrize("options", cases(PATCHING, MIXERS, SHARING))
@torch.no_grad()
def test_masked_logits_equal_the_slow_reference_padded_packed_and_alone(options):
    model = masked_lm(**options)
    expected = [reference.logits(model, ids) for ids in ROWS]
    for ids, logits in zip(ROWS, expected):
        assert_equal(model(torch.tensor([ids])).logits[0], logits)
    for side in ("left", "right"):
        inputs = batch(ROWS, side)
        padded = model(**inputs).logits
        for row, mask, logits in zip(padded, inputs["attention_mask"], expected):
            assert_equal(row[mask == 1], logits)
    ids = torch.tensor([[i for row in ROWS for i in row]])
    positions = torch.tensor([[t for row in ROWS for t in range(len(row))]])
    assert_equal(model(ids, position_ids=positions).logits[0], torch.cat(expected))


@pytest.mark.parametrize("options", cases(MIXERS))
@torch.no_grad()
def test_every_byte_sees_every_other(options):
    model = masked_lm(**{**options, "trunk_window_patches": None})
    ids = torch.tensor([ids_of(TEXT)])
    before = model(ids).logits
    for t in (0, 40, ids.shape[1] - 1):
        changed = ids.clone()
        changed[0, t] = ord("Q")
        assert (model(changed).logits != before).any(-1).all(), f"some byte does not see byte {t}"


@pytest.mark.parametrize("mask", [MASK, 300])
@torch.no_grad()
def test_a_mask_counts_as_a_letter_and_the_end_closes_the_last_patch(mask):
    model = masked_lm(mask_token_id=mask).model
    for hidden, ends in ((mask, [3, 7, 10]), (MASK + 300 - mask, [3, 6, 10])):  # the other is a special token
        ids = torch.tensor([[*b"one tw", hidden, *b" thr"]])
        boundaries = model(ids, output_boundaries=True).boundaries[0]
        assert boundaries.nonzero()[:, 0].tolist() == ends


@torch.no_grad()
def test_eager_attention_agrees_with_sdpa_both_ways():
    model = masked_lm(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    valid = inputs["attention_mask"] == 1
    assert_equal(model(**inputs).logits[valid], expected[valid])
    weights = model(**inputs, output_attentions=True).attentions
    assert weights[0].shape == (len(ROWS), 2, len(MASKED), len(MASKED))
    # The first byte of a row that is not padded sees bytes on its right: all of its window.
    assert (weights[0][0, :, 0] > 0).sum(-1).tolist() == [9, 9]


def test_what_is_causal_and_what_is_not_is_told_apart():
    with pytest.raises(ValueError, match="is_causal=False to from_pretrained"):
        STLMForMaskedLM(tiny_config())
    with pytest.raises(ValueError, match="needs a config with is_causal=True"):
        AutoModelForCausalLM.from_config(tiny_config(is_causal=False))
    model = masked_lm()
    with pytest.raises(ValueError, match="has no cache"):
        model.model(torch.tensor([[65]]), cache=DynamicCache(config=model.config))
    assert model.model(torch.tensor([[65]]), use_cache=True).cache is None


def test_a_causal_checkpoint_becomes_a_masked_one(tmp_path):
    causal = tiny_model()
    causal.save_pretrained(tmp_path)
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path, is_causal=False, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(model.model.trunk.state_dict(), causal.model.trunk.state_dict(), rtol=0, atol=0)
    model.save_pretrained(tmp_path / "masked")
    assert AutoConfig.from_pretrained(tmp_path / "masked").is_causal is False


def test_masked_bytes_are_learned(tmp_path):
    tokenizer = STLMTokenizer()
    texts = ["the cat sat on the mat. ", "a dog ran to the park. "]
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts * 16]
    model = STLMForMaskedLM(tiny_config(is_causal=False, hidden_size=32, trunk_hidden_size=32))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=150,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.2)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    filled = [MASK if t in (5, 17) else byte for t, byte in enumerate(ids_of(texts[0]))]
    guess = model.eval()(torch.tensor([filled])).logits[0].argmax(-1)
    assert [chr(guess[5]), chr(guess[17])] == ["a", "e"]


# Heads


@pytest.mark.parametrize("head", ["CausalLM", *HEADS])
def test_every_head_is_behind_its_auto_class(head, tmp_path):
    auto = getattr(transformers, f"AutoModelFor{head}")
    config = tiny_config(is_causal=head != "MaskedLM")
    model = auto.from_config(config)
    assert type(model).__name__ == f"STLMFor{head}"
    model.save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    module = "modeling_stlm" if head == "CausalLM" else "heads_stlm"
    assert saved.auto_map[f"AutoModelFor{head}"] == f"{module}.STLMFor{head}"
    loaded = auto.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    base = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base.state_dict(), model.model.state_dict(), rtol=0, atol=0)


def classifier(cls, **options):
    return randomize(cls(tiny_config(num_labels=3, **options)))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@torch.no_grad()
def test_a_row_is_scored_by_the_mean_or_the_last_of_its_bytes(pooling, is_causal):
    model = classifier(STLMForSequenceClassification, classifier_pooling=pooling, is_causal=is_causal)
    for side in ("left", "right"):
        inputs = batch(ROWS, side)
        logits = model(**inputs).logits
        for row, ids in zip(logits, ROWS):
            states = reference.hidden_states(model.model, ids)
            assert_equal(row, model.score(states.mean(0) if pooling == "mean" else states[-1]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_padding_ids_count_for_nothing_without_a_mask(is_causal, side):
    model = classifier(STLMForSequenceClassification, is_causal=is_causal)
    inputs = batch(ROWS, side)
    assert_equal(model(inputs["input_ids"]).logits, model(**inputs).logits)


@torch.no_grad()
def test_choices_and_bytes_are_scored_each_for_itself():
    model = classifier(STLMForMultipleChoice)
    inputs = batch(ROWS[:4], "right")
    pairs = {name: tensor.view(2, 2, -1) for name, tensor in inputs.items()}
    states = torch.stack([reference.hidden_states(model.model, ids).mean(0) for ids in ROWS[:4]])
    assert_equal(model(**pairs).logits, model.score(states).view(2, 2))
    assert_equal(
        model(**pairs, labels=torch.tensor([1, 0])).loss,
        F.cross_entropy(model.score(states).view(2, 2), torch.tensor([1, 0])),
    )

    model = classifier(STLMForQuestionAnswering)
    out = model(**inputs, start_positions=torch.tensor([1, 2, 0, 3]), end_positions=torch.tensor([2, 2, 0, 5]))
    states = reference.hidden_states(model.model, ROWS[1])
    expected = model.qa_outputs(states)
    assert_equal(out.start_logits[1, : len(states)], expected[:, 0])
    assert_equal(out.end_logits[1, : len(states)], expected[:, 1])

    model = classifier(STLMForTokenClassification)
    assert_equal(model(**inputs).logits[1, : len(states)], model.score(reference.hidden_states(model.model, ROWS[1])))


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("regression", torch.tensor([0.5, -1.0, 2.0, 0.0])),
        ("single_label_classification", torch.tensor([0, 2, 1, 1])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])),
    ],
)
def test_micro_batches_add_up_to_the_loss_of_the_batch(problem, labels):
    config = tiny_config(num_labels=1 if problem == "regression" else 3, problem_type=problem)
    model = randomize(STLMForSequenceClassification(config))
    inputs = batch(ROWS[:4], "right")
    whole = model(**inputs, labels=labels).loss
    parts = [
        model(
            **{name: tensor[rows] for name, tensor in inputs.items()},
            labels=labels[rows],
            num_items_in_batch=labels.numel(),
        ).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("cls", CLASSIFIERS)
def test_every_head_trains_every_parameter_with_trainer(cls, tmp_path):
    model = randomize(cls(tiny_config(num_labels=3, classifier_dropout=0.1)))
    ids = ids_of("some words, and more")
    row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
    if cls is STLMForMultipleChoice:
        row = {name: [values, values[::-1]] for name, values in row.items()} | {"labels": 1}
    elif cls is STLMForQuestionAnswering:
        row |= {"start_positions": 5, "end_positions": 10}
    else:
        row |= {"labels": [i % 3 for i in range(len(ids))] if cls is STLMForTokenClassification else 2}
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=[row] * 8, eval_dataset=[row] * 3)
    trainer.train()
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert logged[-1] < 0.7 * logged[0]
    assert trainer.evaluate()["eval_loss"] < logged[0]
    # Weights of n-grams that do not occur and of bytes that are not in the text stay.
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unchanged


@torch.no_grad()
def test_features_of_the_model_work_in_sentence_transformers(tmp_path):
    model = randomize(STLMModel(tiny_config(is_causal=False)))
    model.save_pretrained(tmp_path)
    tokenizer = STLMTokenizer()
    tokenizer.chat_template = None  # with one, sentence-transformers makes a chat message of every text
    tokenizer.save_pretrained(tmp_path)
    encoder = SentenceTransformer(str(tmp_path), device="cpu")  # makes mean pooling by itself
    texts = ["a short text", "one that is a good deal longer"]
    for text, vector in zip(texts, encoder.encode(texts, convert_to_tensor=True)):
        assert_equal(vector, reference.hidden_states(model, ids_of(text)).mean(0))
    for empty in (
        encoder.encode([""], convert_to_tensor=True),
        encoder.encode(["", *texts], convert_to_tensor=True)[:1],
    ):
        assert torch.equal(empty, torch.zeros(1, 16))


@pytest.mark.parametrize("cls", [STLMForSequenceClassification, STLMForTokenClassification])
def test_a_micro_batch_without_labels_has_no_share_of_the_loss(cls):
    model = classifier(cls)
    ids = torch.tensor([ids_of("a row of bytes")])
    labels = torch.full((1,) if cls is STLMForSequenceClassification else ids.shape, -100)
    loss = model(ids, labels=labels, num_items_in_batch=torch.tensor(10)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_long_row_of_large_numbers_has_a_mean_in_float16():
    model = classifier(STLMForSequenceClassification)
    with torch.no_grad():
        hidden = torch.full((1, 16000, 4), 6.0, dtype=torch.float16)
        assert torch.equal(model.pool(hidden, None), hidden[:, 0])


def test_choices_may_share_their_positions():
    model = classifier(STLMForMultipleChoice)
    ids = torch.tensor([[ids_of("one two"), ids_of("two one")]])
    positions = torch.arange(ids.shape[-1])[None]
    with torch.no_grad():
        assert_equal(model(ids, position_ids=positions).logits, model(ids).logits)


@pytest.mark.parametrize("value", [-100.0, -99.0])
def test_every_value_is_a_target_of_a_regression(value):
    model = randomize(STLMForSequenceClassification(tiny_config(num_labels=1)))
    ids, labels = torch.tensor([ids_of("a word")]), torch.tensor([value])
    expected = (model(ids).logits[0, 0] - value) ** 2
    for more in ({}, {"num_items_in_batch": torch.tensor(1)}):
        torch.testing.assert_close(model(ids, labels=labels, **more).loss, expected)


@pytest.mark.parametrize("options", cases(PATCHING, MIXERS))
@torch.no_grad()
def test_documents_packed_between_padding_give_the_logits_of_the_documents_apart(options):
    model = masked_lm(**options)
    ids = torch.tensor([i for row in ROWS for i in row])
    padded = torch.full((1, len(ids) + 9), 256)
    valid = torch.ones_like(padded)
    valid[0, [0, 1, 5, 40, 41, 42, 90, -2, -1]] = 0
    positions = torch.zeros_like(padded)
    padded[valid == 1], positions[valid == 1] = ids, torch.cat([torch.arange(len(row)) for row in ROWS])
    logits = model(padded, position_ids=positions, attention_mask=valid).logits
    assert_equal(logits[valid == 1], torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS]))


@pytest.mark.parametrize("cls", CLASSIFIERS, ids=lambda cls: cls.__name__)
def test_a_head_trained_in_bfloat16_is_told_even_on_a_frozen_model(cls, monkeypatch):
    said = []
    monkeypatch.setattr("modeling_stlm.modeling_stlm.logger.warning_once", said.append)
    model = cls(tiny_config(num_labels=3))
    ids = torch.tensor([ids_of(TEXT)])[None if cls is STLMForMultipleChoice else slice(None)]
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(ids)
    model.to(torch.bfloat16).requires_grad_(False).train()(ids)
    assert said == []
    list(model.children())[-1].requires_grad_(True)
    with torch.no_grad():
        model(ids)
    model.eval()(ids)
    assert said == []
    model.train()(ids)
    assert len(said) == 1 and "Load the model with dtype=torch.float32" in said[0]


def test_the_loss_of_an_answer_is_that_of_start_and_end():
    model, inputs = classifier(STLMForQuestionAnswering), batch(ROWS[:4], "right")
    start, end = torch.tensor([1, 2, 0, 3]), torch.tensor([2, 2, 400, 5])  # one end lies past the input
    outputs = model(**inputs, start_positions=start, end_positions=end)
    end = end.masked_fill(end >= inputs["input_ids"].shape[1], -100)
    expected = (F.cross_entropy(outputs.start_logits, start) + F.cross_entropy(outputs.end_logits, end)) / 2
    assert_equal(outputs.loss, expected)


def test_parts_of_a_batch_of_choices_add_up_to_its_loss():
    model = classifier(STLMForMultipleChoice)
    texts = ("one two", "two one", "a b c d", "ab c de", "no no n", "yes yes")
    ids, labels = torch.tensor([ids_of(text) for text in texts]).view(3, 2, -1), torch.tensor([1, 0, 1])
    parts = [model(ids[r], labels=labels[r], num_items_in_batch=3).loss for r in (slice(0, 1), slice(1, 3))]
    assert_equal(sum(parts), model(ids, labels=labels).loss)


def test_parts_of_a_batch_of_labelled_bytes_add_up_to_its_loss():
    model, inputs = classifier(STLMForTokenClassification), batch(ROWS[:4], "right")
    labels = (inputs["input_ids"] % 3).masked_fill(inputs["attention_mask"] == 0, -100)
    number, parts = int((labels != -100).sum()), []
    for r in (slice(0, 1), slice(1, 4)):
        part = {name: value[r] for name, value in inputs.items()}
        parts.append(model(**part, labels=labels[r], num_items_in_batch=number).loss)
    assert_equal(sum(parts), model(**inputs, labels=labels).loss)


def test_dropout_of_a_classifier_acts_in_training_alone():
    model, ids = (
        classifier(STLMForSequenceClassification, classifier_dropout=0.5),
        torch.tensor([ids_of("some words")]),
    )
    plain = model(ids).logits
    assert not torch.allclose(model.train()(ids).logits, plain)
    assert torch.equal(model.eval()(ids).logits, plain)
