# SPDX-License-Identifier: Apache-2.0
"""The examples behind the numbers: noise, budgets, ablations, the report."""

import gzip
import importlib
import json
import math
import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modeling_stlm
from modeling_stlm import STLMTokenizer

from .test_examples import ROOT, STLM_3M, TEXT, check_a_run, pretrain, refused, run
from .test_examples import small_text as small_text  # a fixture
from .tiny import tiny_model


RESEARCH = ROOT / "examples" / "research"
sys.path[:0] = [str(RESEARCH), str(ROOT / "examples")]
EXAMPLES = ("ablate", "alterations", "controls", "costs", "curves", "noise", "report", "score")
ablate, alterations, controls, costs, curves, noise, report, score = (
    importlib.import_module(name) for name in EXAMPLES
)


def train(small_text: Path, output: Path, *more) -> dict:
    return pretrain(small_text, output, *more, script="research/train.py")


def json_lines(path: Path, rows: list[dict]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def small_documents(small_text, tmp_path) -> Path:
    """Sixty documents."""
    text = small_text.read_text(encoding="utf-8")
    return json_lines(tmp_path / "small.jsonl.gz", [{"text": text[i : i + 200]} for i in range(0, 12_000, 200)])


@given(st.text(max_size=60), st.sampled_from(sorted(noise.KINDS)), st.integers(0, 9))
def test_noise_touches_letters_only_and_is_repeatable(text, kind, seed):
    noised = noise.add_noise(text, kind, 0.5, seed)
    assert noised == noise.add_noise(text, kind, 0.5, seed)
    assert noise.add_noise(text, kind, 0, seed) == text
    if not any(c.isalpha() for c in text):
        assert noised == text


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("drop", " 1, !"),
        ("swap", "ba 1c,d !e"),
        ("repeat", "aabb cc1dd, ee!"),
        ("upper", "AB C1D, E!"),
        ("homoglyph", "\u0430b \u04411d, \u0435!"),
    ],
)
def test_noise_in_every_letter(kind, expected):
    assert noise.add_noise("ab c1d, e!", kind, 1.0) == expected


def test_unknown_noise_is_named():
    with pytest.raises(ValueError, match=r"choose one of \['drop'"):
        noise.add_noise("a", "typo", 0.1)
    with pytest.raises(ValueError, match=r"rate=2 must be between"):
        noise.add_noise("a", "drop", 2)


@torch.no_grad()
def test_bits_of_documents_are_those_of_a_loop():
    model, tokenizer = tiny_model(), STLMTokenizer()
    documents = ["Some text about nothing much. ", "Zoë."]
    ids = [i for text in documents for i in (257, *text.encode(), 258)]
    nats, count = 0.0, 0
    for start in range(0, len(ids) // 16 * 16, 16):
        window = ids[start : start + 16]
        starts = [0, *(t for t, i in enumerate(window) if i == 257), 16]
        for first, end in pairwise(starts):
            if end > first:
                log_probabilities = model(torch.tensor([window[first:end]])).logits[0].log_softmax(-1)
                for t in range(first + 1, end):
                    if window[t] < 256:
                        nats, count = nats - float(log_probabilities[t - 1 - first, window[t]]), count + 1
    scored = score.bits_of_documents(model, tokenizer, documents, block_bytes=16)
    assert scored["bytes"] == count
    assert scored["bits_per_byte"] == pytest.approx(nats / math.log(2) / count, rel=1e-5)


def test_bits_of_a_checkpoint_in_one_command(tmp_path):
    model, tokenizer = tiny_model(), STLMTokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = TEXT.read_text(encoding="utf-8")[:5000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    printed = run("score.py", tmp_path / "model", tmp_path / "text.txt", cwd=tmp_path).splitlines()[-1]
    assert json.loads(printed) == pytest.approx(score.bits_of_documents(model, tokenizer, [text]), rel=1e-6)


def test_costs_of_a_model():
    model = tiny_model(patching="fixed", patch_bytes=4)
    assert costs.bytes_per_patch(model, torch.full((2, 16), 97)) == 4
    assert costs.effective_parameters(model) == model.parameter_budget()["effective"]["total"]
    assert costs.flops_per_byte(model, 4) == model.flops_per_byte(4, 1024)


def test_costs_of_tied_and_untied_llamas():
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    tied, untied = (
        LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, tie_word_embeddings=tie)) for tie in (True, False)
    )
    assert costs.effective_parameters(tied) == costs.effective_parameters(untied) == untied.num_parameters()
    matrices = 4 * 16 * 16 + 3 * 16 * 16 + 320 * 16
    for model in (tied, untied):
        assert costs.flops_per_byte(model, 2, 8) == (2 * matrices + 4 * 2 * 16) / 2


def test_bits_per_byte_of_other_tokenizers_are_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"▁the": 0, "<0x0A>": 1}, unk_token="▁the")))
    with pytest.raises(ValueError, match=r"need a byte-level tokenizer, but .*\['▁the'\]"):
        score.token_bytes(words)


def test_both_sentences_of_a_pair_get_the_same_noise():
    report = importlib.import_module("report")
    good, bad = "the dogs near the houses bark loudly", "the dog near the houses bark loudly"
    for kind in noise.KINDS:
        noised = [
            [report.noised_sentence(sentence, kind, number).split(" ") for number in range(50)]
            for sentence in (good, bad)
        ]
        assert all(a[0] == b[0] and a[2:] == b[2:] for a, b in zip(*noised))
        assert any(row != good.split(" ") for row in noised[0])


def test_altered_documents_are_the_same_each_time_and_say_what_was_asked():
    texts = [f"Document {i}: " + "some words of a plain text. " * (12 + i % 7) for i in range(300)]
    plain, noised, repeated, both = (
        [text.decode() if isinstance(text, bytes) else text for text in alterations.altered(texts, *shares)]
        for shares in ((0, 0), (0.2, 0), (0, 0.1), (0.2, 0.1))
    )
    assert plain == texts
    changed = [(new, old) for new, old in zip(noised, texts, strict=True) if new != old]
    assert 30 < len(changed) < 90
    assert all(0.85 * len(old) < len(new) < 1.15 * len(old) for new, old in changed)
    passages = [text for text in repeated if text not in texts]
    assert 10 < len(passages) < 60 and len(repeated) == len(texts) + len(passages)
    assert all(text[: len(text) // 2] == text[len(text) // 2 :] for text in passages)
    assert all(2 * alterations.PASSAGE[0] <= len(text) for text in passages)
    assert [text for text in both if text not in passages] == noised
    assert both == [t.decode() if isinstance(t, bytes) else t for t in alterations.altered(texts, 0.2, 0.1)]


@pytest.mark.parametrize("text", [b"caf\xe9 " * 99, "a lone \ud800 surrogate " * 20, "", b""])
def test_documents_that_are_no_utf8_are_altered_too(text):
    data = text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass")
    *passage, same = alterations.altered([text], 0, 1)
    assert same == data and len(passage) == (len(data) > 0)
    (noised,) = alterations.altered([text], 1, 0)
    assert (noised != data) == (len(data) > 0)
    assert list(alterations.altered([text], sentences=1)) == [data]  # without sentences it stays


def test_sentences_stand_alone_in_random_order():
    lines = [
        "Title",
        "A first one here. Is this a second? no capital letter.",
        "- A list item",
        "“Quoted text stays out.”",
    ]
    kept = [
        "Mr. Smith of St. Ives met J. Doe.",
        "Am 3. Oktober 1990 war es soweit.",
        "It is 1990. Nothing ends at a number.",
    ]
    lines += [*kept, *(f"Sentence number {i} of a long text." for i in range(40))] + [
        "Too short.",
        "Too long, " + "so " * 99 + "long.",
    ]
    document, other = "\n".join(lines), "Another one without any end"
    *alone, last = (data.decode() for data in alterations.altered([document, other], sentences=1))
    assert last == other
    wanted = [
        "A first one here.",
        "Is this a second?",
        *kept,
        *(f"Sentence number {i} of a long text." for i in range(40)),
    ]
    assert sorted(alone) == sorted(wanted) and alone != wanted
    assert alone == [data.decode() for data in alterations.altered([document], sentences=1)]
    texts = [f"{document} {i}" for i in range(200)]
    whole = [data for data in alterations.altered(texts, sentences=0.2) if b"Title" in data]
    assert 130 < len(whole) < 190
    assert list(alterations.altered([b"caf\xe9\nA caf\xe9 is a place."], sentences=1)) == [b"A caf\xe9 is a place."]
    noised = list(alterations.altered([document], noise=1, sentences=1))
    assert len(noised) == len(alone) and sum(a.encode() != b for a, b in zip(alone, noised)) > 10


def test_corpora_say_how_they_were_altered(small_documents, small_text, tmp_path):
    with pytest.raises(AssertionError, match=r"--sentences 0\.2 of 1 documents is less than ten of them"):
        train(small_text, tmp_path / "one", "--sentences", "0.2", "--max_steps", "1")
    options = ["--noise", "0.5", "--repeat", "0.5", "--sentences", "0.2", "--max_steps", "1"]
    train(small_documents, tmp_path / "run", *options)
    made_from = json.loads((tmp_path / "run" / "data" / "bytes" / "train.json").read_text())
    files = {"files": f"{small_documents.name} ({small_documents.stat().st_size:,} bytes)"}
    assert made_from == files | {"noise": 0.5, "repeat": 0.5, "sentences": 0.2}
    assert json.loads((tmp_path / "run" / "data" / "bytes" / "validation.json").read_text()) == files
    with pytest.raises(AssertionError, match="use another folder"):
        train(small_documents, tmp_path / "run", "--max_steps", "1")
    (tmp_path / "run" / "data" / "bytes" / "train.json").unlink()
    with pytest.raises(AssertionError, match="does not say what it was made with"):
        train(small_documents, tmp_path / "run", *options)


def test_presets_train_one_after_the_other_and_go_on(small_text, tmp_path):
    data = tmp_path / "texts"
    (data / "train").mkdir(parents=True)
    text = TEXT.read_text(encoding="utf-8")
    json_lines(data / "train" / "a.jsonl.gz", [{"text": text[i : i + 500]} for i in range(0, 150_000, 500)])
    for name in ("validation", "test"):
        json_lines(data / f"{name}.jsonl.gz", [{"text": small_text.read_text()}])
    environment = os.environ | {
        "WINDOWS": "2",
        "WINDOW_BYTES": "256",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    steps = []
    for minutes in ("0.03", "0.06"):
        command = ["bash", str(RESEARCH / "gpu.sh"), str(data), str(tmp_path / "out"), minutes, "stlm-3m"]
        subprocess.run(command, check=True, env=environment)
        steps.append(json.loads((tmp_path / "out" / "stlm-3m" / "results.json").read_text())["steps"])
        long = json.loads((tmp_path / "out" / f"stlm-3m-long-{minutes}" / "results.json").read_text())
        assert long["base_model"]["name"] == "stlm-3m" and long["config"]["rope_theta"] == 40_000
        assert (long["arguments"]["block_bytes"], long["arguments"]["batch_size"]) == ("1024", "1")
    assert 0 < steps[0] < steps[1]
    assert subprocess.run(command[:4], capture_output=True).returncode == 2


def test_budgets_in_bytes_and_operations(small_text, tmp_path):
    by_bytes = train(small_text, tmp_path / "bytes", "--max_bytes", 128 * 2 * 5, "--eval_at_end")
    assert by_bytes["steps"] == 5 and by_bytes["bytes_seen"] == 128 * 2 * 5
    flops = by_bytes["training_flops"]
    assert flops == pytest.approx(3 * by_bytes["flops_per_byte"] * by_bytes["bytes_seen"], rel=1e-6)
    changes = ["--set", "num_trunk_layers=8", 'layer_sharing="middle"']
    deeper = train(small_text, tmp_path / "deep", "--max_flops", 2 * flops, "--eval_at_end", *changes)
    assert deeper["config"]["num_trunk_layers"] == 8 and deeper["stored_parameters"] == by_bytes["stored_parameters"]
    assert deeper["flops_per_byte"] > by_bytes["flops_per_byte"]
    assert abs(deeper["training_flops"] / (2 * flops) - 1) < 0.1


@pytest.mark.parametrize("patching", ["vocabulary", "learned"])
def test_rules_learn_from_the_training_texts(patching, small_text, tmp_path):
    changes = ["--set", f'patching="{patching}"', "--vocab_size", 400]
    steps = ["--curriculum_steps", 2] if patching == "learned" else []
    results = train(small_text, tmp_path / "run", "--max_steps", 3, "--eval_at_end", *changes, *steps)
    config = modeling_stlm.STLMConfig.from_pretrained(tmp_path / "run")
    assert len((config.patch_vocabulary or "").split()) == (400 if patching == "vocabulary" else 0)
    assert 1 < results["bytes_per_patch_or_token"] < 16
    again = train(small_text, tmp_path / "run", "--max_steps", 4, "--eval_at_end", *changes, *steps)
    assert again["steps"] == 4  # with the same settings, also where the vocabulary is built again


@pytest.mark.parametrize("model", ["llama-bytes", "llama-bpe"])
def test_the_controls_train_at_the_stored_size_of_the_preset(small_text, tmp_path, model):
    results = train(small_text, tmp_path / "run", "--model", model, "--max_steps", 8, "--vocab_size", 512)
    check_a_run(tmp_path / "run", results)
    with torch.device("meta"):
        stored = modeling_stlm.STLMForCausalLM(modeling_stlm.STLMConfig.from_preset("stlm-3m")).num_parameters()
    assert 0.98 < results["stored_parameters"] / stored < 1.02


def test_the_time_of_a_training_includes_what_was_before_an_interruption(small_text, tmp_path):
    before = train(small_text, tmp_path / "run", "--max_steps", 4, "--eval_at_end")
    assert 0 <= before["wall_seconds"] < 300  # whole seconds: four steps may take less than one half
    path = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["Stopwatch"]["attributes"]["wall_seconds"] = 5000
    path.write_text(json.dumps(state))
    resumed = train(small_text, tmp_path / "run", "--max_steps", 8, "--eval_at_end")
    assert resumed["steps"] == 8 and 5000 <= resumed["wall_seconds"] < 5300


def test_objectives_beside_the_next_byte_by_name(small_text, tmp_path):
    penalty, multi_byte = "LearnedRepetitionPenalty 3.0 4 20 10".split(), "MultiByte 2 0.1".split()
    options = ["--max_steps", 50, "--eval_at_end", "--checkpoint", STLM_3M]  # its own texts begin after 48
    results = train(small_text, tmp_path / "both", *options, "--objective", *penalty, "--objective", *multi_byte)
    assert results["steps"] == 50
    assert results["arguments"]["objective"] == str([penalty, multi_byte])
    train(small_text, tmp_path / "one", *options, "--objective", *multi_byte)
    train(small_text, tmp_path / "none", *options)
    weights = {}
    for name in ("both", "one", "none"):
        model = modeling_stlm.STLMForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.architectures == ["STLMForCausalLM"]
        weights[name] = model.get_input_embeddings().weight
    assert not torch.equal(weights["one"], weights["none"]) and not torch.equal(weights["both"], weights["one"])


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("WeightedSum 1", "expected one of Denoising, EarlyExit, LearnedRepetitionPenalty, "),
        ("MultiByte", "its arguments and a weight"),
        ("MultiByte 2 much", "Expecting value"),
        ("MultiByte 1 0.5", "num_bytes=1 must be at least 2"),
        ("NextThought 1 2", "positional argument"),
        ("LearnedRepetitionPenalty 10", "the weights of a trained model: give --checkpoint"),
    ],
)
def test_objectives_that_cannot_be_made_are_told_at_once(objective, message, tmp_path, capsys):
    arguments = ["--train", TEXT, "--validation", TEXT, "--output", tmp_path, "--max_steps", "1"]
    with pytest.raises(SystemExit):
        importlib.import_module("train").parse_arguments([*map(str, arguments), "--objective", *objective.split()])
    assert message in capsys.readouterr().err


def test_layers_that_change_are_not_compiled(tmp_path, capsys):
    arguments = [
        "--train",
        str(TEXT),
        "--validation",
        str(TEXT),
        "--output",
        str(tmp_path / "run"),
        "--max_steps",
        "1",
    ]
    parse = importlib.import_module("train").parse_arguments
    assert parse([*arguments, "--compile", "--dropout", "constant", "0.1"]).compile
    with pytest.raises(SystemExit):
        parse([*arguments, "--compile", "--dropout", "linear", "0.1"])
    assert "--compile and a --dropout that changes" in capsys.readouterr().err
    timed = [*arguments[:-2], "--max_minutes", "1", "--dropout", "linear", "0.1"]
    with pytest.raises(SystemExit):
        parse(timed)
    assert "--max_minutes and a --dropout that changes" in capsys.readouterr().err
    assert parse([*timed[:-2], "constant", "0.1"]).max_minutes == 1


def test_fields_that_do_not_exist_are_named(small_text, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--train", str(small_text), "--max_steps", "1"]
    command += ["--validation", str(small_text), "--output", str(tmp_path), "--set", "depth=3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "--set: depth is not a field of STLMConfig" in result.stderr


def test_runs_of_a_list_by_name_and_seed(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(
        json.dumps({"arguments": {"max_bytes": 9}, "runs": {"a": {"seeds": [1, 2]}, "b": {"muon_lr": 0.1}}})
    )
    assert ablate.expand(path) == {
        "a-s1": {"max_bytes": 9, "seed": 1},
        "a-s2": {"max_bytes": 9, "seed": 2},
        "b-s1": {"max_bytes": 9, "muon_lr": 0.1, "seed": 1},
    }
    assert set(ablate.expand(path, ["b"])) == {"b-s1"}
    with pytest.raises(SystemExit, match=r"has no runs \['c'\]"):
        ablate.expand(path, ["c"])


def test_the_lists_that_can_be_run_set_fields_that_exist():
    lists = [json.loads(path.read_text()) for path in (RESEARCH / "ablations").glob("*.json")]
    runnable = [listed for listed in lists if "historical" not in listed]
    assert len(runnable) >= 4
    changes = {field for listed in runnable for run in listed["runs"].values() for field in run.get("set", {})}
    base = json.loads((RESEARCH / "ablations" / "base-3m" / "config.json").read_text())
    assert (changes | set(base)) - set(modeling_stlm.STLMConfig().to_dict()) == set()


def test_records_are_not_run(tmp_path):
    trials = RESEARCH / "ablations" / "trials-3m.json"
    command = [sys.executable, str(RESEARCH / "ablate.py"), str(trials), "--train", "a", "--validation", "b"]
    refused = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    assert refused.returncode != 0 and "is a record: made with trials-3m/changes.patch" in refused.stderr


def test_ablations_leave_a_table_and_are_not_repeated(small_documents, tmp_path):
    tiny = {"trunk_intermediate_size": 8, "intermediate_size": 8}
    listed = {
        "arguments": {"max_bytes": 1024, "block_bytes": 128, "batch_size": 2},
        "runs": {
            "base": {"set": tiny, "seeds": [2]},
            "fixed": {"set": tiny | {"patching": "fixed"}},
            "noisy": {"set": tiny, "noise": 0.5},
            "llama-bpe": {"model": "llama-bpe", "vocab_size": 300},
        },
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(listed))
    arguments = ["--train", small_documents, "--validation", small_documents, "--output", tmp_path / "runs"]
    first = run("research/ablate.py", path, *arguments, "--only", "base", "fixed", "noisy", cwd=tmp_path)
    assert "3 runs, 3 to do" in first
    assert {file.stem for file in (tmp_path / "tiny").glob("*.json")} == {"base-s2", "fixed-s1", "noisy-s1"}
    assert json.loads((tmp_path / "runs" / "data-noise-0.5" / "bytes" / "train.json").read_text())["noise"] == 0.5
    assert "MB: loss" in ablate.progress(tmp_path / "runs" / "base-s2" / "log.txt")
    again = run("research/ablate.py", path, *arguments, cwd=tmp_path)
    assert "4 runs, 1 to do" in again
    table = (tmp_path / "tiny" / "README.md").read_text()
    results = json.loads((tmp_path / "tiny" / "fixed-s1.json").read_text())
    assert f"| fixed-s1 | {results['bits_per_byte']['validation']:.4f} |" in table and "| llama-bpe-s1 |" in table
    assert (tmp_path / "tiny" / "plots.png").stat().st_size > 10_000
    assert results["config"]["patching"] == "fixed" and results["arguments"]["seed"] == "1"
    # A run of the same name with other arguments is no reason to believe its results, nor to go on where it was.
    listed["runs"]["fixed"]["set"]["patch_bytes"] = 3
    path.write_text(json.dumps(listed))
    command = [sys.executable, RESEARCH / "ablate.py", path, *arguments]
    for file in ("tiny/fixed-s1.json", "runs/fixed-s1"):
        refused = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert refused.returncode != 0
        assert f"{tmp_path / file} holds a run with other arguments" in refused.stderr
        (tmp_path / "tiny" / "fixed-s1.json").unlink(missing_ok=True)


@pytest.mark.parametrize("script", ["distillation", "replay"])
def test_a_text_to_train_on_comes_with_one_to_validate_on(small_text, script):
    command = [sys.executable, RESEARCH / f"{script}.py", "--train", small_text]
    refused = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert refused.returncode == 2 and "give --train and --validation" in refused.stderr


@pytest.mark.parametrize("name", ["text.jsonl.gz", "text.txt.gz"])
def test_packed_documents_that_cannot_be_unpacked_are_named(name, tmp_path):
    packed = gzip.compress(b'{"text": "one"}\n' * 99)
    (tmp_path / name).write_bytes(packed)
    assert list(score.documents([str(tmp_path / name)]))
    for data in (b"plain", packed[:-9]):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SystemExit, match=f"{name} cannot be unpacked"):
            list(score.documents([str(tmp_path / name)]))


@pytest.mark.parametrize(
    ("name", "content"),
    [("A.CSV", "text\none\ntwo\n"), ("a.ndjson", '{"text": "one"}\n{"text": "two"}\n'), ("a.txt", "one two")],
)
def test_documents_are_rows_or_whole_files(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert list(score.documents([str(tmp_path / name)])) == ([b"one two"] if name == "a.txt" else ["one", "two"])


def test_rows_without_a_text_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    with pytest.raises(SystemExit, match=r"row 2 of .*a\.jsonl has the text null, expected a string"):
        list(score.documents([str(tmp_path / "a.jsonl")]))


@given(
    st.lists(st.sampled_from([b"a", "é".encode(), "東".encode(), "🙂".encode(), b"\xff", b"\xe6\x9d"])),
    st.integers(1, 5),
)
def test_the_first_bad_byte_is_that_of_one_decoding(parts, piece):
    data = b"".join(parts)
    try:
        data.decode()
        expected = None
    except UnicodeDecodeError as error:
        expected = error.start
    assert score.first_bad_byte(data, piece) == expected


def test_repetition_is_told_from_text_that_goes_on():
    class Writes(torch.nn.Module):
        """Writes the bytes of `text`, whatever it reads."""

        device = torch.device("cpu")

        def __init__(self, text: bytes):
            super().__init__()
            self.text = text

        def generate(self, input_ids, max_new_tokens, **_):
            new = torch.tensor([list(self.text[:max_new_tokens])]).expand(len(input_ids), -1)
            return torch.cat([input_ids, new], dim=1)

    rows = [{"text": TEXT.read_text(encoding="utf-8")[:20_000]}]
    loop, no_loop = (
        report.repeated_share(Writes(text), STLMTokenizer(), rows) for text in (b"ab" * 128, bytes(range(128)))
    )
    assert no_loop == 0 and loop == 1 - 2 / (256 - 15)


def test_bits_of_a_doubled_text_are_those_of_a_loop():
    model, text = tiny_model(), "Once upon a time"
    ids = torch.tensor([[257, *text.encode(), *text.encode()]])
    nats = 0
    for place in range(len(text) + 1, 2 * len(text) + 1):
        nats -= model(ids[:, :place]).logits[0, -1].log_softmax(-1)[ids[0, place]].item()
    bits = report.doubled_bits(model, STLMTokenizer(), [{"text": text}])
    assert bits == pytest.approx(nats / math.log(2) / len(text), rel=1e-4)


def test_bits_after_a_context_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(report, "CONTEXTS", (0, 3, 8))
    monkeypatch.setattr(report, "TARGET_BYTES", 4)
    model, texts = tiny_model(), ("Once upon a time", "abc☃e☃d☃", "short")  # the second is cut in characters
    bits = {"0": 0, "3": 0, "8": 0}
    for text in texts[:2]:
        data = text.encode()
        target = data[8:12].decode(errors="ignore").encode()
        for size in (0, 3, 8):
            ids = [257, *data[8 - size : 8].decode(errors="ignore").encode(), *target]
            for place in range(len(ids) - len(target), len(ids)):
                logits = model(torch.tensor([ids[:place]])).logits[0, -1]
                bits[str(size)] -= logits.log_softmax(-1)[ids[place]].item() / math.log(2)
    rows = [{"text": text} for text in texts]
    found = report.context_bits(model, STLMTokenizer(), rows)
    num_bytes = sum(len(text.encode()[8:12].decode(errors="ignore").encode()) for text in texts[:2])
    assert found["documents"] == 2 and num_bytes < 8
    assert found["bits"] == pytest.approx({size: total / num_bytes for size, total in bits.items()}, rel=1e-4)
    model.config.max_position_embeddings = 8  # too short for 8 + 4
    assert set(report.context_bits(model, STLMTokenizer(), rows)["bits"]) == {"0", "3"}


def test_results_and_curves_are_those_of_the_files_here(tmp_path):
    (tmp_path / "RESULTS.md").write_text((ROOT / "RESULTS.md").read_text(encoding="utf-8"), encoding="utf-8")
    run("research/report.py", "write", "--output", "RESULTS.md", cwd=tmp_path)
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    record = RESEARCH / "results" / "curves" / "curves.json"
    (tmp_path / "curves.json").write_bytes(record.read_bytes())
    run("research/curves.py", "--record", "curves.json", cwd=tmp_path)
    assert (tmp_path / "curves.json").read_bytes() == record.read_bytes()
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_report_measures_and_writes(tmp_path):
    model = tiny_model()
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(tmp_path / "model")
    STLMTokenizer().save_pretrained(tmp_path / "model")
    phases = [{"bytes_seen": 3000, "commit": "b"}, {"bytes_seen": 400, "commit": "a"}]
    trained = {"bytes_seen": 50_000, "commit": "a", "device": "a chip", "afterwards": phases}
    (tmp_path / "model" / "results.json").write_text(json.dumps(trained))
    text = TEXT.read_text(encoding="utf-8")
    rows = [{"text": text[:30_000], "source": "one/a"}, {"text": text[30_000:50_000], "source": "two/b"}]
    held_out = json_lines(tmp_path / "held_out.jsonl.gz", rows)
    pairs = [
        {"sentence_good": f"A dog {i} runs.", "sentence_bad": f"A dog {i} run.", "field": "syntax", "UID": "agreement"}
        for i in range(30)
    ]
    blimp = json_lines(tmp_path / "blimp.jsonl.gz", pairs)
    choices = json_lines(
        tmp_path / "copa.jsonl.gz", [{"query": "It rained, so", "choices": ["a", "b"], "gold": 1}] * 3
    )
    run(
        *(
            "research/report.py",
            "measure",
            tmp_path / "model",
            "--name",
            "tiny",
            "--validation",
            held_out,
            "--test",
            held_out,
        ),
        *("--blimp", blimp, "--copa", choices, "--results", tmp_path / "results"),
        cwd=tmp_path,
    )
    measured = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert set(measured["held_out"]["test"]) == {"all", "one", "two"}
    assert set(measured["noise"]["bits"]) == {"clean", *noise.KINDS} == set(measured["noise"]["blimp"])
    assert {scores["pairs"] for scores in measured["noise"]["blimp"].values()} == {3}
    scored = run("evaluate_lm.py", "--checkpoint", tmp_path / "model", "--copa", choices, cwd=tmp_path)
    assert f"| copa_file | acc | {measured['tasks']['copa_file']['acc']:.4f} |" in scored
    assert measured["tasks"]["copa_file"]["rows"] == 3 and measured["tasks"]["blimp_file"]["rows"] == 30
    assert len(measured["repetition"]) == 2
    assert measured["context"]["documents"] == 4 and len(measured["context"]["bits"]) == 7
    expected = {"bytes_seen": 50_000, "commit": "a, b", "device": "a chip", "bytes_seen_afterwards": 3400}
    assert measured["training"] == expected
    assert all(sample["text"].startswith(sample["prompt"]) for sample in measured["samples"])
    run(
        "research/report.py",
        "write",
        "--results",
        tmp_path / "results",
        "--output",
        tmp_path / "RESULTS.md",
        cwd=tmp_path,
    )
    written = (tmp_path / "RESULTS.md").read_text()
    assert f"| two | {measured['held_out']['test']['two']['bits_per_byte']:.3f} |" in written
    assert "| bytes seen afterwards | 3,400 |" in written
    assert f"| 1,024 | {measured['context']['bits']['1,024']:.4f} |" in written
    assert "## Robustness" in written and "| homoglyph |" in written and "| copa | acc |" in written


@pytest.mark.slow
def test_blt_has_the_size_and_the_patches_that_are_asked_for():
    text = (ROOT / "examples" / "data" / "shakespeare.txt").read_text()
    model, tokenizer = controls.blt(9_885_504, text, patch_bytes=4.5)
    assert 0.99 < model.num_parameters() / 9_885_504 <= 1
    ids = torch.tensor([tokenizer(text[4096:8192])["input_ids"]])
    config = model.config
    options = {"patch_size": config.patch_size, "max_patch_length": config.max_patch_length}
    lengths = model.model.patcher(ids, threshold=config.patching_threshold, **options)[1]
    assert 4 < 4096 / (lengths > 0).sum() < 5
    with pytest.raises(ValueError, match="100,000 parameters are too few"):
        controls.blt(100_000, text)


@pytest.mark.slow
def test_speed_is_measured_beside_another_model(tmp_path):
    models = ("--vocab_size", 512, "--models", "stlm", "llama-bpe")
    options = ("--preset", "stlm-3m", "--repeats", 1, *models)
    only = ("--only", "first byte", "generate bytes/s, batch 16", "--prompts", 3072)
    last = run("research/benchmark.py", *options, "stlm-engine-q8", *only, cwd=tmp_path).splitlines()[-1]
    table = json.loads(last)["table"]
    for name, row in table.items():
        for measure in ("generate bytes/s, batch 16", *(["first byte ms, 3 kB"] if "engine" not in name else [])):
            assert 0 < row[measure]["low"] <= row[measure]["median"] <= row[measure]["high"] < 1e5
    assert "first byte ms, 3 kB" not in table["stlm-engine-q8"]
    assert table["stlm"]["bytes a unit"] > 3 and abs(table["llama-bpe"]["stored"] / table["stlm"]["stored"] - 1) < 0.02

    sweep = run(
        "research/benchmark.py", *options, "--sweep", "--only", "context 1024", "--plot", "plot.png", cwd=tmp_path
    )
    assert json.loads(sweep.splitlines()[-1])["table"]["stlm"]["context 1024"]["median"] > 0
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_start_up_and_memory_are_measured(tmp_path):
    output = run("research/startup.py", "--preset", "stlm-3m", "--repeats", 1, "--new_bytes", 300, cwd=tmp_path)
    results = json.loads(output.splitlines()[-1])["results"]
    (ours,), (theirs,) = results["stlm"], results["llama"]
    assert ours["import CPU s"] < 2 * theirs["import CPU s"]
    assert (
        11 < ours["weights and cache MB"] < 20 and 2 < ours["peak MB"] < 40
    )  # pages of weights come when they are read


def test_the_survey_knows_the_bits_of_its_models():
    survey = importlib.import_module("survey")
    for _, _, trained in survey.SYSTEMS.values():
        bits = survey.bits_per_byte(trained)
        assert bits is None if trained is None else 1 < bits < 3


def test_the_survey_measures_cost_beside_quality(tmp_path):
    systems = ["stlm-3m, generate", "stlm-3m, engine q8"]
    options = ["--repeats", 1, "--plot", "plot.png", "--systems", *systems]
    results = json.loads(run("research/survey.py", *options, cwd=tmp_path).splitlines()[-1])["results"]
    assert list(results) == systems and (tmp_path / "plot.png").stat().st_size > 0
    slow, fast = results.values()
    assert fast["bytes per second"]["median"] > slow["bytes per second"]["median"]
    assert fast["MB"] < slow["MB"] and fast["MB of memory"]["median"] < slow["MB of memory"]["median"]
    assert 0 < fast["bits per byte"] == slow["bits per byte"]


def test_export_publishes_what_the_rounded_weights_score(small_text, tmp_path):
    results = train(small_text, tmp_path / "run", "--max_steps", 4, "--test", small_text)
    (tmp_path / "data.md").write_text("A play.\n")
    arguments = ["--run", tmp_path / "run", "--output", tmp_path / "out", "--data", tmp_path / "data.md"]
    arguments += ["--validation", small_text, "--test", small_text, "--licence", "mit"]
    run("research/export.py", *arguments, cwd=tmp_path)
    exported = json.loads((tmp_path / "out" / "results.json").read_text())
    assert str(tmp_path) not in json.dumps(exported["arguments"]) and exported["arguments"]["train"] == "small.txt"
    score = exported["exported"]["scores"]["test"]["bits_per_byte"]
    assert abs(score - results["bits_per_byte"]["test"]) < 0.05  # bfloat16
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert not list((tmp_path / "out").glob("*.py"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit" and card.data.eval_results[1].metric_value == round(score, 4)
    assert "A play." in card.text
    # An edited card is kept, while the rest is exported again.
    (tmp_path / "out" / "README.md").write_text("# Mine\n")
    (tmp_path / "out" / "model.safetensors").unlink()
    assert "kept" in run("research/export.py", *arguments, cwd=tmp_path)
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_export_takes_the_mean_of_weights_before_and_after(small_text, tmp_path):
    pretrain(small_text, tmp_path / "before", "--max_steps", 2)
    options = ["--checkpoint", tmp_path / "before", "--max_steps", 3, "--sentences", 1, "--set", "rope_theta=40000"]
    for name, seed in (("after", 1), ("other", 2)):
        pretrain(small_text, tmp_path / name, *options, "--seed", seed)
    (tmp_path / "data.md").write_text("A play.\n")
    arguments = ["--run", tmp_path / "before", "--after", tmp_path / "after", tmp_path / "other", "--share", 0.5]
    arguments += ["--data", tmp_path / "data.md", "--validation", small_text, "--test", small_text]
    window = ["--set", "trunk_window_patches=16"]
    run("research/export.py", *arguments, *window, "--output", tmp_path / "out", cwd=tmp_path)
    before, after, other, out = (
        torch.cat(
            [value.flatten() for value in AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict().values()]
        )
        for name in ("before", "after", "other", "out")
    )
    rounding = (out - 0.5 * before - 0.25 * after - 0.25 * other).norm()
    assert rounding <= 2**-9 * out.norm()
    assert all((out - weights).norm() > 4 * rounding for weights in (before, after, other))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(entry["share_of_weights"], entry["steps"]) for entry in results["afterwards"]] == [(0.25, 3), (0.25, 3)]
    assert results["steps"] == 2
    assert results["config"]["rope_theta"] == 40_000 and results["config"]["trunk_window_patches"] == 16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.trunk_window_patches == 16
    assert "bits_per_byte" not in results  # those of neither run
    assert set(results["exported"]["scores"]) == {"validation", "test"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- from the weights of then, for 25% of a mean with them, " in card
    assert "- optimizer: NorMuon 0.02 on matrices" in card and card.count("- their rates: NorMuon 0.02, ") == 2
    assert "\n- fields changed after training: trunk_window_patches=16\n" in card

    # Half of what the two changed, added to one of them.
    plus = ["--plus", tmp_path / "before", tmp_path / "out"]
    again = ["--run", tmp_path / "out", "--after", tmp_path / "after", *arguments[7:], "--output", tmp_path / "again"]
    run("research/export.py", *again, cwd=tmp_path)  # which has another window
    assert "fields_set" not in json.loads((tmp_path / "again" / "results.json").read_text())
    added = ["--run", tmp_path / "before", "--after", tmp_path / "after", *arguments[7:]]
    run("research/export.py", *added, *plus, "--output", tmp_path / "sum", cwd=tmp_path)
    total = torch.cat(
        [value.flatten() for value in AutoModelForCausalLM.from_pretrained(tmp_path / "sum").state_dict().values()]
    )
    assert (total - after - out + before).norm() <= 2**-9 * total.norm()
    phases = json.loads((tmp_path / "sum" / "results.json").read_text())["afterwards"]
    assert [(phase["share_of_weights"], phase.get("added")) for phase in phases] == [
        (1, None),
        (0.25, True),
        (0.25, True),
    ]

    def refused(*words) -> str:
        command = [str(word) for word in (sys.executable, RESEARCH / "export.py", *words)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode != 0 and "Traceback" not in result.stderr
        return result.stderr

    for name in ("before", "other"):
        assert "would average or add twice" in refused(*arguments, "--output", tmp_path / name)
    another = ["--output", tmp_path / "another"]
    assert "--set hidden_size=64 does not fit the weights" in refused(*arguments, "--set", "hidden_size=64", *another)
    assert "--set match_bytes=0 does not fit the weights" in refused(*arguments, "--set", "match_bytes=0", *another)
    assert "--set ['width']: not a field" in refused(*arguments, "--set", "width=64", *another)
    assert "do not go on from those of" in refused(*added, "--plus", tmp_path / "out", tmp_path / "before", *another)
    assert "is in the weights of" in refused("--run", tmp_path / "sum", *arguments[7:], *plus, *another)
    assert "has no results.json" in refused("--run", tmp_path, *arguments[7:], *another)
    rest = [*arguments[5:], "--output", tmp_path / "another"]
    assert "--share needs --after" in refused(*arguments[:2], *rest)
    swapped = ["--run", tmp_path / "after", "--after", tmp_path / "before", *rest]
    assert "started from random weights" in refused(*swapped)
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"match_doublings": 0}))
    assert "other differ in ['match_doublings']" in refused(*arguments, "--output", tmp_path / "another")


@pytest.mark.parametrize("model", ["stlm", "llama-bpe"])
def test_learning_curves_are_in_bits_per_byte(small_text, tmp_path, model):
    size = ["--model", "llama-bpe", "--vocab_size", 300, "--like", "stlm-3m"] if model == "llama-bpe" else []
    (tmp_path / "digits.txt").write_text("0123456789 " * 400)  # more tokens a byte than the training text
    results = train(small_text, tmp_path / "run", "--max_steps", 1, *size, "--validation", tmp_path / "digits.txt")
    unit, text = 1, small_text.read_text(encoding="utf-8")
    if model == "llama-bpe":
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
        unit = len(text.encode()) / len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert unit > 1.3 * results["bytes_per_patch_or_token"]
    window = 128 if model == "stlm" else round(128 / results["bytes_per_patch_or_token"])
    assert results["bytes_seen"] == pytest.approx(2 * window * unit, rel=1e-2)  # one step of two windows
    logs = [{"step": step, "loss": bits * unit * math.log(2)} for step, bits in ((1, 8.0), (50, 2.5), (100, 2.0))]
    (tmp_path / "run" / "history.json").write_text(json.dumps([*logs, {"step": 100, "eval_loss": 1.0}]))
    run("research/curves.py", f"mine={tmp_path / 'run'}", "--record", "curves.json", cwd=tmp_path)
    record = json.loads((tmp_path / "curves.json").read_text())["mine"]
    assert record["curve"] == [[50, pytest.approx(2.5)], [100, pytest.approx(2.0)]]
    assert record["bytes_seen"] == results["bytes_seen"] and record["minutes"] == results["cpu_seconds"] / 60
    run("research/curves.py", f"again={tmp_path / 'run'}", "--record", "curves.json", cwd=tmp_path)
    assert sorted(json.loads((tmp_path / "curves.json").read_text())) == ["again", "mine"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_name_of_the_cpu_needs_no_linux(monkeypatch, tmp_path):
    provenance = importlib.import_module("provenance")
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "none")
    assert provenance.cpu_name() == (platform.processor() or platform.machine()) != ""
    assert provenance.run_info()["device"].startswith(provenance.cpu_name()) or torch.cuda.is_available()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A chip: of two\n")
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    assert provenance.cpu_name() == "A chip"


def test_character_tasks_are_learned_and_scored_on_rows_held_out(tmp_path):
    rows = [
        {"task": task, "inputs": [f"w{i}{'xy'[i % 2]}"], "label": "xy"[i % 2]}
        for i in range(20)
        for task in ("one", "two")
    ]
    json_lines(tmp_path / "rows.jsonl.gz", rows)
    files = ("--data", "rows.jsonl.gz", "--output", "out.json")
    options = ("--epochs", 40, "--batch_size", 16, "--learning_rates", 3e-3)
    printed = run("research/characters.py", *files, "--checkpoints", STLM_3M, *options, cwd=tmp_path)
    record = json.loads((tmp_path / "out.json").read_text())
    (found,) = record["runs"]
    assert found["checkpoint"] == "stlm-3m" and record["commit"] and record["arguments"]["data"] == "rows.jsonl.gz"
    scores = found["scores"]
    assert sorted(scores) == ["all", "one", "two"] and scores["all"] == (scores["one"] + scores["two"]) / 2
    assert scores["all"] > 0.5, printed  # words that are not among those to train on
    (tmp_path / "few.jsonl").write_text(json.dumps(rows[0]) + "\n")
    message = refused(
        "research/characters.py", "--data", "few.jsonl", "--output", "x.json", "--checkpoints", STLM_3M, cwd=tmp_path
    )
    assert message == "few.jsonl has too few rows of ['one']: none to train on, or none to test on"
