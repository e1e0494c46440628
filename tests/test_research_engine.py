# SPDX-License-Identifier: Apache-2.0
"""The examples that measure the engine: completion while one types, what files cost, cases beside llama.cpp."""

import gzip
import importlib
import json
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_stlm.inference.engine import Engine
from modeling_stlm.inference.export import export_gguf

from .test_examples import ROOT, TEXT, run
from .tiny import tiny_model


sys.path[:0] = [str(ROOT / "examples" / "research"), str(ROOT / "examples")]
controls, file_types, healing, keystrokes, llamacpp = (
    importlib.import_module(name) for name in ("controls", "file_types", "healing", "keystrokes", "llamacpp")
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Folder of a tiny Llama over a BPE, its model and its tokenizer; large weights, so that what it writes is not all the same."""
    torch.manual_seed(0)
    config, tokenizer = controls.bpe_llama(330_000, 400, [TEXT.read_text()[:20_000]])
    model, folder = AutoModelForCausalLM.from_config(config).eval(), tmp_path_factory.mktemp("llama") / "bpe"
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return folder, model, tokenizer


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


def test_a_llama_reads_only_what_differs(llama):
    _, model, tokenizer = llama
    reader, ids = healing.TorchReader(model), tokenizer(TEXT.read_text()[:300])["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    num_read = []
    read, reader._read = reader._read, lambda ids, kept: num_read.append(len(ids)) or read(ids, kept)
    for end in (50, 51, 51, 50, 40, 60, 51):
        np.testing.assert_allclose(reader.logits(ids[:end]), expected[end - 1], rtol=1e-4, atol=1e-4)
    # 50 are known still when 51 were read; 40 were, but not their logits; then 11 from 41 on.
    assert num_read == [50, 1, 1, 20, 1]
    other = [*ids[:30], *ids[60:70]]
    with torch.no_grad():
        expected = model(torch.tensor([other])).logits[0, -1].numpy()
    np.testing.assert_allclose(reader.logits(other), expected, rtol=1e-4, atol=1e-4)
    assert num_read[-1] == 10


def test_tokens_of_what_is_typed_are_those_of_the_tokenizer(llama):
    _, model, tokenizer = llama
    healed, text = healing.Healed(healing.TorchReader(model), tokenizer), TEXT.read_text()[:400]
    for typed in (*(text[:end] for end in range(len(text))), "Zoë  saw\n 東京都 and don't _x _ y\t z "):
        before, last = healed.tokens(typed)
        assert before + last == tokenizer(typed)["input_ids"]
        assert healed.pieces_joined(before + last) == typed.encode()
        assert not healed.pieces_joined(before).endswith(b" ")


def test_without_healing_a_llama_writes_what_generate_does(llama):
    _, model, tokenizer = llama
    healed, text = healing.Healed(healing.TorchReader(model), tokenizer, give_back=0), TEXT.read_text()
    for end in (40, 41, 60, 25):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text[:end])["input_ids"]]])
        new = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
        assert healed.complete(text[:end], 12) == healed.pieces_joined(new)[:12]
        assert healed.complete(text[:end], 12) == healed.generate(text[:end], 12)
    assert healed.complete("", 3) and healed.complete("", 0) == b""


@pytest.mark.parametrize("give_back", [1, None])
def test_a_cut_token_is_completed_as_if_it_were_not_cut(llama, give_back):
    """Where the likeliest token begins a word, its completion is the same after its first bytes were typed."""
    _, model, tokenizer = llama
    reader, text, num_cut = healing.TorchReader(model), TEXT.read_text(), 0
    plain, healed = (healing.Healed(reader, tokenizer, back) for back in (0, give_back))
    for end in range(20, 400):
        expected = plain.complete(text[:end], 20)
        ids = [tokenizer.bos_token_id, *tokenizer(text[:end])["input_ids"]]
        piece = plain.pieces[int(reader.logits(ids).argmax())]
        if not text[end - 1].isalpha() or len(piece) < 3 or not piece.startswith(b" ") or not piece.isascii():
            continue
        for length in range(1, len(piece)):
            typed = text[:end] + piece[:length].decode()
            last = healed.tokens(typed)[1]
            # A space is no word yet, and the one before it may be of other tokens than the likeliest.
            if length > 1 if give_back is None else healed.pieces[last[-1]] == piece[:length]:
                assert healed.complete(typed, 20 - length) == expected[length:]
                num_cut += 1
    assert num_cut > 20


def test_healed_tokens_agree_with_what_was_typed(llama):
    _, model, tokenizer = llama
    healed = healing.Healed(healing.TorchReader(model), tokenizer, give_back=None)
    for left in (b" ", b" th", b" the king", b"q", "東".encode()):
        agree = [i for i, p in enumerate(healed.pieces) if p and (p.startswith(left) or left.startswith(p))]
        assert sorted(healed.allowed(left)) == agree
    # Every token that is written is the likeliest of those, until they have made up for what was typed.
    text, left = TEXT.read_text()[:58], b" Citizen:"
    text = text[: text.rindex(" Citizen:")] + left.decode()
    before, last = healed.tokens(text)
    assert healed.pieces_joined(last) == left and len(last) > 1
    ids, written = [tokenizer.bos_token_id, *before], b""
    while len(written) < len(left) + 5:
        rest = left[len(written) :]
        with torch.no_grad():
            order = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
        pieces = ((i, healed.pieces[i]) for i in order)
        token, piece = next((i, p) for i, p in pieces if p and (p.startswith(rest) or rest.startswith(p)))
        ids, written = [*ids, token], written + piece
    assert written.startswith(left) and healed.complete(text, 5) == written[len(left) :][:5]


def test_a_llama_is_measured_beside_the_engine(documents, files, llama, tmp_path):
    options = ["--text", documents, "--llama", llama[0], "--characters", 20]
    results = json.loads(run("research/keystrokes.py", files[1] / "q8.gguf", *options, cwd=tmp_path).splitlines()[-1])[
        "results"
    ]
    assert list(results) == ["q8", *(f"bpe, {name}" for name in keystrokes.GIVEN_BACK)]
    for found in results.values():
        assert len(found["keys"]) == 3 and found["saved"] == 1 - sum(found["keys"]) / 60
        assert found["suggestion"]["median"] > 0


def test_the_file_for_llama_cpp_has_the_weights_of_the_model(llama, tmp_path):
    _, model, tokenizer = llama
    llamacpp.write_gguf(tmp_path / "model.gguf", "f32", model, tokenizer)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    config, weights = model.config, {name: weight.numpy() for name, weight in model.state_dict().items()}
    width, size, dim = config.hidden_size, config.intermediate_size, config.head_dim
    assert (found["token_embd.weight"] == weights["model.embed_tokens.weight"]).all()
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        # Features i and i + d / 2 of a head, which are turned together, are neighbours there.
        ours, theirs = weights[f"{layer}.self_attn.k_proj.weight"], found[f"blk.{i}.attn_k.weight"]
        for head in range(config.num_attention_heads):
            halves = ours[head * dim : (head + 1) * dim].reshape(2, dim // 2, width)
            assert (theirs[head * dim : (head + 1) * dim : 2] == halves[0]).all()
            assert (theirs[head * dim + 1 : (head + 1) * dim : 2] == halves[1]).all()
        assert (found[f"blk.{i}.attn_v.weight"] == weights[f"{layer}.self_attn.v_proj.weight"]).all()
        down = found[f"blk.{i}.ffn_down.weight"]
        assert down.shape[1] % 32 == 0 and (down[:, size:] == 0).all()
        assert (down[:, :size] == weights[f"{layer}.mlp.down_proj.weight"]).all()
        assert (found[f"blk.{i}.ffn_up.weight"][:size] == weights[f"{layer}.mlp.up_proj.weight"]).all()
    llamacpp.write_gguf(tmp_path / "small.gguf", "q8_0", model, tokenizer)
    assert (tmp_path / "small.gguf").stat().st_size < (tmp_path / "model.gguf").stat().st_size / 2


def test_what_is_read_for_a_byte_are_all_weights_but_the_tables(files):
    model, folder = files
    config = model.config
    found = file_types.traffic(folder / "f32.gguf")
    names = ("ngram_tables", "match_embedding", "context_ngram_embedding")
    tables = [weight for name, weight in model.named_parameters() if any(part in name for part in names)]
    # The rows of the tables: one for each order of n-grams and the word; what followed a match, and its length; what
    # followed each place of an in-context n-gram.
    wide = 2 + len(config.context_ngram_orders) * config.context_ngram_places
    rows = config.ngram_embedding_size * (len(config.ngram_orders) + 1) + wide * config.hidden_size
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
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "checkpoints" / "stlm-10m-wide")
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
