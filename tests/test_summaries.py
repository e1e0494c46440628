# SPDX-License-Identifier: Apache-2.0
"""Summaries and self-play on them, as a user would run them, with a tiny model."""

import gzip
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from modeling_stlm.training.model_card import build_model_card
from modeling_stlm.training.rouge import rouge

from .hub_server import metadata_errors
from .test_examples import ROOT, refused, run
from .tiny import tiny_model
from .trainers import TOKENIZER


sys.path.insert(0, str(ROOT / "examples"))
inputs, rows, summarize = (importlib.import_module(name) for name in ("inputs", "rows", "summarize"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(use_cache=True).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: cc-by-sa-4.0\nlanguage: en\n---\n\n# tiny\n")
    return folder


def check_card(folder: Path, base: Path, bits: float) -> None:
    """That of what was fine-tuned from `base`."""
    card = build_model_card(folder)
    assert (card.data.license, card.data.language) == ("cc-by-sa-4.0", "en")
    assert f"- fine-tuned from `{base.name}`" in card.text and "- train: dialogues.jsonl" in card.text
    assert {e.metric_type for e in card.data.eval_results} == {"rouge1", "rouge2", "rougeL", "bits_per_byte"}
    assert f"{bits:.4f}" in card.text and str(base.parent) not in str(card) and metadata_errors(str(card)) == []


def test_rows_of_both_sets_are_read(tmp_path):
    read = [
        {"dialogue": "A: Zoë?\nB: yes", "summary1": "first", "summary2": "second", "topic1": "x"},
        {
            "meeting_transcripts": [{"speaker": "A", "content": "Hi."}, {"speaker": "B", "content": "Bye."}],
            "general_query_list": [{"query": "Summarize the meeting", "answer": " They met. "}],
        },
    ]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in read)
    first, second = rows.read_summaries(tmp_path / "rows.jsonl.gz", None, 6)
    assert first["text"] == "A: Zo" and first["references"] == ["first", "second"]  # cut before the ë
    assert first["prompt"] == "<bos>A: Zo\n\nSummary:" and first["completion"] == " first"
    assert second["text"] == "A: Hi." and second["completion"] == " They met."
    assert len(rows.read_summaries(tmp_path / "rows.jsonl.gz", 1, 6)) == 1
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SystemExit, match="has 0 rows, expected at least 1"):
        rows.read_summaries(tmp_path / "empty.jsonl", None, 6)
    with pytest.raises(SystemExit, match=r"fields \['dialogue', 'text'\], expected"):
        rows.summary_example({"dialogue": "a", "text": "b"}, 6)
    for kind, row in (
        ("NoneType", {"dialogue": "a", "summary": None}),
        ("NoneType", {"dialogue": None, "summary": "b"}),
        ("list", {"dialogue": ["a"], "summary": "b"}),
    ):
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (read[0], row)))
        message = f"row 2 of .*bad.jsonl has a {kind} where a dialogue or a summary should be, expected a text"
        with pytest.raises(SystemExit, match=message):
            rows.read_summaries(tmp_path / "bad.jsonl", None, 6)


def test_only_the_summary_and_its_end_are_targets():
    (item,) = summarize.tokenize([{"prompt": "<bos>ab", "completion": " c"}], TOKENIZER)
    assert item == {"input_ids": [257, 97, 98, 32, 99, 258], "labels": [-100, -100, -100, 32, 99, 258]}


def test_baselines_say_what_needs_no_model():
    texts = ["the cat sat", "a cat sat down", "dogs run"]
    train = [{"completion": f" {text}", "text": "one two three four five"} for text in texts]
    best = max(texts, key=lambda text: sum(rouge(text, other)["rougeL"] for other in texts))
    assert summarize.constant_summary(train) == best == "the cat sat"
    assert summarize.first_words(train, train[:1]) == ["one two three"]  # 9 words in 3 summaries


def test_summaries_are_learned_in_full_and_with_lora(tmp_path, checkpoint):
    options = ["--max_steps", 2, "--summary_bytes", 20, "--lora_rank", 2, "--test_rows", 3]
    out = run("summarize.py", "--checkpoint", checkpoint, "--output", tmp_path / "run", *options, cwd=tmp_path)
    assert "12 rows to train on, 3 to test on" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["scores"]) == ["constant", "first words", "zero-shot", "lora", "full"]
    bits = [results["scores"][kind]["bits_per_byte"] for kind in ("zero-shot", "lora", "full")]
    assert bits[2] < bits[0] and bits[1] != bits[0]
    assert all(0 <= scores["rougeL"] <= scores["rouge1"] <= 1 for scores in results["scores"].values())
    assert all(len(texts) == 3 for texts in results["summaries"].values())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "full").config.use_cache
    check_card(tmp_path / "run" / "full", checkpoint, bits[2])
    with safe_open(tmp_path / "run" / "lora" / "adapter_model.safetensors", "pt") as adapter:
        assert len(adapter.keys()) > 0


def test_self_play_goes_on_by_rounds(tmp_path, checkpoint):
    options = ["--checkpoint", checkpoint, "--output", tmp_path / "run", "--max_steps", 1, "--summary_bytes", 12]
    options += ["--test_rows", 2, "--learning_rate", 1e-2]
    once = run("self_play.py", *options, "--num_rounds", 1, cwd=tmp_path).splitlines()
    twice = run("self_play.py", *options, "--num_rounds", 2, cwd=tmp_path).splitlines()
    assert f"{tmp_path / 'run'}: goes on after round 1 of 2" in twice and "goes on" not in "".join(once)
    first, second = json.loads(once[-1]), json.loads(twice[-1])
    assert second[:2] == first and [scores["round"] for scores in second] == [0, 1, 2]
    assert len({scores["bits_per_byte"] for scores in second}) == 3
    assert sum(line.startswith("| round") for line in twice) == 3
    for scores in second:
        check_card(tmp_path / "run" / f"round-{scores['round']}", checkpoint, scores["bits_per_byte"])
    shutil.copytree(checkpoint, tmp_path / "other")
    results = (tmp_path / "run" / "round-1" / "results.json").read_bytes()
    others = {"checkpoint": tmp_path / "other", "beta": 0.2, "summary_bytes": 9}
    assert "begun.json was made with" in refused("self_play.py", *options, cwd=tmp_path, **others)
    assert (tmp_path / "run" / "round-1" / "results.json").read_bytes() == results


def test_self_play_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["self_play.py"])
    assert importlib.import_module("self_play").parse_arguments().output == Path("runs/self-play")
    assert inputs.summary_parser("").parse_args([]).output == Path("runs/summaries")
