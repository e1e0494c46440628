# SPDX-License-Identifier: Apache-2.0
"""The examples, run as a user would, with few steps."""

import argparse
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_stlm
from modeling_stlm.training.model_card import build_model_card

from .tiny import tiny_model


ROOT = Path(__file__).parents[1]
assert modeling_stlm.__all__  # imported for its registrations
TEXT = ROOT / "examples" / "data" / "shakespeare.txt"
STLM_3M = ROOT / "examples" / "checkpoints" / "stlm-3m"


def run(script: str, *arguments, cwd: Path, **options) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def refused(script: str, *arguments, cwd: Path, **others) -> str:
    """The last line of a command that ends in words; `others` are options that were otherwise."""
    arguments += tuple(word for name, value in others.items() for word in (f"--{name}", value))
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=600)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    line = result.stderr.splitlines()[-1]
    assert re.findall(r"[{ ]'(\w+)': ", line) == sorted(others), line
    return line


@pytest.fixture(scope="module")
def small_text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:12_000], encoding="utf-8")
    return path


def pretrain(small_text: Path, output: Path, *more, script: str = "pretrain.py") -> dict:
    arguments = ["--train", small_text, "--validation", small_text, "--output", output, "--batch_size", 2]
    printed = run(script, *arguments, "--block_bytes", 128, "--eval_steps", 4, *more, cwd=output.parent)
    (output / "printed.txt").write_text(printed)
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("script", ["pretrain.py", "research/train.py"])
def test_pretraining_goes_from_text_to_a_checkpoint(small_text, tmp_path, script):
    results = pretrain(small_text, tmp_path / "run", "--max_steps", 8, "--model", "stlm-3m", script=script)
    check_a_run(tmp_path / "run", results)
    printed = (tmp_path / "run" / "printed.txt").read_text()
    known = "of the 1 documents of --validation are among those to train on: the score is not that of new texts\n"
    assert f"1 {known}" in printed
    (tmp_path / "other.txt").write_text(small_text.read_text(encoding="utf-8")[5:], encoding="utf-8")
    pretrain(small_text, tmp_path / "new", "--max_steps", 1, "--validation", tmp_path / "other.txt", script=script)
    assert known not in (tmp_path / "new" / "printed.txt").read_text()


def check_a_run(folder: Path, results: dict) -> None:
    assert 2 < results["bits_per_byte"]["validation"] < 8
    assert results["commit"] and results["transformers"] and results["steps"] == 8
    for name in ("loss.png", "history.json", "generation_config.json", "tokenizer.json", "config.json"):
        assert (folder / name).stat().st_size > 0
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.num_parameters() == results["stored_parameters"]
    # A checkpoint that sets a length overrides `max_length` of whoever generates.
    assert loaded.generation_config.max_new_tokens is None and loaded.generation_config.max_length is None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ROMEO: Zoë")["input_ids"]) == "ROMEO: Zoë"


def test_pretraining_in_bfloat16_on_a_clock(small_text, tmp_path):
    budget = ["--max_minutes", 0.05, "--clock", "cpu", "--bf16", "--test", small_text]
    results = pretrain(small_text, tmp_path / "run", *budget, "--set", "num_trunk_layers=3", 'layer_sharing="none"')
    assert results["budget"] == {"minutes": 0.05, "clock": "cpu"} and results["steps"] > 0
    assert results["bytes_seen"] == results["steps"] * 2 * 128
    assert results["bits_per_byte"]["test"] == results["bits_per_byte"]["validation"] < 8.2
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert any("validation_bits_per_byte" in log for log in history)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert loaded.dtype == torch.float32 and loaded.config.layer_sharing == "none"


@pytest.mark.parametrize("script", ["pretrain.py", "research/train.py"])
def test_pretraining_starts_from_a_checkpoint(small_text, tmp_path, script):
    start = ["--checkpoint", STLM_3M, "--set", "hidden_dropout=0.1", "--only", "match_embedding"]
    results = pretrain(small_text, tmp_path / "run", "--max_steps", 2, *start, script=script)
    assert results["model"] == "run" and results["base_model"]["name"] == "stlm-3m"
    assert results["arguments"]["checkpoint"] == "stlm-3m" and str(tmp_path) not in json.dumps(results)
    kept, started = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (STLM_3M, tmp_path / "run")
    )
    assert started.config.hidden_dropout == 0.1 and started.dtype == torch.float32
    before = kept.state_dict()
    changed = [name for name, weight in started.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed == ["model.match_embedding.following.weight", "model.match_embedding.length.weight"]
    card = build_model_card(tmp_path / "run")
    assert "- starts from the weights of `stlm-3m`\n- 512 bytes seen" in card.text
    assert card.data.license == "cc-by-sa-4.0"
    # Another start is another run, also where the budget grows.
    other = ["--train", small_text, "--validation", small_text, "--output", "run"]
    other += ["--batch_size", 2, "--block_bytes", 128]
    for start, message in (
        (["--checkpoint", STLM_3M], "use another folder"),
        (["--checkpoint", STLM_3M, "--set", "hidden_size=64", "--output", "new"], "--set hidden_size=64: "),
    ):
        command = [sys.executable, ROOT / "examples" / script, *other, "--max_steps", 3, *start]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1 and message in result.stderr.splitlines()[-1]


def test_pretraining_names_what_there_is_to_train(small_text, tmp_path):
    files = ["--train", str(small_text), "--validation", str(small_text), "--output", "run", "--max_steps", "1"]
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), *files, "--only", "match_embeding"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (
        result.returncode == 1 and "--only match_embeding: no weight is called so; there are model." in result.stderr
    )
    assert "model.match_embedding, model.ngram_embedding" in result.stderr.splitlines()[-1]


def test_a_pretraining_that_was_cut_goes_on(small_text, tmp_path):
    whole = pretrain(small_text, tmp_path / "whole", "--max_steps", 8)
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--train", str(small_text)]
    command += ["--validation", str(small_text), "--output", str(tmp_path / "cut"), "--batch_size", "2"]
    command += ["--block_bytes", "128", "--eval_steps", "4", "--max_steps", "8"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "cut" / "results.json").exists()
    for half_written in ("checkpoint-98", "checkpoint-99", "checkpoint-best"):
        (tmp_path / "cut" / half_written).mkdir()
    (tmp_path / "cut" / "checkpoint-98" / "trainer_state.json").write_text('{"global_step": 9')
    resumed = pretrain(small_text, tmp_path / "cut", "--max_steps", 8)
    assert resumed["bits_per_byte"] == whole["bits_per_byte"]
    assert (
        f"\nstep 4 of 8: goes on from {tmp_path / 'cut' / 'checkpoint-4'}\n"
        in (tmp_path / "cut" / "printed.txt").read_text()
    )
    assert "goes on" not in (tmp_path / "whole" / "printed.txt").read_text()
    # Results are published: names of files, no folders of this machine.
    assert resumed["arguments"]["train"] == small_text.name and resumed["arguments"]["output"] == "cut"
    assert str(tmp_path) not in json.dumps(resumed) and str(small_text.parent) not in json.dumps(resumed)


def test_ctrl_c_saves_and_a_larger_budget_is_honoured(small_text, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--train", str(small_text), "--validation"]
    command += [str(small_text), "--output", str(tmp_path / "run"), "--batch_size", "2", "--block_bytes", "128"]
    process = subprocess.Popen(
        [*command, "--max_bytes", "1e6", "--eval_steps", "4"], stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if ": validation " in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait() == 130 and "SIGINT: saved at 0.0 of 1.0 MB; the same command goes on" in rest
    (newest,) = (tmp_path / "run").glob("checkpoint-*/trainer_state.json")
    steps = json.loads(newest.read_text())["global_step"]
    assert 4 < steps < 3900 and not (tmp_path / "run" / "results.json").exists()

    for more in (2, 4):  # what was cut, then what was finished
        results = pretrain(small_text, tmp_path / "run", "--max_steps", steps + more)
        assert results["steps"] == steps + more and results["budget"] == {"steps": steps + more}
        assert results["bytes_seen"] == (steps + more) * 256
    assert (tmp_path / "run" / "model.safetensors").stat().st_mode & 0o040


@pytest.mark.slow
def test_a_compiled_pretraining_evaluates_and_goes_on_without(small_text, tmp_path):
    tiny_model().config.save_pretrained(tmp_path / "config")
    options = ["--model", tmp_path / "config", "--block_bytes", 128]
    compiled = pretrain(small_text, tmp_path / "run", *options, "--max_steps", 5, "--compile")
    plain = pretrain(small_text, tmp_path / "plain", *options, "--max_steps", 5)
    assert compiled["bits_per_byte"]["validation"] == pytest.approx(plain["bits_per_byte"]["validation"], abs=1e-3)
    assert pretrain(small_text, tmp_path / "run", *options, "--max_steps", 6)["steps"] == 6


def test_a_pretraining_goes_on_with_the_settings_it_began_with(small_text, tmp_path):
    pretrain(small_text, tmp_path / "run", "--max_steps", 2)
    begun, files = tmp_path / "run" / "begun.json", ["--train", small_text, "--validation", small_text]
    command = [sys.executable, ROOT / "examples" / "pretrain.py", *files, "--output", "run", "--max_steps", 3]
    same = {"batch_size": 2, "block_bytes": 128}
    for other in ({"batch_size": 4}, {"block_bytes": 64}, {"muon_lr": 0.01}, {"adamw_lr": 0.01}, {"seed": 2}):
        options = [word for name, value in (same | other).items() for word in (f"--{name}", value)]
        result = subprocess.run([*map(str, command + options)], capture_output=True, text=True, cwd=tmp_path)
        (name,) = other
        assert result.returncode == 1 and f"begun.json was made with {{'{name}': " in result.stderr.splitlines()[-1]
    # Begun by an earlier version, which recorded less, and the patterns of the files.
    recorded = json.loads(begun.read_text())
    names = "model", "checkpoint", "only", "set", "matrix_optimizer"
    earlier = {name: recorded[name] for name in names} | {"train": "['*.txt']"}
    assert earlier["matrix_optimizer"] == "NorMuon"
    of_muon = {name: value for name, value in earlier.items() if name != "matrix_optimizer"}
    for other, name in ((earlier | {"set": "['patching=fixed']"}, "set"), (of_muon, "matrix_optimizer")):
        begun.write_text(json.dumps(other))
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1 and f"begun.json was made with {{'{name}': " in result.stderr.splitlines()[-1]
    begun.write_text(json.dumps(earlier))
    assert pretrain(small_text, tmp_path / "run", "--max_steps", 3)["steps"] == 3
    assert json.loads(begun.read_text()) == recorded


def test_a_pretraining_that_diverges_says_which_rates_to_lower_and_saves_nothing(small_text, tmp_path):
    files = ["--train", small_text, "--validation", small_text, "--output", "run", "--block_bytes", 128]
    budget = ["--max_steps", 6, "--eval_steps", 3, "--muon_lr", 50, "--adamw_lr", 1e20]
    command = [sys.executable, ROOT / "examples" / "pretrain.py", *files, *budget]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "next: " not in result.stdout
    assert result.stderr.splitlines()[-1] == (
        "step 3: the training diverged, its weights are not finite and not saved. Lower --muon_lr 50 or --adamw_lr 1e+20, with a new --output"
    )
    assert not [*(tmp_path / "run").rglob("*.safetensors"), *(tmp_path / "run").rglob("results.json")]


@pytest.mark.parametrize("script", ["pretrain.py", "research/train.py"])
def test_a_budget_that_is_spent_trains_nothing(small_text, tmp_path, script):
    folder = tmp_path / "run"
    results = pretrain(small_text, folder, "--max_steps", 3, script=script)
    written = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".txt"}
    spent = "the budget is spent after 3 steps: nothing is trained; with a larger one the run goes on\n"
    pretrain(small_text, folder, "--max_steps", 3, script=script)
    assert (folder / "printed.txt").read_text().endswith(spent)
    assert written == {path: path.read_bytes() for path in written} and not (folder / "checkpoint-4").exists()
    asked = pretrain(small_text, folder, "--max_steps", 3, "--test", small_text, script=script)
    assert asked["bits_per_byte"] == dict.fromkeys(("validation", "test"), results["bits_per_byte"]["validation"])
    # Killed between the last checkpoint and the results: they are written without another step.
    for name in ("results.json", "model.safetensors"):
        (folder / name).unlink()
    path = folder / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"].get("Stopwatch", {"attributes": {}})["attributes"]["wall_seconds"] = 100.0
    path.write_text(json.dumps(state))
    again = pretrain(small_text, folder, "--max_steps", 3, script=script)
    assert spent in (folder / "printed.txt").read_text()
    assert again["steps"] == 3 and again["bits_per_byte"] == results["bits_per_byte"]
    assert again.get("wall_seconds") == (100 if script == "research/train.py" else None)
    assert written[folder / "model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_minutes_that_are_spent_train_nothing(small_text, tmp_path):
    results = pretrain(small_text, tmp_path / "run", "--max_minutes", 0.01)
    pretrain(small_text, tmp_path / "run", "--max_minutes", 0.01)
    printed = (tmp_path / "run" / "printed.txt").read_text()
    assert f"the budget is spent after {results['steps']} steps: nothing is trained" in printed


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "latin1.csv",
            "text\nun caf\xe9\n".encode("latin-1"),
            "latin1.csv is not UTF-8: byte 0xe9 at offset 11. Conv",
        ),
        ("broken.json", b'{"text": "a"}\n{"text": \n', "broken.json cannot be read as json: "),
    ],
)
def test_pretraining_names_a_table_that_cannot_be_read(small_text, tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--train", name, "--validation"]
    command += [str(small_text), "--max_steps", "1", "--output", "run"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(message)


def test_pretraining_names_patterns_that_match_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--train", "nothing/*.txt", "--validation", "x"]
    command += ["--output", str(tmp_path), "--max_steps", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "no file matches nothing/*.txt" in result.stderr
    assert not list(tmp_path.rglob("*.bin*"))


def test_pretraining_tells_bytes_that_are_no_utf8_and_texts_that_are_too_short(small_text, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("one t\u00e9 and more".encode("latin-1"))
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--train", "latin1.txt", "--validation"]
    command += [str(small_text), "--max_steps", "1", "--output", "run"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "latin1.txt is not UTF-8 (byte 0xe9 at offset 5): taken byte by byte as it is" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("--train latin1.txt: ") and last.endswith(
        "train.bin holds 17 ids with special tokens, fewer than one window of 1024. Take longer texts and a new --output, "
        "or smaller --block_bytes"
    )
    assert (tmp_path / "run" / "data" / "train.bin").read_bytes() == b"one t\xe9 and more"


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_finetuning_lowers_bits_per_byte_and_saves_a_model(small_text, tmp_path, lora_rank):
    output = run(
        *("finetune.py", "--text", small_text, "--output", tmp_path / "out", "--max_steps", 7, "--batch_size", 2),
        *("--lora_rank", lora_rank),
        cwd=tmp_path,
    )
    before, after = (
        float(word) for word in output.split("bits per byte on")[1].split() if word.replace(".", "").isdigit()
    )
    assert after < before
    held_out = small_text.read_bytes()[-len(small_text.read_bytes()) // 10 :].decode(errors="ignore")
    sample = output.split("A sample from the saved checkpoint:\n\n")[1]
    assert sample[:30] in held_out and f"\n{sample[:30]}" in held_out  # from the start of a line
    assert output.count("eval_bits_per_byte") == 5  # before, after steps 2, 4, 6, and of the weights that are saved
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "python examples/push_to_hub.py" in output and str(tmp_path) not in json.dumps(results)
    assert (tmp_path / "out" / "loss.png").stat().st_size > 0
    assert (tmp_path / "out" / "adapter").is_dir() == bool(lora_rank)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache
    card = build_model_card(tmp_path / "out")
    assert card.data.license == "cc-by-sa-4.0" and "fine-tuned from `stlm-3m`" in card.text
    (score,) = card.data.eval_results
    assert score.metric_value == pytest.approx(after, abs=1e-3)
    assert score.dataset_name == "last tenth of small.txt"
    bits = [found["bits_per_byte"] for found in (*results["scores"].values(), *results["baselines"].values())]
    assert bits == pytest.approx([after, before], abs=1e-3)
    table = "| validation | {:.4f} |\n| validation, before fine-tuning | {:.4f} |\n".format(*bits)
    assert (
        f"windows of 1024 bytes without overlap, special tokens left out:\n\n| split | bits per byte |\n|---|---|\n{table}"
        in card.text
    )
    for sentence in (
        "- train: nine tenths of small.txt\n- validation: last tenth of small.txt\n",
        f"transformers {results['transformers']}, commit {results['commit']}\n\n![Bits per byte by step](loss.png)\n",
        "## Data\n\nThe texts of this training (nine tenths of small.txt) are not described here. ",
        "### Before that: the texts of `stlm-3m`\n\nEnglish text from public sources, 402 MB in 21 files; `stlm-10m-wide` read ",
        "The validation and test texts of `stlm-3m` and `stlm-10m-wide` are other documents of the same sources",
    ):
        assert sentence in card.text
    for dangling in ("the share its card names", "Validation and test are"):
        assert dangling not in card.text


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_finetuning_that_was_cut_goes_on(small_text, tmp_path, lora_rank):
    arguments = ["--text", str(small_text), "--output", "out", "--max_steps", "5", "--batch_size", "1"]
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), *arguments, "--lora_rank", str(lora_rank)]
    for step in (1, 2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path)
        for line in process.stdout:
            if "eval_bits_per_byte" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
        assert process.wait() == 130 and f"SIGINT: saved at step {step}; the same command goes on from here" in rest
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    made_with = {"learning_rate": "0.01" if lora_rank else "0.003", "batch_size": "1", "max_steps": "5"}
    made_with["text"] = f"{small_text.name} ({small_text.stat().st_size:,} bytes)"
    others = {"learning_rate": 0.02, "batch_size": 2, "max_steps": 6, "text": TEXT}
    told = refused("finetune.py", *command[2:], cwd=tmp_path, **others)
    assert told == f"{Path('out/begun.json')} was made with {dict(sorted(made_with.items()))}: use another folder"
    output = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert f"step 2 of 5: goes on from {Path('out') / 'checkpoint-2'}" in output and " before, " in output
    assert list((tmp_path / "out").glob("checkpoint-*")) == []  # the next run begins anew


@pytest.mark.parametrize(("lora_rank", "name"), [(0, "model.safetensors"), (4, "adapter_model.safetensors")])
def test_finetuning_that_was_cut_at_its_last_step_trains_nothing_more(small_text, tmp_path, lora_rank, name):
    arguments = ["--text", str(small_text), "--output", "out", "--max_steps", "1", "--batch_size", "1"]
    arguments += ["--lora_rank", str(lora_rank)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text('{"steps": 1, "script": "finetune.py"}')  # of a run before
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path) as cut:
        next(line for line in cut.stdout if "eval_bits_per_byte" in line)
        cut.send_signal(signal.SIGINT)
        assert "SIGINT: saved at step 1;" in cut.stdout.read()
    saved = load_file(tmp_path / "out" / "checkpoint-1" / name)
    printed = run("finetune.py", *arguments, cwd=tmp_path)
    assert "the budget is spent after 1 steps" in printed and " before, " in printed
    found = load_file(tmp_path / "out" / ("adapter" if lora_rank else ".") / name)
    assert saved.keys() <= found.keys() and all(torch.equal(found[key], value) for key, value in saved.items())
    assert "base_model" in json.loads((tmp_path / "out" / "results.json").read_text())


def test_finetuning_that_diverges_ends_in_words(small_text, tmp_path):
    tiny_model().save_pretrained(tmp_path / "tiny")
    modeling_stlm.STLMTokenizer().save_pretrained(tmp_path / "tiny")
    options = ["--text", small_text, "--checkpoint", "tiny", "--output", "out", "--learning_rate", 1e30]
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    last = result.stderr.splitlines()[-1]
    assert (
        result.returncode == 1
        and "the training diverged, " in last
        and last.endswith("Lower --learning_rate, with a new --output")
    )
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert result.stdout.count("'loss'") < 3  # of ten lines


def test_the_last_tenth_of_a_text_is_one_of_its_bytes(tmp_path):
    (tmp_path / "wide.txt").write_text(
        "東" * 3000 + "a" * 1300, encoding="utf-8"
    )  # 430 of 4,300 characters are too few
    run("finetune.py", "--text", "wide.txt", "--output", "out", "--max_steps", 1, cwd=tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_finetuning_names_what_is_not_utf8(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("one t\u00e9".encode("latin-1"))
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--text", "latin1.txt"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "latin1.txt is not UTF-8: byte 0xe9 at offset 5. Convert it first, for example with `iconv" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["latin1.txt"]


@pytest.mark.parametrize(
    ("typed", "options"),
    [(b"", []), (b"one t\xe9\n", []), (b"Hi", ["--chat"])],
    ids=["nothing", "a line of Latin-1", "no newline"],
)
def test_generation_ends_with_its_input(tmp_path, typed, options):
    command = [sys.executable, str(ROOT / "examples" / "generate.py"), "--max_new_tokens", "8", *options]
    result = subprocess.run(command, input=typed, capture_output=True, cwd=tmp_path)
    assert result.returncode == 0 and b"Traceback" not in result.stderr, result.stderr.decode()
    assert result.stdout.endswith(b"> \n") and result.stdout.count(b"> ") >= 1 + bool(typed)


def test_generation_in_the_terminal(tmp_path):
    once = run("generate.py", "--prompt", "The ", "--max_new_tokens", 20, "--temperature", 0, cwd=tmp_path)
    assert len(once.splitlines()[-1]) > 10
    beginning = run("generate.py", "--prompt", "", "--max_new_tokens", 20, "--temperature", 0, cwd=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "checkpoints" / "stlm-3m", dtype=torch.float32)
    new = model.generate(torch.tensor([[257]]), max_new_tokens=20, do_sample=False)[0, 1:]
    assert beginning.endswith(f"\n{modeling_stlm.STLMTokenizer().decode(new)}\n")
    chat = ("--chat", "--max_new_tokens", 20, "--temperature", 0)
    answers = run("generate.py", *chat, cwd=tmp_path, input="Hi\nAnd?\n\n")
    # The model may write such signs, too; the last one waits for the empty line.
    assert answers.count("> ") >= 3 and answers.endswith("> ")


def test_a_chat_model_ends_its_turns_and_is_no_base_model(tmp_path):
    output = run("chat_sft.py", "--max_steps", 2, "--output", "chat", "--prompt", "Hello?", cwd=tmp_path)
    assert "12 chats, 4 held out" in output and "> Hello?\n" in output
    before, after = map(float, re.search(r"4 chats held out: (\S+) before, (\S+) after", output).groups())
    results = json.loads((tmp_path / "chat" / "results.json").read_text())
    assert after == pytest.approx(results["scores"]["answers held out"]["bits_per_byte"], abs=6e-4) and after != before
    assert results["rows"] == {"train": 12, "held out": 4}
    assert "next: python examples/generate.py --chat --checkpoint chat" in output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    assert model.generation_config.eos_token_id == [258, 261] and model.config.use_cache
    turn = [{"role": "user", "content": "Hi"}]
    prompt = modeling_stlm.STLMTokenizer().apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    with torch.no_grad():
        model.model.embed_tokens.weight[261] = 100 * model.model(**prompt).last_hidden_state[0, -1]
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False)[0, -1] == 261
    model.save_pretrained(tmp_path / "ends")
    modeling_stlm.STLMTokenizer().save_pretrained(tmp_path / "ends")
    ends = ("--chat", "--checkpoint", "ends", "--prompt", "Hi", "--temperature", 0, "--max_new_tokens", 5)
    assert "<|im_end|>" not in run("generate.py", *ends, cwd=tmp_path)  # the mark is not for readers

    command = [sys.executable, str(ROOT / "examples" / "generate.py"), "--chat", "--max_new_tokens", "4"]
    for checkpoint in (["--checkpoint", "chat"], []):  # that one, and the shipped base model
        result = subprocess.run(
            [*command, "--prompt", "Hi", *checkpoint], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        assert ("is a base model: it was not trained on chats" in result.stderr) == (not checkpoint)

    # Nothing of this needs the Hub.
    push = ["push_to_hub.py", "--checkpoint", "chat", "--repo_id", "me/my-chat"]
    nowhere = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    nowhere |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    (tmp_path / "about.md").write_text("Chats of mine, CC0.")
    more = ("--dry_run", "--data", "about.md")
    printed = run(*push, *more, cwd=tmp_path, env=nowhere | {"TMPDIR": str(tmp_path)})
    assert (
        "license: cc-by-sa-4.0" in printed
        and "- train: chats.jsonl" in printed
        and "## Data\n\nChats of mine, CC0.\n\n### Before that: the texts of `stlm-3m`\n\nEnglish" in printed
        and str(tmp_path) not in printed[:-600]
    )
    (folder,) = tmp_path.glob("my-chat-*")
    assert {"README.md", "modeling_stlm.py", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in folder.iterdir()
    }


SHIPPED = {"stlm-3m": 8e6, "stlm-10m-wide": 22e6}  # and the largest size in bytes


@pytest.mark.parametrize("checkpoint", SHIPPED)
def test_the_shipped_checkpoints_are_complete_and_learned_english(checkpoint):
    folder = ROOT / "examples" / "checkpoints" / checkpoint
    for name in ("README.md", "config.json", "generation_config.json", "tokenizer.json", "results.json"):
        assert (folder / name).is_file(), name
    assert not list(folder.glob("*.py"))  # publishing writes the code
    assert sum(path.stat().st_size for path in folder.iterdir()) < SHIPPED[checkpoint]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.generation_config.max_new_tokens is None
    text = "The people of the city were not happy with the new government, and they said so."
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        bits = model(ids, labels=ids).loss.item() / 0.6931
    assert bits < 2.5


def test_bits_of_answers_are_those_of_what_the_assistant_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    chat_sft, model, tokenizer = (
        importlib.import_module("chat_sft"),
        tiny_model().eval(),
        modeling_stlm.STLMTokenizer(),
    )
    answers, nats, count, chats = [["Yes", "Yo é"], ["No."]], [0.0, 0.0], 0, []
    for said in answers:
        turns = [({"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}) for answer in said]
        chats.append({"messages": [message for turn in turns for message in turn]})
        ids = tokenizer.apply_chat_template(chats[-1]["messages"], return_dict=True)["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for answer in said:
            wanted = [*answer.encode(), 261]
            (start,) = [t for t in range(len(ids)) if ids[t : t + len(wanted)] == wanted]
            *said_bytes, mark = (-float(log_probs[t - 1, ids[t]]) for t in range(start, start + len(wanted)))
            nats = [nats[0] + sum(said_bytes), nats[1] + mark]
            count += len(answer.encode())
    found = chat_sft.bits_of_answers(model, tokenizer, chats, 2048)
    assert found == pytest.approx((nats[0] / math.log(2) / count, nats[1] / math.log(2) / 3), rel=1e-5)
    assert chat_sft.bits_of_answers(model, tokenizer, chats, len(ids) + 3) != pytest.approx(
        found, rel=1e-5
    )  # cuts the first
    with pytest.raises(
        SystemExit, match="no whole answer in the first 5 bytes of the chats held out: raise --max_length"
    ):
        chat_sft.bits_of_answers(model, tokenizer, chats, 5)


def test_chat_turns_follow_the_chat_template(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    generate = importlib.import_module("generate")
    tokenizer = modeling_stlm.STLMTokenizer()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    expected = tokenizer.apply_chat_template(turns, return_tensors="pt")["input_ids"]
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    for end in ([], [258], [261]):  # cut by max_new_tokens, <eos>, <|im_end|>
        answered = torch.cat([asked, torch.tensor([[*b"Yo", *end]])], dim=1)
        assert torch.equal(generate.end_turn(answered, tokenizer), expected)


@pytest.fixture
def inputs():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("inputs")
    sys.path.remove(str(ROOT / "examples"))


def test_what_is_no_checkpoint_is_said_before_anything_loads(inputs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    for value, found in (
        ("empty", "a folder without config.json"),
        ("file.txt", "a file"),
        ("none", "no such folder"),
    ):
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"{found}: expected a folder with a checkpoint, or the name"
        ):
            inputs.checkpoint(str(tmp_path / value))
    assert inputs.checkpoint(str(ROOT / "examples" / "checkpoints" / "stlm-3m"))
    assert inputs.checkpoint("owner/name") == "owner/name"


def test_texts_and_numbers_are_checked(inputs, tmp_path):
    for value, found in ((tmp_path, "a folder"), (tmp_path / "none.txt", "no such file")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{found}: expected a file"):
            inputs.text_file(str(value))
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(SystemExit, match="has 5 bytes, expected at least 1,000"):
        inputs.read_text(tmp_path / "short.txt", min_bytes=1000)
    with pytest.raises(argparse.ArgumentTypeError, match="-1 must be at least 0"):
        inputs.at_least_zero("-1")
    assert inputs.at_least_zero("0.5") == 0.5 and inputs.positive("1e-5") == 1e-5 and inputs.whole("0") == 0
    for check, values in ((inputs.positive, ("0", "-1", "nan", "inf")), (inputs.whole, ("-1",))):
        for value in values:
            with pytest.raises(argparse.ArgumentTypeError, match=f"{value} must be"):
                check(value)


def test_what_is_the_name_of_a_file_is_no_pattern(inputs, tmp_path):
    names = ["1.txt", "a [1].txt", "a 1.txt", "b*.txt", "b2.txt"]
    for name in names:
        (tmp_path / name).write_text("text")
    files = [str(tmp_path / name) for name in names]
    assert inputs.file_pattern(files[1]) == files[1]
    assert [inputs.files_of([file]) for file in files] == [[file] for file in files]
    assert inputs.files_of([tmp_path / "[b1]*.txt", tmp_path / "a [[]1].txt"]) == [
        files[0],
        files[1],
        files[3],
        files[4],
    ]
    with (
        pytest.raises(SystemExit, match=r"--train .*/a \[1\].txt: too short. Take"),
        inputs.naming("train", files[1:2], "Take"),
    ):
        raise ValueError("too short")


def test_corpora_are_of_the_files_that_match_now(inputs, tmp_path):
    pretrain, tokenizer = importlib.import_module("pretrain"), modeling_stlm.STLMTokenizer()
    corpus, patterns = tmp_path / "data" / "train.bin", [str(tmp_path / "*.txt")]
    (tmp_path / "a.txt").write_text("one")
    record = pretrain.write_once(corpus, patterns, tokenizer).with_suffix(".json")
    assert json.loads(record.read_text()) == {"files": "a.txt (3 bytes)"}
    assert pretrain.write_once(corpus, patterns, tokenizer).read_bytes().count(b"one") == 1
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a [1].jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "a [2].txt").write_text("four")
    named = pretrain.write_once(
        tmp_path / "named.bin",
        [str(tmp_path / f"a [{i}]") + end for i, end in ((1, ".jsonl"), (2, ".txt"))],
        tokenizer,
    )
    assert b"three" in named.read_bytes() and b"four" in named.read_bytes()
    (tmp_path / "a [2].txt").unlink()
    with pytest.raises(
        SystemExit, match=r"train.json was made with \{'files': 'a.txt \(3 bytes\)'\}: use another folder"
    ):
        pretrain.write_once(corpus, patterns, tokenizer)
    record.write_text(json.dumps(patterns))  # of an earlier version
    pretrain.write_once(corpus, patterns, tokenizer)
    assert json.loads(record.read_text()) == patterns
    for other, shares in ([str(tmp_path / "a.txt")], {}), (patterns, {"noise": 0.5}):
        with pytest.raises(SystemExit, match=r"train.json was made with \['.*\*.txt'\]: use another folder"):
            pretrain.write_once(corpus, other, tokenizer, **shares)


def test_records_say_what_differs(inputs, tmp_path):
    run_folder = importlib.import_module("run_folder")
    record = tmp_path / "new" / "begun.json"
    with pytest.raises(SystemExit, match="new does not say what it was made with: use another folder"):
        run_folder.begin(record, {"rate": 1}, goes_on=True)
    run_folder.begin(record, {f"rate {i}": 1 for i in range(7)}, goes_on=False)
    run_folder.begin(record, {f"rate {i}": 1 for i in range(7)}, goes_on=True)
    with pytest.raises(SystemExit, match=r"begun.json was made with \{'rate 0': 1, .*'rate 4': 1\} and 2 more: use"):
        run_folder.begin(record, {}, goes_on=True)
    run_folder.begin(record, {}, goes_on=False)  # a new run
    assert json.loads(record.read_text()) == {}
    (tmp_path / "a [1].txt").write_text("text")
    assert run_folder.names_and_sizes([tmp_path / "a [1].txt", f"{tmp_path}/*.txt"]) == ", ".join(
        ["a [1].txt (4 bytes)"] * 2
    )


def test_fields_need_no_quotes(inputs):
    pretrain = importlib.import_module("pretrain")
    config = pretrain.load_config(
        "stlm-3m", ["patching=fixed", "patch_bytes=5", 'layer_sharing="none"', "num_unique_trunk_layers=null"]
    )
    assert (config.patching, config.patch_bytes, config.layer_sharing) == ("fixed", 5, "none")
