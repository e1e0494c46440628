# SPDX-License-Identifier: Apache-2.0
"""The examples that measure the engine: completion while one types, what files cost, cases beside llama.cpp."""

import gzip
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from modeling_stlm.inference.engine import Engine
from modeling_stlm.inference.export import export_gguf

from .test_examples import ROOT, TEXT, run
from .tiny import tiny_model


sys.path[:0] = [str(ROOT / "examples" / "research"), str(ROOT / "examples")]
controls, file_types, keystrokes, llamacpp = (
    importlib.import_module(name) for name in ("controls", "file_types", "keystrokes", "llamacpp")
)
DOCUMENTS = ["The cat sat. The cat ran. The dog", "A dog. The catalogue, the cat's"]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "documents.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in [*DOCUMENTS, "Zoë saw 東京都 and сорок слов…"])
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model = tiny_model(hidden_size=32, ngram_embedding_size=32, trunk_hidden_size=32, trunk_intermediate_size=64)
    for kind in ("f32", "q8", "q4_0"):
        export_gguf(model, folder / f"{kind}.gguf", kind)
    return model, folder


def test_a_suggestion_is_taken_with_one_key_if_it_is_the_rest_of_the_word():
    shown = {"": "the", "the ": "dog", "the c": "at"}
    assert keystrokes.keys_of("the cat", lambda text: shown.get(text, "")) == 1 + 1 + 1 + 1
    assert keystrokes.keys_of("the cat", lambda text: "") == 7
    # Wrong, too long, too short, or of one character, which saves nothing.
    for wrong in ("th", "them", "t", "The"):
        assert keystrokes.keys_of("the", lambda text, wrong=wrong: wrong if not text else "") == 3


def test_the_word_that_is_begun_and_the_one_before():
    assert keystrokes.begun("one two") == ("one", "two")
    assert keystrokes.begun("one two ") == ("two", "")
    assert keystrokes.begun("one, two: t") == ("two", "t")
    assert keystrokes.begun("") == ("", "") and keystrokes.begun("a") == ("", "a")
    assert keystrokes.first_word("at once", is_whole=False) == "at"
    assert keystrokes.first_word("at", is_whole=False) == "" and keystrokes.first_word("at", is_whole=True) == "at"
    assert keystrokes.first_word(" at", is_whole=True) == ""


def test_suggestions_from_counts_of_words():
    words = keystrokes.Words(DOCUMENTS)
    assert words.suggest("A c") == "at"  # three times
    assert words.suggest("A catal") == "ogue" and words.suggest("A x") == ""
    assert words.suggest("") == "The"  # four times
    assert words.suggest_after_word("The c") == "at" and words.suggest_after_word("A ") == "dog"
    assert words.suggest_after_word("A c") == "at"  # none followed "A": the commonest of all
    assert words.suggest_after_word("") == "The"  # as the first word of a document, though not the commonest of them


def test_keys_are_counted_for_words_and_models(documents, files, tmp_path):
    options = ["--text", documents, "--words", documents, "--characters", 20]
    printed = run("research/keystrokes.py", files[1] / "q8.gguf", *options, cwd=tmp_path).splitlines()[-1]
    found = json.loads(printed)
    assert found["documents"] == 3 and found["characters"] == 60
    results = found["results"]
    # Knowing the text, words after words save more; a model of random weights saves next to nothing.
    assert 0.3 < results["commonest word"]["saved"] < results["after the last"]["saved"] < 0.8
    assert 0 <= results["q8"]["saved"] < 0.2
    assert 0 < results["q8"]["key"]["median"] < 1e5 and results["q8"]["suggestion"]["p99"] < 1e6


def test_what_is_read_for_a_byte_are_all_weights_but_the_tables(files):
    model, folder = files
    config = model.config
    found = file_types.traffic(folder / "f32.gguf")
    tables = [weight for name, weight in model.named_parameters() if "ngram_tables" in name or "match_emb" in name]
    # The rows of the tables: one for each order of n-grams and the word; what followed a match, and its length.
    rows = config.ngram_embedding_size * (len(config.ngram_orders) + 1) + 2 * config.hidden_size
    weights = model.num_parameters() - sum(weight.numel() for weight in tables) + rows
    periods = sum(4 * n // 2 for n in (config.head_dim, config.trunk_head_dim))  # of rotary embeddings
    assert found["byte"] + found["patch"] == 4 * weights + periods
    padded = -(-config.trunk_head_dim // 16) * 16
    per_pass = config.trunk_num_key_value_heads * (config.trunk_head_dim + padded)
    assert found["patch before"] == 4 * per_pass * config.num_trunk_layers
    smaller = file_types.traffic(folder / "q8.gguf")
    assert smaller["patch before"] * 2 == found["patch before"]
    assert found["patch"] / 4 < smaller["patch"] < found["patch"] / 2


def test_costs_of_files_are_measured(documents, files, tmp_path):
    paths = [files[1] / f"{kind}.gguf" for kind in ("f32", "q4_0")]
    options = ["--validation", documents, "--repeats", 1]
    printed = run("research/file_types.py", *paths, *options, cwd=tmp_path).splitlines()[-1]
    results = json.loads(printed)["results"]
    engine, texts = Engine(paths[0]), [text.encode() for text in keystrokes.documents_of([documents])]
    nats = -sum(np.float64(engine.score(text)).sum() for text in texts)
    assert results["f32"]["bits per byte"] == pytest.approx(nats / np.log(2) / sum(map(len, texts)))
    for found in results.values():
        assert 5 < found["ms"] < 60_000 and 0 < found["memory MB"] < 5
        assert 0 < found["written"] < found["floor"]
    assert results["q4_0"]["bytes read per byte"] < results["f32"]["bytes read per byte"] / 2


def test_a_row_of_8_kb_takes_less_than_4_mb_beside_the_weights(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "checkpoints" / "stlm-10m")
    export_gguf(model, tmp_path / "model.gguf", "q8")
    assert 1.5 < file_types.memory_mb(tmp_path / "model.gguf", TEXT) < 4


def test_cases_beside_llama_cpp_are_the_same_text_in_bytes_and_tokens(files):
    text = TEXT.read_bytes()
    tokenizer = controls.train_bpe([text[:20_000]], 400)
    texts = llamacpp.cut(text, 3, 96)
    assert texts == [text[:96], text[len(text) // 3 :][:96], text[len(text) // 3 * 2 :][:96]]
    case = llamacpp.Case.of(texts, 32, tokenizer)
    assert [tokenizer.decode(prompt).encode() for prompt in case.prompts] == [row[:64] for row in texts]
    assert 3 * case.num_new_tokens < case.num_new_token_bytes <= 3 * 32
    path = str(files[1] / "q8.gguf")
    (speeds,) = llamacpp.child("STLM, engine, q8", path, {"": case}, "").values()
    assert speeds["generated"] > 0 and speeds["prompt"] > 0


def test_a_plot_needs_a_sweep(tmp_path):
    command = [sys.executable, ROOT / "examples" / "research" / "llamacpp.py", "--plot", "plot.png"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "--plot draws what --sweep measures" in result.stderr
