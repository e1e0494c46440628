# SPDX-License-Identifier: Apache-2.0
"""Language identification as a user would run it, on a few lines written here."""

import copy
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from .test_examples import ROOT, refused, run
from .tiny import RTOL


sys.path[:0] = [str(ROOT / "examples" / "research"), str(ROOT / "examples")]
identify, peers, identify_peers, identify_data = (
    importlib.import_module(name) for name in ("identify", "peers", "identify_peers", "identify_data")
)

SENTENCES = {
    "deu": "Der Hund schläft im Garten.|Ich möchte heute nach Hause gehen.|Wir haben das Fenster geöffnet.",
    "eng": "The dog sleeps in the garden.|I would like to go home today.|We have opened the window.",
    "ell": "Ο σκύλος κοιμάται στον κήπο.|Θέλω να πάω σπίτι σήμερα.|Ανοίξαμε το παράθυρο.",  # noqa: RUF001
}
TEXTS = ["Der Hund", "🐕", "We have opened the window. " * 90, "Θέλω", " \t", ""]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "lines.jsonl"
    rows = [{"text": text, "lang": lang} for lang, texts in SENTENCES.items() for text in texts.split("|")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_on(data: Path, output: Path, minutes: float) -> list[str]:
    options = ["--max_minutes", minutes, "--batch_size", 16]
    return ["identify.py", "--train", data, "--validation", data, "--output", output, *options]


@pytest.fixture(scope="module")
def trained(data) -> tuple[Path, str]:
    output = data.parent / "run"
    return output, run(*train_on(data, output, 0.1), cwd=data.parent)


@pytest.fixture(scope="module")
def model(trained):
    return identify.load(str(trained[0]))


def test_training_learns_and_says_how_well(trained, model):
    output, printed = trained
    assert "3 languages, 9 sentences" in printed
    for what in ("whole lines", "first 20 characters"):
        assert float(printed.split(f"{what}: ")[1].split()[0]) > 0.8
    assert model.config.id2label == {0: "deu", 1: "ell", 2: "eng"} and not model.score.bias.any()
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] > 0 and results["arguments"]["train"] == "lines.jsonl"


def test_what_was_trained_can_be_published(trained):
    output, _ = trained
    publish = ["push_to_hub.py", "--checkpoint", output, "--repo_id", "me/langid", "--dry_run"]
    card = run(*publish, cwd=output.parent)
    results = json.loads((output / "results.json").read_text())
    assert f"## Training\n\n- from random weights\n- {results['steps']:,} steps\n- train: lines.jsonl\n" in card
    score = results["scores"]["validation, whole lines"]["accuracy"]
    assert f"identified:\n\n| split | accuracy |\n|---|---|\n| validation, whole lines | {score:.4f} |" in card
    assert "None" not in card and str(output.parent) not in card.split("not published: ")[0]


def test_labels_of_spans_are_no_languages(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "ner", ignore=shutil.ignore_patterns("checkpoint-*"))
    path = tmp_path / "ner" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"id2label": {"0": "O", "1": "B-NAME", "2": "I-NAME"}, "label2id": {}}))
    with pytest.raises(SystemExit, match=r"ner has labels of spans \(B-NAME\) and knows no languages"):
        identify.load(str(tmp_path / "ner"))


def test_the_same_command_goes_on_and_says_so(trained, data, tmp_path):
    output, printed = trained
    shutil.copytree(output, tmp_path / "run")
    weights = (output / "model.safetensors").read_bytes()
    assert "nothing is trained" in run(*train_on(data, tmp_path / "run", 0.1), cwd=tmp_path)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    again = run(*train_on(data, tmp_path / "run", 0.12), cwd=tmp_path)
    assert re.search(rf"^0\.1 of 0\.12 min: goes on from {tmp_path}/run/checkpoint-\d+$", again, re.MULTILINE)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != weights and "goes on from" not in printed


def test_a_training_goes_on_with_the_settings_it_began_with(trained, data, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    rows = [{"text": text, "lang": lang} for lang in ("fra", "spa") for text in ("un deux", "uno dos")]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = {"muon_lr": 0.01, "adamw_lr": 0.01, "seed": 2, "batch_size": 8, "train": tmp_path / "other.jsonl"}
    command = [*train_on(data, tmp_path / "run", 0.2), "--validation", tmp_path / "other.jsonl"]
    assert "begun.json was made with" in refused(*command, cwd=tmp_path, **others)
    begun = json.loads((tmp_path / "run" / "begun.json").read_text())
    assert begun["train"] == f"lines.jsonl ({data.stat().st_size} bytes)" and begun["bf16"] in ("True", "False")


def test_accuracy_is_computed_a_chunk_at_a_time(trained, model, data, monkeypatch):
    sentences, sizes, byte_logits = identify.read_sentences([data]), [], identify.byte_logits
    whole = identify.accuracy(model, sentences)
    assert whole == sum(
        sum(found == language for found, _ in identify.identify(model, texts)) / len(texts)
        for language, texts in sentences.items()
    ) / len(sentences)
    monkeypatch.setattr(
        identify, "byte_logits", lambda model, texts: sizes.append(len(texts)) or byte_logits(model, texts)
    )
    monkeypatch.setattr(identify, "CHUNK_LINES", 4)
    assert identify.accuracy(model, sentences) == whole and sizes == [4, 4, 1]
    assert identify_peers.Ours(str(trained[0])).logits(TEXTS).shape == (len(TEXTS), 3) and sizes[3:] == [4, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where the Trainer leaves the model")
def test_a_model_on_a_gpu_identifies(model):
    expected = identify.identify(model, TEXTS)
    found = identify.identify(copy.deepcopy(model).to("cuda"), TEXTS)
    assert [language for language, _ in found] == [language for language, _ in expected]


def test_lines_of_standard_input_are_identified(trained):
    printed = run("identify.py", "--checkpoint", trained[0], cwd=trained[0], input="The garden\n\nκήπο\n")  # noqa: RUF001
    assert [line.split("\t")[0] for line in printed.splitlines()] == ["eng", "und", "ell"]


def test_spans_make_up_the_line(model):
    line = "Wir haben das Fenster geöffnet.  I would like to go home today."
    (pieces,) = identify.spans(model, [line])
    assert "".join(piece for _, piece in pieces) == line
    assert [language for language, _ in pieces] == ["deu", "eng"] and "geöffnet" in pieces[0][1]
    assert identify.spans(model, ["", "  "]) == [[], []]


def test_the_best_path_is_that_of_all_paths():
    scores = 6 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

    def gain(path):
        changes = sum(a != b for a, b in itertools.pairwise(path))
        return sum(row[label] for row, label in zip(scores, path)) - changes * identify.SWITCH_NATS

    best = max(itertools.product(range(3), repeat=5), key=gain)
    assert identify.best_path(list(scores)) == list(best) and len(set(best)) > 1


def test_a_text_in_a_batch_has_the_logits_of_the_text_alone(model):
    found = identify.byte_logits(model, TEXTS)
    for text, logits in zip(TEXTS, found):
        assert logits.shape == (len(text.encode()), 3)
        if text:
            (alone,) = identify.byte_logits(model, [text])
            torch.testing.assert_close(logits, alone, rtol=0, atol=RTOL * alone.abs().max().item())


def test_an_empty_line_has_no_language(model):
    assert [language for language, _ in identify.identify(model, TEXTS)][-2:] == ["und", "und"]
    assert identify.identify(model, []) == []
    assert identify.identify(model, ["123 + 4", "\U0001f642"]) == [("und", 0.0)] * 2
    assert identify.spans(model, ["123 + 4", "\U0001f642", " "]) == [[], [], []]


def test_pipelines_load_the_same_checkpoint(trained, model):
    text = "I would go home"
    ((language, probability),) = identify.identify(model, [text])
    (whole,) = pipeline("text-classification", str(trained[0]))(text)
    assert whole["label"] == language and whole["score"] == pytest.approx(probability, abs=1e-5)
    tags = pipeline("token-classification", str(trained[0]))(text)
    assert [tag["entity"] for tag in tags].count("eng") > len(text) / 2


def test_lines_are_a_function_of_their_index(data):
    sentences = identify.read_sentences([data])
    labels = {"deu": 0, "ell": 1, "eng": 2}
    lines, again = (identify.Lines(sentences, labels, batch_size=4, seed=1) for _ in range(2))
    items = [lines[i] for i in range(200)]
    assert items[150] == again[150]
    mixed = 0
    for item in items:
        bytes(item["input_ids"]).decode()  # whole characters
        assert 0 < len(item["input_ids"]) == len(item["labels"]) <= identify.LINE_BYTES[1]
        mixed += len(set(item["labels"])) > 1
    assert 10 < mixed < 100
    assert any(identify.disturbed("abc", identify.random.Random(seed)).isupper() for seed in range(99))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "none.jsonl"], "none.jsonl is no such file"),
        (["--checkpoint", "none", "Hi"], "none is no such folder"),
        (["--train", "lines.jsonl", "--max_minutes", "0"], "argument --max_minutes: 0 must be above 0"),
        (["--train", "fields.jsonl"], r'fields.jsonl, row 2: expected strings .*, got \{"text": "a"\}'),
        (["--train", "one.jsonl"], r"--train has the languages \['fra'\], expected at least two"),
        (["--train", "lines.jsonl", "--validation", "one.jsonl"], r"has languages that --train lacks: \['fra'\]"),
    ],
)
def test_what_cannot_be_read_is_said_at_once(data, options, message):
    row = '{"text": "a", "lang": "fra"}\n'
    (data.parent / "one.jsonl").write_text(row)
    (data.parent / "fields.jsonl").write_text(row + '{"text": "a"}\n')
    command = [sys.executable, "-X", "importtime", str(ROOT / "examples" / "identify.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=data.parent)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr) and "| torch" not in result.stderr


@pytest.mark.parametrize("name", ["stlm-3m", "stlm-3m-encoder"])
def test_a_model_without_languages_gives_none(name):
    folder = ROOT / "examples" / "checkpoints" / name
    with pytest.raises(SystemExit, match=rf"{name} is a STLMFor\w+LM and knows no languages: expected what"):
        identify.load(folder)


def test_the_shipped_checkpoint_is_small_and_reads_twenty_characters():
    folder = ROOT / "examples" / "checkpoints" / "stlm-langid"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3e6 and not list(folder.glob("*.py"))
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.num_labels == 113
    assert AutoTokenizer.from_pretrained(folder)("Zoë")["input_ids"] == [90, 111, 195, 171]
    texts = {
        "deu": "Ich habe keine Zeit.",
        "fra": "Je ne sais pas quoi ",
        "tur": "Neden gelmek istemiy",
        "jpn": "これは何ですか",
    }
    assert [language for language, _ in identify.identify(model.eval(), list(texts.values()))] == list(texts)
    (pieces,) = identify.spans(model, ["I have no time for this today. Je ne sais pas quoi faire."])
    assert [language for language, _ in pieces] == ["eng", "fra"]


def test_a_peer_is_measured_on_the_languages_that_both_know():
    peer = peers.Peer("none", ROOT, ["de", "zh", "sh", "xx"], identify=None)
    ours = ["deu", "cmn", "yue", "eng", "hrv"]
    assert peer.codes(ours) == {"de": "deu", "zh": "cmn"}
    classes = peer.classes(ours)
    assert classes == {"deu": "deu", "cmn": "cmn", "yue": "cmn"}  # it has one code for all of Chinese
    expected = ["deu", "deu", "yue", "eng"]  # nobody asks for English
    assert identify_peers.macro_accuracy(["deu", "eng", "cmn", "cmn"], expected, classes) == ((0.5 + 1) / 2, 2, 3)
    assert identify_peers.macro_accuracy(["bos hrv srp"], ["hrv"], {"hrv": "hrv"}) == (1, 1, 1)


def test_answers_of_another_version_are_others():
    kept = identify_peers.kept_as(peers.Peer("pytest", ROOT, [], identify=None), "udhr", "whole", is_shared=True)
    assert kept == f"pytest {pytest.__version__} udhr whole shared.json"


def test_the_card_names_the_device_that_trained(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text()) | {"device": "a CPU elsewhere"}
    path.write_text(json.dumps(results))
    run("research/identify_export.py", "--run", "run", "--output", "out", cwd=tmp_path)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{results['cpu_minutes']:.1f} minutes of one CPU core (a CPU elsewhere): sentences cut" in card
    assert f"; NorMuon {results['arguments']['muon_lr']} on matrices" in card
    exported = json.loads((tmp_path / "out" / "results.json").read_text())
    assert exported["device"] == "a CPU elsewhere" != exported["exported"]["device"]


def test_spans_of_peers_make_up_the_line():
    assert peers.covering("ab cd ef", [(1, "x"), (3, "y")]) == [("x", "ab "), ("y", "cd ef")]
    assert peers.covering("ab", []) == [("", "ab")]
    line = [("deu", "\u00e4b"), ("eng", "cd")]
    found = [[("deu", "\u00e4"), ("eng", "b cd")]]
    assert identify_peers.byte_accuracy(found, [line], {}) == 4 / 6


def test_documents_become_sentences():
    document = "# Heading here\n\nOne short sentence. [Another](https://x.y) one `here`! 1 2 3 4 5 6 7 8 9\nToo short"
    assert identify_data.sentences(document) == ["Heading here", "One short sentence.", "Another one here!"]
    assert identify_data.spread(list(range(10)), 3) == [0, 3, 6]
    rows = [("\u0430\u0431\u0432 a", "rus"), ("abc", "deu")]
    latin = identify_data.latin_share([*rows, *rows[:1] * 9, ("\u0430" * 90, "rus")])
    assert identify_data.is_foreign("see README", "rus", latin) and not identify_data.is_foreign("abc", "deu", latin)


def test_the_loss_is_that_of_bytes_and_of_lines_in_one_language():
    logits = torch.randn(3, 4, 5)
    labels = torch.tensor([[2, 2, 2, 2], [-100, -100, 4, 4], [1, 1, 3, -100]])
    loss = identify.loss_of_bytes_and_lines(SimpleNamespace(logits=logits), labels)
    scores = logits.log_softmax(-1)
    of_bytes = [-scores[i, j, labels[i, j]] for i in range(3) for j in range(4) if labels[i, j] >= 0]
    lines = [logits[0].mean(0).log_softmax(-1)[2], logits[1, 2:].mean(0).log_softmax(-1)[4]]
    torch.testing.assert_close(loss, sum(of_bytes) / 9 - sum(lines) / 2)
    empty = torch.cat([labels, labels.new_full((1, 4), -100)])
    padded = torch.cat([logits, torch.randn(1, 4, 5)]).requires_grad_()
    with_empty = identify.loss_of_bytes_and_lines(SimpleNamespace(logits=padded), empty)
    with_empty.backward()
    torch.testing.assert_close(with_empty.detach(), loss)
    assert padded.grad.isfinite().all() and not padded.grad[3].any()
    mixed = identify.loss_of_bytes_and_lines(SimpleNamespace(logits=logits[2:]), labels[2:])
    torch.testing.assert_close(mixed, -sum(scores[2, j, labels[2, j]] for j in range(3)) / 3)


def test_a_file_is_not_taken_for_a_text(tmp_path):
    (tmp_path / "lines.txt").write_text("Guten Tag\n")
    command = [sys.executable, str(ROOT / "examples" / "identify.py"), "lines.txt"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == "" and "identify.py < lines.txt" in result.stderr
