# SPDX-License-Identifier: Apache-2.0
"""Encoders, and the examples for one job each: classes, spans, embeddings."""

import argparse
import gzip
import importlib
import json
import math
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from modeling_stlm import STLMForMaskedLM, STLMTokenizer
from modeling_stlm.batching_stlm import STLMBatch
from modeling_stlm.heads_stlm import mean_over_bytes
from modeling_stlm.layers_stlm import ByteRows, STLMShortConv
from modeling_stlm.training.model_card import build_model_card
from modeling_stlm.training.sentence_embeddings import (
    EmbeddedPassages,
    EmbeddingTrainer,
    compress,
    look_both_ways,
    passages_of,
    save_sentence_transformer,
)

from .hub_server import metadata_errors
from .test_examples import ROOT, refused, run
from .tiny import assert_equal, batch, ids_of, randomize, tiny_config, tiny_model


sys.path.append(str(ROOT / "examples"))
classify, ner, rows, run_folder = (importlib.import_module(name) for name in ("classify", "ner", "rows", "run_folder"))

TOKENIZER = STLMTokenizer()
ANIMALS = [f"The {animal} {verb}." for animal in ("cat", "dog", "cow", "hen") for verb in ("eats", "runs", "sleeps")]
TOOLS = [f"A {tool} is {state}!" for tool in ("saw", "drill", "nail", "file") for state in ("sharp", "new", "lost")]


def tiny_encoder() -> STLMForMaskedLM:
    return randomize(STLMForMaskedLM(tiny_config(is_causal=False)))


def embedded(noise=None) -> EmbeddedPassages:
    texts = ANIMALS + TOOLS
    vectors = torch.eye(16)[[3] * len(ANIMALS) + [8] * len(TOOLS)].numpy()
    return EmbeddedPassages(texts, vectors, TOKENIZER, noise)


def test_passages_are_whole_sentences_of_a_paragraph():
    sentences = [[f"Sentence {i} of paragraph {p} ends here." for i in range(20)] for p in range(9)]
    document = "\n\n".join(["The title", *map(" ".join, sentences)])
    generator = random.Random(0)
    found = [passage for _ in range(20) for passage in passages_of(document, 120, generator)]
    titled = [passage for passage in found if passage.startswith("The title ")]
    assert 0 < len(titled) < len(found) / 2
    for passage in found:
        text = passage.removeprefix("The title ")
        assert 30 <= len(text) <= 120
        assert any(text in " ".join(paragraph) for paragraph in sentences)
        assert text.startswith("Sentence") and text.endswith("here.")


def test_passages_of_one_paragraph_and_without_spaces():
    paragraph = (
        "The first sentence of a paragraph. The second one is longer than that. And a third one, which ends it."
    )
    japanese = (
        "東京都は日本の首都であり、世界最大の都市圏の一つである。人口は約一千四百万人で、経済の中心地となっている。"
    )
    for document, text, titles in (
        (paragraph, paragraph, [""]),
        (f"The title\n{paragraph}", paragraph, ["", "The title "]),
        (f"標題\n{japanese}", japanese, ["", "標題 "]),
        ("a word and " * 60, "a word and " * 60, [""]),  # one sentence longer than a passage
    ):
        found = {passage for seed in range(30) for passage in passages_of(document, 110, random.Random(seed))}
        assert found and all(len(passage.encode()) <= 110 + len("The title ") for passage in found)
        assert all(any(passage.removeprefix(title) in text for title in titles) for passage in found)
        assert {title for title in titles if any(passage.startswith(title) for passage in found)} == set(titles)
    assert passages_of(japanese, 400, random.Random(0)) == [japanese]


def test_passages_of_a_document_without_text():
    assert passages_of("", 100, random.Random(0)) == passages_of("A title alone", 100, random.Random(0)) == []


def test_compressed_embeddings_keep_the_cosines_they_can_keep():
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(50, 4)) @ generator.normal(size=(4, 12))  # of four dimensions, really
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    small = compress(embeddings, 4)
    assert small.shape == (50, 4)
    np.testing.assert_allclose(small @ small.T, embeddings @ embeddings.T, atol=1e-5)
    kept = [
        np.abs(compress(embeddings, size) @ compress(embeddings, size).T - embeddings @ embeddings.T)
        for size in (1, 3)
    ]
    assert kept[1].mean() < kept[0].mean()


def test_an_embedding_of_zeros_trains_nothing_and_a_narrow_teacher_is_refused(tmp_path):
    embeddings = np.random.default_rng(0).normal(size=(24, 32))
    embeddings[3] = 0
    small = compress(embeddings, 16)
    np.testing.assert_allclose(np.linalg.norm(small, axis=1), np.arange(24) != 3, atol=1e-6)
    data = EmbeddedPassages(ANIMALS + TOOLS, small, TOKENIZER)
    model = STLMForMaskedLM(tiny_config(is_causal=False))
    EmbeddingTrainer(model, arguments(tmp_path, max_steps=4), train_dataset=data, data_collator=data.collate).train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with pytest.raises(ValueError, match="embeddings have width 8, expected at least 16"):
        compress(embeddings[:, :8], 16)


def test_rows_are_damaged_always_in_the_same_way():
    data = embedded(noise=lambda text, generator: text.upper())
    kinds = {"clean": 0, "masked": 0, "noisy": 0}
    for index, text in enumerate(data.passages):
        item = data[index]
        torch.manual_seed(index)  # the state of no global generator matters
        again = data[index]
        assert all(torch.equal(item[name], again[name]) for name in item)
        assert item["embeddings"].tolist() == data.embeddings[index].tolist()
        ids, is_masked = item["input_ids"], item["labels"] != -100
        assert torch.equal(ids == TOKENIZER.mask_token_id, is_masked)
        restored = torch.where(is_masked, item["labels"], ids).tolist()
        assert restored in (ids_of(text), ids_of(text.upper()))
        kinds["masked" if is_masked.any() else "clean" if restored == ids_of(text) else "noisy"] += 1
    assert kinds["clean"] > max(kinds["masked"], kinds["noisy"]) and min(kinds.values()) > 0


def test_passages_without_embeddings_are_refused():
    with pytest.raises(ValueError, match="24 passages and 3 embeddings"):
        EmbeddedPassages(ANIMALS + TOOLS, np.zeros((3, 16)), TOKENIZER)


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def trained(folder, resume=None, **options) -> STLMForMaskedLM:
    set_seed(0)
    model, data = STLMForMaskedLM(tiny_config(is_causal=False)), embedded()
    options = {"max_steps": 8, "learning_rate": 1e-2, "save_steps": 4} | options
    trainer = EmbeddingTrainer(model, arguments(folder, **options), train_dataset=data, data_collator=data.collate)
    trainer.train(resume_from_checkpoint=resume)
    return model


def test_loss_is_that_of_masked_bytes_and_of_cosines(tmp_path):
    model, data = tiny_encoder(), embedded()
    inputs = data.collate([data[i] for i in range(12)])
    total, nats = 0.0, []
    for ids, mask, labels, target in zip(
        *(inputs[n] for n in ("input_ids", "attention_mask", "labels", "embeddings"))
    ):
        outputs = model(ids[mask == 1][None], output_hidden_states=True)
        total += 1 - (F.cosine_similarity(outputs.hidden_states[-1][0].mean(0), target, dim=0)).item()
        nats += [-float(outputs.logits[0, t].log_softmax(-1)[i]) for t, i in enumerate(labels.tolist()) if i != -100]
    assert nats
    trainer = EmbeddingTrainer(model, arguments(tmp_path), embedding_weight=3.0)
    loss = float(trainer.compute_loss(model, dict(inputs)))
    assert loss == pytest.approx(3 * total / 12 + sum(nats) / len(nats), rel=1e-4)


def test_rows_without_masks_have_no_loss_of_bytes(tmp_path):
    model, data = tiny_encoder(), embedded()
    inputs = data.collate([data[0]])
    inputs["labels"].fill_(-100)
    loss = EmbeddingTrainer(model, arguments(tmp_path), embedding_weight=0.0).compute_loss(model, inputs)
    assert loss == 0


def test_an_empty_passage_keeps_the_loss_finite(tmp_path):
    model, data = tiny_encoder(), embedded()
    inputs = data.collate(
        [data[0], {name: value[:0] for name, value in data[1].items()} | {"embeddings": data[1]["embeddings"]}]
    )
    loss = EmbeddingTrainer(model, arguments(tmp_path)).compute_loss(model, inputs)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_embeddings_are_learned_and_a_resumed_training_is_the_same(tmp_path):
    whole = trained(tmp_path / "whole", max_steps=60)
    data = embedded()
    inputs = data.collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        states = whole.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    pooled = mean_over_bytes(states, inputs["attention_mask"])
    assert F.cosine_similarity(pooled, inputs["embeddings"]).mean() > 0.8

    once = trained(tmp_path / "once")
    resumed = trained(tmp_path / "resumed", resume=str(tmp_path / "once" / "checkpoint-4"))
    for name, value in once.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)


@torch.no_grad()
def test_a_tap_of_a_convolution_keeps_its_place():
    causal = tiny_model(conv_kernel_size=4).model.local_encoder[0].mixer
    model = tiny_encoder()
    model.model.local_encoder[0].mixer.load_state_dict(causal.state_dict())
    both_ways = look_both_ways(model).model.local_encoder[0].mixer
    assert isinstance(both_ways, STLMShortConv) and both_ways.num_after == 1
    causal.conv.weight[..., 0] = 0  # the oldest tap, for which there is no room
    states = torch.randn(2, 9, 16)
    rows = ByteRows(STLMBatch.of(torch.zeros(2, 9, dtype=torch.long)))
    torch.testing.assert_close(both_ways(states, rows)[0], causal(states, rows)[0])


@torch.no_grad()
def test_one_folder_for_sentence_transformers_and_for_every_head(tmp_path):
    model, texts = tiny_encoder(), ["a short text", "one that is a good deal longer, ä"]
    save_sentence_transformer(model, TOKENIZER, tmp_path)
    assert TOKENIZER.chat_template is not None  # that of the caller stays
    encoder = SentenceTransformer(str(tmp_path), device="cpu")
    for text, vector in zip(texts, encoder.encode(texts, convert_to_tensor=True)):
        assert_equal(vector, model.model(torch.tensor([ids_of(text)])).last_hidden_state[0].mean(0))
    for auto in (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert not loaded.config.is_causal and loaded.dtype == torch.float32
        for name, value in model.model.state_dict().items():
            torch.testing.assert_close(loaded.model.state_dict()[name], value, rtol=0, atol=0, msg=name)
    inputs = batch([ids_of(text) for text in texts], "right")
    expected = model(**inputs).logits[1]
    assert_equal(AutoModelForMaskedLM.from_pretrained(tmp_path)(**inputs).logits[1], expected)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "base"
    set_seed(0)
    save_sentence_transformer(STLMForMaskedLM(tiny_config(is_causal=False)), TOKENIZER, folder)
    card = "---\nlicense: mit\nlanguage: en\n---\n\n# base\n\n## Data\n\nSome.\n"
    (folder / "README.md").write_text(card)
    return folder


def check_card(folder, task: str, score: tuple[str, float]) -> str:
    """That of what was trained on labels from `encoder_folder`."""
    card = build_model_card(folder)
    assert (card.data.license, card.data.language, card.data.pipeline_tag) == ("mit", "en", task)
    assert [(e.task_type, e.dataset_split, e.metric_type, e.metric_value) for e in card.data.eval_results] == [
        (task, "test", *score)
    ]
    assert metadata_errors(str(card)) == [] and str(folder.parent) not in (folder / "results.json").read_text()
    return card.text


def labelled(path, texts_and_labels) -> str:
    path.write_text("text,label\n" + "".join(f'"{text}",{label}\n' for text, label in texts_and_labels))
    return str(path)


@pytest.fixture
def animals_and_tools(tmp_path) -> tuple[str, str]:
    pairs = [(text, "animal") for text in ANIMALS] + [(text, "tool") for text in TOOLS]
    return labelled(tmp_path / "train.csv", pairs * 2), labelled(tmp_path / "test.csv", pairs[::3])


def test_classify_goes_from_rows_to_a_pipeline(encoder_folder, animals_and_tools, tmp_path):
    train, test = animals_and_tools
    numbers = {"runs": 2, "epochs": 4, "adversarial_epsilon": 0.5, "learning_rate": 1e-2, "batch_size": 8}
    options = [word for name, number in numbers.items() for word in (f"--{name}", number)]
    options += ["--output", tmp_path / "out"]
    printed = run(
        "classify.py", "--checkpoint", encoder_folder, "--train", train, "--test", test, *options, cwd=tmp_path
    )
    assert "accuracy on 8 rows: 100.0%" in printed and "TF-IDF with logistic regression: 100.0%" in printed
    assert (
        "ms per row" in printed
        and f'pipeline("text-classification", "{tmp_path / "out"}", truncation=True)' in printed
    )
    assert "8 of the texts to test on are among those to train on" in printed
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 512
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    ids = torch.tensor([TOKENIZER("The pig eats.")["input_ids"]])
    assert loaded.config.id2label[int(loaded(ids).logits.argmax())] == "animal"
    check_card(tmp_path / "out", "text-classification", ("accuracy", 1.0))
    push = ["push_to_hub.py", "--checkpoint", tmp_path / "out", "--repo_id", "me/animals", "--dry_run"]
    card = run(*push, cwd=tmp_path)
    for sentence in (
        "| split | accuracy |\n|---|---|\n| test | 1.0000 |\n| test, head alone | ",
        "\n| test, TF-IDF with logistic regression | 1.0000 |\n",
        "- head: 2 classes of a text: `animal`, `tool`\n",
        "- fine-tuned from `base`\n- 48 steps\n- train: train.csv, 48 rows\n- test: test.csv, 8 rows\n- runs: 2\n- epochs: 4\n"
        "- adversarial_epsilon: 0.5\n- learning_rate: 0.01\n- batch_size: 8\n- max_bytes: 512\n- bf16: ",
        "- seed: 1\n",
        "## Data\n\nThe texts of this training (train.csv, 48 rows) are not described here. ",
        "### Before that: the texts of `base`\n\nSome.\n",
    ):
        assert sentence in card


class Recorder(TrainerCallback):
    def __init__(self):
        self.starts, self.ends, self.optimizers = [], [], []

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.starts.append({name: value.clone() for name, value in model.state_dict().items()})
        self.optimizers.append(optimizer)

    def on_train_end(self, args, state, control, model, **kwargs):
        self.ends.append({name: value.clone() for name, value in model.state_dict().items()})


def test_runs_share_their_start_and_end_in_the_mean_of_their_weights(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_config(is_causal=False, num_labels=2))
    data = [{"input_ids": ids_of(text), "labels": i % 2} for i, text in enumerate(ANIMALS + TOOLS)]
    before, recorder = {name: value.clone() for name, value in model.state_dict().items()}, Recorder()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=TOKENIZER, callbacks=[recorder])
    run_folder.train_runs(trainer, 3)
    assert len({id(optimizer) for optimizer in recorder.optimizers}) == 3
    for name, value in model.state_dict().items():
        ends = torch.stack([end[name] for end in recorder.ends])
        assert all(torch.equal(start[name], before[name]) for start in recorder.starts)
        torch.testing.assert_close(value, ends.mean(0))
    weight = torch.stack([end["score.weight"] for end in recorder.ends])
    assert not torch.equal(weight[0], weight[1]) and not torch.equal(weight[1], weight[2])  # orders differ


def test_what_the_card_calls_rows():
    def called(train: str | None, test: str | None) -> dict:
        return classify.files_of(argparse.Namespace(train=train and rows.Path(train), test=test and rows.Path(test)))

    assert called("a/b.csv", "c/d.csv") == {"train": "b.csv", "test": "d.csv"}
    assert called("a/b.csv", None) == {"train": "four fifths of b.csv", "test": "a fifth of b.csv"}
    assert called(None, None)["test"] == "a fifth of the speeches in shakespeare.txt"


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_head_starts_as_the_logistic_regression(num_labels):
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    labels = generator.integers(num_labels, size=60)
    features = generator.normal(size=(60, 16)) * np.linspace(0.1, 3, 16) + np.eye(16)[labels]
    model = AutoModelForSequenceClassification.from_config(tiny_config(is_causal=False, num_labels=num_labels))
    classify.start_head(model, features, labels)
    fitted = LogisticRegression(C=0.1, fit_intercept=False, max_iter=1000).fit(features / features.std(0), labels)
    found = model.score(torch.tensor(features, dtype=torch.float32)).softmax(-1).detach().numpy()
    np.testing.assert_allclose(found, fitted.predict_proba(features / features.std(0)), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "text,topic\na,b\n", "row 1 of rows.csv has the columns .*topic.*expected `text` and `label`"),
        ("rows.csv", "text,label\na,1\n,2\n", "row 2 of rows.csv has an empty `text`"),
        ("rows.csv", "text,label\na,1\nb, \n", "row 2 of rows.csv has an empty `label`"),
        ("rows.csv", "text,label\na,1\nb\n", "row 2 of rows.csv has an empty `label`"),
        ("rows.csv", "text,label\na,x\nb,x \n", "expected at least 2"),
        ("ROWS.CSV", "text,label\na,1\n,2\n", "row 2 of ROWS.CSV has an empty `text`"),
        ("rows.jsonl", '{"text": 5, "label": "x"}\n', "row 1 of rows.jsonl has the text 5, expected a string"),
        ("rows.tsv", "text\tlabel\na\t1\n", "rows.tsv is neither .csv nor .jsonl"),
        ("rows.csv", "text,label\na,1\nb,1\n", "expected at least 2"),
        ("rows.jsonl", '{"text": "a", "label": 0}\n{"text": "b"}\n', "row 2 .*expected `text` and `label`"),
    ],
)
def test_what_is_wrong_with_labelled_rows_is_said(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match=message):
        rows.read_labelled(rows.Path(name))


def test_two_rows_leave_nothing_to_test_on():
    with pytest.raises(SystemExit, match="2 rows are too few to test on a share of"):
        rows.split_rows((["a", "b"], ["x", "y"]))


def test_a_rare_label_is_trained_on():
    texts, labels = [str(i) for i in range(20)], ["common"] * 20
    for rare in range(20):
        train, test = rows.split_rows((texts, [*labels[:rare], "rare", *labels[rare + 1 :]]))
        assert "rare" in train[1] and "rare" not in test[1] and len(test[0]) in (3, 4)
        assert sorted(train[0] + test[0]) == sorted(texts)


def test_rows_of_a_label_each_leave_nothing_to_test_on():
    with pytest.raises(SystemExit, match="has a label of its own"):
        rows.split_rows(([str(i) for i in range(10)], [str(i) for i in range(10)]))


def test_rows_to_test_on_may_have_one_label(tmp_path):
    path = Path(labelled(tmp_path / "rows.csv", [("a", "x"), ("b", "x")]))
    assert rows.read_labelled(path, fewest_labels=1) == (["a", "b"], ["x", "x"])


@pytest.mark.parametrize("script", ["classify.py", "ner.py", "chat_sft.py", "finetune.py", "distill.py", "inherit.py"])
def test_a_model_of_another_job_is_not_written_over(script, encoder_folder):
    # That of the fixture is a masked language model, which none of these writes.
    before = {path: path.read_bytes() for path in encoder_folder.glob("*") if path.is_file()}
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), "--output", str(encoder_folder)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "holds a STLMForMaskedLM, of another job: use another" in result.stderr
    assert before == {path: path.read_bytes() for path in encoder_folder.glob("*") if path.is_file()}


@pytest.mark.parametrize("script", ["chat_sft.py", "finetune.py"])
@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("results.json", {"script": "distill.py"}, "results of distill.py"),
        ("results.json", {"script": "finetune.py"}, "results of finetune.py"),
        ("begun.json", {}, "begun.json"),
        ("README.md", {}, "README.md"),
        ("results.json", {}, None),  # of earlier versions
        ("results.json", None, "a results.json that is no JSON"),
    ],
)
def test_the_same_kind_of_model_of_another_job_is_not_written_over(script, name, content, found, tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["STLMForCausalLM"]}')
    (tmp_path / name).write_text("{" if content is None else json.dumps(content))
    missing = "--train" if script == "chat_sft.py" else "--text"  # told after what is wrong with --output
    command = [sys.executable, ROOT / "examples" / script, "--output", ".", missing, "none"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    is_own = script == "finetune.py" and (name == "begun.json" or content == {"script": script})
    words = (
        "none is no such file" if found is None or is_own else f"argument --output: . holds {found}, of another job"
    )
    assert result.returncode == 2 and words in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("is_asked_to_save", [False, True])
def test_weights_and_scores_that_are_not_finite_are_not_saved(is_asked_to_save):
    model, callback, state = tiny_model(), run_folder.EndOnDivergence("x"), TrainerState(global_step=7)
    control = TrainerControl(should_save=is_asked_to_save, should_log=True)
    callback.on_step_end(None, state, control, model=model)
    callback.on_evaluate(None, state, control, metrics={"eval_loss": 1.0, "eval_runtime": math.inf})
    callback.on_train_end(None, state, control, model=model)
    assert not control.should_training_stop and control.should_save == is_asked_to_save
    with pytest.raises(SystemExit, match=r"step 7: .* its scores are not finite .* Lower x"):
        callback.on_evaluate(None, state, control, metrics={"eval_bits_per_byte": math.nan})
    with torch.no_grad():
        model.model.final_norm.weight[3] = torch.nan
    callback.on_step_end(None, state, control, model=model)
    assert control.should_training_stop and not control.should_save and not control.should_evaluate
    with pytest.raises(SystemExit, match=r"step 7: .* its weights are not finite .* Lower x"):
        callback.on_train_end(None, state, control, model=model)


def test_a_training_that_diverges_ends_at_the_next_log(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_config(is_causal=False, num_labels=2))
    data = [{"input_ids": ids_of(text), "labels": i % 2} for i, text in enumerate(ANIMALS + TOOLS)]
    options = {"max_steps": 100, "logging_steps": 5, "learning_rate": 1e38, "save_strategy": "no"}
    trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=data, processing_class=TOKENIZER)
    with pytest.raises(SystemExit, match="the training diverged"):
        run_folder.train_runs(trainer, 1)
    assert trainer.state.global_step <= 10


def test_ctrl_c_says_that_nothing_is_saved(encoder_folder, animals_and_tools, tmp_path):
    options = ["--checkpoint", encoder_folder, "--train", animals_and_tools[0], "--epochs", "9999", "--output", "out"]
    command = [sys.executable, "-u", str(ROOT / "examples" / "classify.py"), *map(str, options)]  # each line at once
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that runs the tests in the background has them, and so the script, ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, **pipes, text=True, cwd=tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert any("'loss'" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.endswith("\ninterrupted: nothing of this training is saved\n")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_commit_is_empty_where_there_is_no_git(monkeypatch):
    assert run_folder.commit() == run_folder.COMMIT
    monkeypatch.setenv("PATH", "")
    assert run_folder.commit() == ""


def test_a_text_of_a_csv_may_be_long(tmp_path):
    long = labelled(tmp_path / "rows.csv", [("a" * 200_000, "x"), ("b", "y")])
    assert [len(text) for text in rows.read_labelled(Path(long))[0]] == [200_000, 1]


def test_labels_may_be_numbers_and_texts_of_many_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b\\nc", "label": 1}\n')
    assert rows.read_labelled(path) == (["a", "b\nc"], ["0", "1"])
    path = tmp_path / "rows.csv"
    path.write_text('\ufefflabel,text\nx,"one\ntwo, three"\ny,four\n')
    assert rows.read_labelled(path) == (["one\ntwo, three", "four"], ["x", "y"])


def test_speeches_of_the_shipped_play():
    texts, labels = rows.speeches(ROOT / "examples" / "data" / "shakespeare.txt")
    assert len(set(labels)) == 4 and len(texts) == len(labels) > 200
    assert not any("\n" in text or "ROMEO:" in text for text in texts)
    train, test = rows.split_rows((texts, labels))
    assert len(test[0]) == round(len(texts) * 0.2)
    assert sorted([*zip(*train), *zip(*test)]) == sorted(zip(texts, labels))


def test_nearest_neighbours_of_embeddings(encoder_folder, animals_and_tools, tmp_path):
    train = animals_and_tools[0]
    test = labelled(tmp_path / "one_label.csv", [(text, "animal") for text in ANIMALS[::3]])
    printed = run("embed.py", "--checkpoint", encoder_folder, "--train", train, "--test", test, cwd=tmp_path)
    assert "label of the nearest of 48 rows, for 4 rows: 100.0%" in printed and "with TF-IDF: 100.0%" in printed
    (tmp_path / "lines.txt").write_text("\n".join(ANIMALS))
    options = ["--texts", tmp_path / "lines.txt", "--query", "The dog runs."]
    printed = run("embed.py", "--checkpoint", encoder_folder, *options, cwd=tmp_path)
    assert "1.000  'The dog runs.'" in printed
    for text, words in ("\n \n", "0 lines with text"), ("One line.\n", "1 lines with text"):
        (tmp_path / "few.txt").write_text(text)
        told = refused("embed.py", "--checkpoint", encoder_folder, "--texts", "few.txt", cwd=tmp_path)
        assert told == f"few.txt has {words}, expected at least 2: add lines, or give --query"


def test_neighbours_are_found_some_queries_at_a_time(monkeypatch):
    embed = importlib.import_module("embed")
    generator = np.random.default_rng(0)
    queries, rows = generator.normal(size=(11, 5)), generator.normal(size=(30, 5))
    expected = (queries @ rows.T).argmax(1)
    monkeypatch.setattr(embed, "QUERIES", 4)
    assert embed.neighbours(queries, rows).tolist() == expected.tolist()
    assert embed.neighbours(csr_matrix(queries), csr_matrix(rows)).tolist() == expected.tolist()
    largest = 0

    class Watched(np.ndarray):
        def __array_finalize__(self, other):
            nonlocal largest
            largest = max(largest, self.size)

    embed.neighbours(queries.view(Watched), rows.view(Watched))
    assert largest == rows.size  # 11 queries with 30 rows would be 330


def test_tags_of_bytes_and_spans_that_were_found():
    label2id = {"O": 0, "B-NAME": 1, "I-NAME": 2}
    row = {"text": "See Zoë, Al", "spans": [[4, 7, "NAME"], [9, 11, "NAME"]]}
    encoded = ner.tagged(row, TOKENIZER, label2id, 512)
    assert encoded == {"input_ids": ids_of(row["text"]), "labels": [0, 0, 0, 0, 1, 2, 2, 2, 0, 0, 1, 2]}
    assert ner.tagged(row, TOKENIZER, label2id, 6)["labels"] == [0, 0, 0, 0, 1, 2]  # cut
    right = [{(4, 7, "NAME"), (9, 11, "NAME")}, set()]
    assert ner.f1(right, right) == 1
    assert ner.f1([{(4, 7, "NAME"), (9, 10, "NAME")}, {(0, 1, "NAME")}], right) == pytest.approx(2 * 1 / (3 + 2))
    assert ner.looked_up([row], [{"text": "Al saw Zoë and Alan"}]) == [{(0, 2, "NAME"), (7, 10, "NAME")}]


def test_words_have_random_letters_of_their_kind():
    texts = ["Zo\u00eb met Ann-Lu, at 9:45. \u6771\u4eac", "x Bo"]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids_of(text)) for text in texts], True, 256)
    assert_equal(ner.with_random_words(ids, 0.0), ids)
    torch.manual_seed(0)
    found = torch.stack([ner.with_random_words(ids, 1.0) for _ in range(200)])
    kinds = ("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789")
    for row, text in enumerate(texts):
        for at, byte in enumerate(text.encode()):
            kind = next((kind for kind in kinds if chr(byte) in kind), chr(byte))
            assert {chr(i) for i in found[:, row, at].tolist()} == set(kind)
    assert (found[:, 1, 4:] == 256).all()


def test_a_word_is_noisy_as_a_whole_at_its_rate():
    ids = torch.tensor([ids_of("Zo\u00ebzoe " + "abcdefghijklmnop " * 400 + "end")])
    torch.manual_seed(0)
    drawn = [(ner.with_random_words(ids, 0.3) != ids)[0] for _ in range(100)]
    before, after = (torch.stack([changed[part].any() for changed in drawn]) for part in (slice(2), slice(4, 7)))
    assert (before == after).float().mean() > 0.95  # the letters before and after the accented one are of one word
    changed = drawn[0]
    words = changed[8:-3].reshape(400, 17)
    assert not words[:, 16].any()
    share = words[:, :16].float().mean(1)  # 25 of 26 random letters are others
    assert ((share == 0) | (share > 0.5)).all() and (share > 0).float().mean().item() == pytest.approx(0.3, abs=0.07)


def test_a_batch_has_noisy_words_and_the_labels_of_its_rows():
    rows = [
        {"input_ids": ids_of("a longer text"), "labels": [0] * 13},
        {"input_ids": ids_of("Ann"), "labels": [1, 2, 2]},
    ]
    for rate in (0.0, 1.0):
        batch = ner.NoisyCollator(TOKENIZER, rate)([dict(row) for row in rows])
        assert_equal(batch["labels"][1], torch.tensor([-100] * 10 + [1, 2, 2]))
        assert (batch["input_ids"][0].tolist() == rows[0]["input_ids"]) == (rate == 0)


def test_few_rows_have_enough_steps_by_default():
    sizes = [(200, 16), (10, 16), (1066, 16), (1073, 16), (8800, 32)]
    assert [ner.enough_epochs(*size) for size in sizes] == [16, 200, 3, 3, 3]


def test_spans_that_are_looked_up_are_whole_words_and_have_the_commonest_label():
    rows = [{"text": f"{span} ", "spans": [[0, len(span), label]]} for span, label in (("C++", "L"), ("東京", "P"))]
    rows += [{"text": "May", "spans": [[0, 3, label]]} for label in ("P", "P", "T")]
    texts = ["in C++, or C++17", "我在東京住", "Maya met May."]
    found = ner.looked_up(rows, [{"text": text} for text in texts])
    assert found == [{(3, 6, "L"), (11, 14, "L")}, {(2, 4, "P")}, {(9, 12, "P")}]


@pytest.mark.parametrize(
    "spans",
    [
        "none",
        None,
        [[0, 1]],
        [{"start": 0, "end": 1, "label": "A"}],
        [["0", 1, "A"]],
        [[0, 9, "A"]],
        [[1, 1, "A"]],
        [[0, 1, " "]],
    ],
)
def test_spans_of_another_form_are_shown(spans, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "Al", "spans": []}) + "\n" + json.dumps({"text": "Al", "spans": spans}) + "\n")
    with pytest.raises(SystemExit, match=r"row 2 of .* spans?") as error:
        ner.read_rows(path)
    shown = json.dumps(spans[0] if isinstance(spans, list) else spans)
    assert f" {shown}, expected " in str(error.value) and "[start, end, " in str(error.value)
    path.write_text('{"text": "Al", "spans": [[0, 1, "A "], [1, 2, "A"]]}\n')
    assert ner.read_rows(path)[0]["spans"] == [[0, 1, "A"], [1, 2, "A"]]
    path.write_text('{"text": "Al", "spans": []}\n')
    with pytest.raises(SystemExit, match="has a span"):
        ner.read_rows(path)


def test_spans_that_overlap_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Al Bo", "spans": [[3, 5, "B"], [0, 4, "A"]]}\n')
    with pytest.raises(SystemExit) as error:
        ner.read_rows(path)
    assert str(error.value).endswith(
        "rows.jsonl has the spans [0, 4, 'A'] and [3, 5, 'B'], which overlap: a character has one label"
    )
    path.write_text('{"text": "Al Bo", "spans": [[3, 5, " O"]]}\n')
    with pytest.raises(SystemExit, match="has a span of the label 'O', which is that of bytes outside of spans"):
        ner.read_rows(path)


def test_names_to_test_on_are_not_among_those_to_train_on():
    train, test = ner.names_in_a_play(ROOT / "examples" / "data" / "shakespeare.txt")
    names = [{row["text"][start:end] for row in part for start, end, _ in row["spans"]} for part in (train, test)]
    assert "Romeo" in names[0] | names[1] and "King" not in names[0] | names[1]
    assert min(map(len, names)) > 10 and not names[0] & names[1]
    assert ner.f1(ner.looked_up(train, test), [{tuple(span) for span in row["spans"]} for row in test]) == 0


def test_spans_go_from_rows_to_a_pipeline(encoder_folder, tmp_path):
    lines = [
        (f"we met {name} in {place}", name) for name in ("Ann", "Bob", "Eve") for place in ("May", "town", "a bus")
    ]
    content = [
        {"text": text, "spans": [[7, 7 + len(name), "CAT" if name == "Eve" else "NAME"]]} for text, name in lines
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content * 4))
    numbers = {"epochs": 8, "adversarial_epsilon": 2, "word_noise": 0.1, "learning_rate": 2e-2, "batch_size": 4}
    options = [word for name, number in numbers.items() for word in (f"--{name}", number)]
    options += ["--output", tmp_path / "out"]
    printed = run("ner.py", "--checkpoint", encoder_folder, "--train", path, "--test", path, *options, cwd=tmp_path)
    assert "36 of the texts to test on are among those to train on" in printed
    assert (
        "exact F1 of spans: 1.000    looked up: 1.000\nof each label: CAT 1.000, NAME 1.000\n" in printed
        and 'aggregation_strategy="first"' in printed
    )
    card = check_card(tmp_path / "out", "token-classification", ("f1", 1.0))
    for sentence in (
        "F1 of spans whose start, end and label are right, as `SpanPipeline` reads them:\n\n| split | f1 |\n|---|---|\n| test | 1.0000 |\n"
        "| test, spans of the training rows looked up | 1.0000 |\n",
        "- head: 5 classes of a byte: `O`, `B-CAT`, `I-CAT`, `B-NAME`, `I-NAME`\n",
        "- train: rows.jsonl, 36 rows\n- test: rows.jsonl, 36 rows\n- runs: 1\n- epochs: 8\n- adversarial_epsilon: 2.0\n- word_noise: 0.1\n",
    ):
        assert sentence in card


def test_an_encoder_from_a_causal_checkpoint_and_a_teacher(encoder_folder, tmp_path):
    tiny_model().save_pretrained(tmp_path / "causal")
    TOKENIZER.save_pretrained(tmp_path / "causal")
    paragraphs = "\n\n".join(" ".join(random.Random(i).sample(ANIMALS + TOOLS, 12)) for i in range(40))
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": f"Title\n\n{paragraphs}"}) + "\n") * 200)
    options = ["--text", tmp_path / "text.jsonl", "--teacher", encoder_folder, "--checkpoint", tmp_path / "causal"]
    options += [
        "--output",
        tmp_path / "out",
        "--max_minutes",
        0.05,
        "--clock",
        "cpu",
        "--batch_size",
        16,
        "--max_bytes",
        80,
    ]
    printed = run("encoder.py", *options, cwd=tmp_path)
    assert "passages that were held out" in printed and "next: python examples/embed.py" in printed
    cosine = float(printed.split("held out:")[1].split()[0])
    assert cosine > 0.2
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert not loaded.config.is_causal
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode("a text").shape == (16,)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "results.json").unlink()  # as if it had been killed before
    again = run("encoder.py", *options, cwd=tmp_path)
    assert "embeddings of" in printed and "embeddings of" not in again
    assert "nothing is trained" in again and f"held out: {cosine:.3f}" in again
    assert "goes on from" not in printed and "next: " not in run("encoder.py", *options, cwd=tmp_path)
    others = {"passages": 1500, "seed": 2, "teacher": f"{encoder_folder}/", "adamw_lr": 1e-3}
    assert "begun.json was made with" in refused("encoder.py", *options, cwd=tmp_path, **others)
    options[options.index("--max_minutes") + 1] = 0.08
    longer = run("encoder.py", *options, cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != weights
    assert re.search(r"^0\.[01] of 0\.08 min: goes on from \S+/checkpoint-\d+$", longer, re.MULTILINE)


def test_embeddings_of_the_teacher_are_whole_or_not_there(encoder_folder, tmp_path, monkeypatch):
    encoder = importlib.import_module("encoder")
    paragraphs = "\n\n".join(" ".join(random.Random(i).sample(ANIMALS + TOOLS, 12)) for i in range(4000))
    (tmp_path / "text.txt").write_text(f"Title\n\n{paragraphs}")
    monkeypatch.setattr(encoder, "NUM_HELD_OUT", 10)
    args = argparse.Namespace(
        text=[str(tmp_path / "text.txt")],
        teacher=str(encoder_folder),
        output=tmp_path / "out",
        passages=30,
        max_bytes=80,
        bf16=False,
        seed=1,
    )

    def cut(file, array):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", cut)
        with pytest.raises(KeyboardInterrupt):
            encoder.embedded_passages(args)
    passages, embeddings = encoder.embedded_passages(args)
    assert len(passages) == len(embeddings) == 30
    assert [path.name for path in (tmp_path / "out" / "data").glob("teacher*")] == ["teacher.npy"]


def test_noise_of_the_encoder_is_that_of_its_generator(monkeypatch):
    encoder = importlib.import_module("encoder")
    text = "The quick brown fox jumps over the lazy dog. " * 3
    noisy = [encoder.noisy(text, random.Random(i)) for i in range(30)]
    assert noisy == [encoder.noisy(text, random.Random(i)) for i in range(30)]
    assert text.lower() in noisy and text.upper() in noisy and len(set(noisy)) > 15


def test_a_file_that_is_too_short_to_score_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    for text, words in (("The cat sat.", "12 bytes of text, expected at least a window of 1,024"), ("", "is no text")):
        (tmp_path / "short.txt").write_text(text)
        command = [sys.executable, ROOT / "examples" / "score.py", ".", "short.txt"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        last = result.stderr.splitlines()[-1]
        assert result.returncode == 1 and last.startswith("short.txt: ") and words in last and "Traceback" not in last


def test_log_probabilities_of_lines(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    lines = "The cat sat.\n\nZoë\n<eos>\n"
    command = [sys.executable, ROOT / "examples" / "score.py", "."]
    refused = subprocess.run(command, capture_output=True, input="Zo\xeb\n".encode("latin-1"), cwd=tmp_path)
    last = refused.stderr.decode().splitlines()[-1]
    assert refused.returncode == 1 and last.startswith("standard input is not UTF-8 (") and "convert it first" in last
    printed = run("score.py", tmp_path, cwd=tmp_path, input=lines).splitlines()
    rows = [re.fullmatch(r" *(-[\d.]+) +([\d.]+)  (.+)", line).groups() for line in printed if line.startswith(" ")]
    assert [text for _, _, text in rows] == ["The cat sat.", "Zoë", "<eos>"]
    for nats, bits, text in rows:
        ids = [257, *ids_of(text)]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(float(log_probs[t - 1, i]) for t, i in enumerate(ids) if t)
        assert float(nats) == pytest.approx(expected, abs=0.01)
        assert float(bits) == pytest.approx(-expected / math.log(2) / (len(ids) - 1), abs=0.001)


def test_the_table_of_jobs_keeps_cells_of_the_same_settings(encoder_folder, animals_and_tools, tmp_path):
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "test"):
        path = tmp_path / "data" / "sst2" / f"{split}.csv.gz"
        path.write_bytes(gzip.compress(Path(animals_and_tools[0]).read_bytes()))
    options = ["--data", "data", "--checkpoint", encoder_folder, "--teacher", encoder_folder, "--output", "jobs.json"]
    options += ["--jobs", "SST-2", "--systems", "tfidf", "--test_rows", 9]
    run("research/jobs.py", *options, "--seeds", 1, cwd=tmp_path)
    kept = json.loads((tmp_path / "jobs.json").read_text())
    assert list(kept["cells"]) == ["SST-2 | tfidf | 0"]
    others = {"epochs": 5, "test_rows": 8, "runs": 2, "checkpoint": tmp_path}
    told = refused("research/jobs.py", *options, "--seeds", 2, cwd=tmp_path, **others)
    assert "jobs.begun.json was made with" in told
    assert json.loads((tmp_path / "jobs.json").read_text()) == kept
    run("research/jobs.py", *options, "--seeds", 2, cwd=tmp_path)
    again = json.loads((tmp_path / "jobs.json").read_text())["cells"]
    assert len(again) == 2 and again["SST-2 | tfidf | 0"] == kept["cells"]["SST-2 | tfidf | 0"]
