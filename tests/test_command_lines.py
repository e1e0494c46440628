# SPDX-License-Identifier: Apache-2.0
"""The command lines of the examples: help at once, mistakes in words before anything loads, quiet ends."""

import ast
import gzip
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[1] / "examples"
MODULES = ("alterations", "inputs", "noise", "rows", "run_folder")  # what the scripts share
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.stem not in MODULES)
assert len(SCRIPTS) >= 14
SHIPPED = EXAMPLES / "checkpoints" / "stlm-3m"
HEAVY = ["datasets", "evaluate", "huggingface_hub", "matplotlib", "modeling_stlm", "numpy", "torch", "transformers"]

# Runs a script as its user does, and prints what it imported.
RUN = f"""
import runpy, sys
sys.path.insert(0, {str(EXAMPLES)!r})
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print("imported:", sorted(set(sys.modules) & set({HEAVY!r})))
"""


def run(script: str, *arguments, cwd: Path, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN, str(EXAMPLES / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, **options)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_slow_and_explains_every_option(script, tmp_path):
    result = run(script, "--help", cwd=tmp_path, env=os.environ | {"COLUMNS": "500"})
    assert result.returncode == 0 and result.stdout.endswith("imported: []\n"), result.stdout[-300:] + result.stderr
    lines = result.stdout.splitlines()
    options = [number for number, line in enumerate(lines) if line.startswith("  -")]
    # What an option means follows in its line, or alone in the next.
    bare = [lines[i] for i in options if "  " not in lines[i].strip() and not lines[i + 1].startswith(" " * 8)]
    assert len(options) > 0 and bare == []
    assert not any(f"(default: {trivial})" in result.stdout for trivial in (None, False, []))


FOLDERS = {path.stem: path.parent for folder in (EXAMPLES, EXAMPLES / "research") for path in folder.glob("*.py")}


def imported_too_early(path: Path, on_path: list[Path], seen: set[str]) -> list[str]:
    """Modules of the examples that `path`, or what it imports, asks for before their folder is in `sys.path`."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("sys.path.append("):
            on_path.append(EXAMPLES)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in set(names) & FOLDERS.keys() - seen:
            seen.add(name)
            if FOLDERS[name] in on_path:
                found += imported_too_early(FOLDERS[name] / f"{name}.py", on_path, seen)
            else:
                found.append(f"{path.name}, line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("**/*.py")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_scripts_find_what_they_import(path):
    # Read and not run: with torch, `--help` of those of research takes three minutes.
    assert imported_too_early(path, [path.parent], {path.stem}) == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_commands_of_several_lines_are_shown_as_they_are_typed(path):
    text = path.read_text(encoding="utf-8")
    start = re.search(r'^(r?)"""', text, re.MULTILINE)
    shown = ast.get_docstring(ast.parse(text), clean=False)
    assert start[1] == "r" or "\\" not in text[start.end() : text.index('"""', start.end())]
    for line, following in itertools.pairwise(shown.splitlines()):
        assert not line.endswith("\\") or following.startswith("     "), f"{line!r} goes on with {following!r}"


def test_help_shows_the_defaults_that_say_something(tmp_path):
    shown = run("finetune.py", "--help", cwd=tmp_path, env=os.environ | {"COLUMNS": "500"}).stdout
    assert "of training (default: 150)" in shown and "(default: runs/finetuned)" in shown


CHECKPOINT = ["--checkpoint", str(SHIPPED)]
MISTAKES = {
    "no such checkpoint": (["generate.py", "--checkpoint", "stlm-4m"], "stlm-4m is no such folder"),
    "an empty folder": (["finetune.py", "--checkpoint", "folder"], "folder is a folder without config.json"),
    "a file": (["export_onnx.py", "--output", "x", "--checkpoint", "latin1.txt"], "latin1.txt is a file"),
    "an adapter": (["generate.py", "--checkpoint", "adapter"], "adapter is an adapter of peft, not merged"),
    "no such text": (["finetune.py", "--text", "none.txt"], "none.txt is no such file"),
    "a folder as text": (["distill.py", "--text", "folder"], "folder is a folder: expected a file"),
    "no such teacher": (["distill.py", "--teacher", "stlm-4m"], "argument --teacher: stlm-4m is no such folder"),
    "no such preset": (
        ["pretrain.py", "--model", "stlm-7m"],
        "argument --model: stlm-7m is no preset (stlm-100m, stlm-10m",
    ),
    "no such preset of a student": (
        ["distill.py", "--student", "stlm-7m"],
        "stlm-7m is no preset: expected stlm-100m",
    ),
    "no such field": (["pretrain.py", "--set", "foo=3"], "argument --set: foo is not a field of STLMConfig"),
    "no such field of a smaller one": (["inherit.py", "--set", "foo=3"], "argument --set: foo is not a field of"),
    "no value": (["pretrain.py", "--set", "patching"], "argument --set: patching: expected FIELD=VALUE"),
    "summaries beside weights": (
        ["summarize.py", "--output", str(SHIPPED)],
        f"argument --output: {SHIPPED} holds a STLMForCausalLM, of another job: use another folder",
    ),
    "graphs beside weights": (
        ["export_onnx.py", "--output", str(SHIPPED)],
        f"argument --output: {SHIPPED} holds the weights of a model: use another folder",
    ),
    "no match": (["pretrain.py", "--train", "none/*.txt"], "no file matches none/*.txt"),
    "a folder matches": (
        ["inherit.py", "--train", "fol*"],
        "folder is a folder: expected files, such as 'folder/*.txt'",
    ),
    "a text to train on alone": (["inherit.py", "--train", "latin1.txt"], "give --train and --validation, or neither"),
    "no file to score": (["score.py", str(SHIPPED), "none.txt"], "no file matches none.txt"),
    "no table": (["committee.py", "--text", "latin1.txt", "--train", "no.csv"], "no.csv is no such file"),
    "no task": (["evaluate_lm.py", "--blimp", "none.jsonl"], "none.jsonl is no such file"),
    "nothing to evaluate": (["evaluate_lm.py"], "give at least one of --blimp, --hellaswag"),
    "no states to compare": (
        ["embed.py", "--checkpoint", str(SHIPPED)],
        "stlm-3m has no modules.json: expected a folder",
    ),
    "no teacher of sentences": (["encoder.py", "--teacher", str(SHIPPED)], "stlm-3m has no modules.json"),
    "nothing said": (["generate.py", "--chat", "--prompt", ""], "--prompt is empty: with --chat it is what the user"),
    "cold": (["generate.py", "--temperature", "-1"], "-1 must be at least 0"),
    "no bytes": (["generate.py", "--max_new_tokens", "0"], "0 must be at least 1"),
    "more than all": (["pretrain.py", "--decay", "1.5"], "argument --decay: 1.5 must be between 0 and 1"),
    "no classes": (["classify.py", "--train", "none.csv"], "none.csv is no such file"),
    "no spans": (["ner.py", "--train", "latin1.txt"], "--train and --test come together"),
    "no texts": (["embed.py", "--texts", "none.txt"], "none.txt is no such file"),
    "nothing to learn from": (["encoder.py", "--text", "none*"], "no file matches none*"),
    "no languages": (["identify.py", "--train", "none.jsonl"], "none.jsonl is no such file"),
    "no chats": (["chat_sft.py", "--train", "none.jsonl"], "none.jsonl is no such file"),
    "no folder to write to": (
        ["finetune.py", "--output", "latin1.txt/run"],
        "latin1.txt is a file: expected a folder",
    ),
    "no dialogues": (["summarize.py", "--train", "folder"], "folder is a folder: expected a file"),
    "no rows": (["self_play.py", "--test_rows", "0"], "0 must be at least 1"),
    "nothing to serve": (["serve.py", "stlm-4m", "--port", "1"], "stlm-4m is no such folder"),
    "no owner": (["push_to_hub.py", *CHECKPOINT, "--repo_id", "mine"], "'mine': expected YOUR_NAME/MODEL"),
    "a Hub id to publish": (["push_to_hub.py", "--checkpoint", "me/x", "--repo_id", "a/b"], "me/x is no folder"),
    "a card to edit": (
        ["push_to_hub.py", *CHECKPOINT, "--repo_id", "a/b", "--licence", "mit"],
        "has a card: change its README.md",
    ),
    "of unknown origin": (
        ["push_to_hub.py", "--checkpoint", "bare", "--repo_id", "a/b", "--licence", "mit"],
        "bare does not say what it was made from: give --base_model",
    ),
    "no such base": (
        ["push_to_hub.py", "--checkpoint", "bare", "--repo_id", "a/b", "--base_model", "stlm-4m"],
        "stlm-4m is no such folder",
    ),
}


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("folder", "adapter", "bare"):
        (folder / name).mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "bare" / "config.json").write_text("{}")
    (folder / "latin1.txt").write_bytes("one t\u00e9".encode("latin-1"))
    return folder


@pytest.mark.parametrize(("command", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_before_anything_is_imported(command, message, mistakes):
    result = run(*command, cwd=mistakes)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
    assert result.stdout == "imported: []\n"


CAUSAL = "chat_sft evaluate_lm export_onnx finetune generate inherit score self_play serve summarize".split()


@pytest.mark.parametrize("name", CAUSAL)
def test_scripts_that_need_next_bytes_refuse_an_encoder(name, tmp_path):
    option = [] if name in ("score", "serve") else ["--checkpoint"]
    result = run(f"{name}.py", *option, f"{SHIPPED}-encoder", cwd=tmp_path)
    assert result.returncode == 2 and "stlm-3m-encoder is an encoder (is_causal=False): expected a" in result.stderr
    assert result.stdout == "imported: []\n"


SMALL = {  # numbers that make no sense: option and value, by script
    "chat_sft.py": "max_steps 0, batch_size 0, max_length 0, learning_rate 0, seed -1",
    "classify.py": "epochs 0, epochs -1, adversarial_epsilon -1, learning_rate 0, batch_size 0, max_bytes 0, seed -1",
    "committee.py": "deep 0, shallow 0, members 0, articles -1, rows 0, max_bytes 0, pretraining_epochs 0, "
    "finetuning_epochs -1, batch_size 0, seeds 0",
    "distill.py": "windows 0, block_bytes 0, max_steps 0, batch_size 0, teacher_weight 1.5, muon_lr 0, adamw_lr 0, seed -1",
    "encoder.py": "passages 0, max_bytes 0, max_minutes 0, batch_size 0, muon_lr 0, adamw_lr -1, seed -1",
    "evaluate_lm.py": "limit 0, batch_size 0",
    "export_onnx.py": "max_length 0, num_bytes 0",
    "finetune.py": "max_steps 0, batch_size 0, learning_rate 0, lora_rank -1, seed -1",
    "generate.py": "max_new_tokens 0, temperature -1, temperature nan",
    "identify.py": "max_minutes 0, batch_size 0, muon_lr 0, adamw_lr 0, seed -1",
    "inherit.py": "data_batches -1, max_steps 0, batch_size 0, muon_lr 0, adamw_lr 0, seed -1",
    "ner.py": "epochs 0, adversarial_epsilon inf, word_noise 1.5, learning_rate -1, batch_size 0, max_bytes 0, seed -1",
    "pretrain.py": "max_minutes 0, max_steps 0, max_bytes 0, block_bytes 0, batch_size 0, muon_lr 0, adamw_lr -1, "
    "weight_decay -1, workers -1, eval_steps 0, seed -1",
    "self_play.py": "num_rounds 0, max_steps 0, learning_rate 0, beta 0",
    "summarize.py": "train_rows 0, test_rows 0, text_bytes 0, summary_bytes 0, batch_size 0, seed -1, max_steps 0, "
    "learning_rate 0, lora_rank 0",
}


@pytest.mark.parametrize("script", SMALL)
def test_numbers_that_make_no_sense_are_refused(script, tmp_path):
    for option, value in (words.split() for words in SMALL[script].split(", ")):
        result = run(script, f"--{option}={value}", cwd=tmp_path)
        assert result.returncode == 2, (option, value)
        assert f"error: argument --{option}: {value} must be " in result.stderr.splitlines()[-1]


EXTRAS = {  # options to run without a package of an extra, by script
    "chat_sft.py": ("", "trl", "train"),
    "classify.py": ("", "sklearn", "train"),
    "committee.py": ("--text {} --train {} --test {} --output run", "datasets", "train"),
    "embed.py": ("", "sentence_transformers", "train"),
    "encoder.py": (f"--text {{}} --teacher {SHIPPED}-encoder --output run", "sentence_transformers", "train"),
    "distill.py": ("", "matplotlib", "train"),
    "evaluate_lm.py": ("--blimp {}", "lm_eval", "eval"),
    "export_onnx.py": ("--output run", "onnxruntime", "export"),
    "finetune.py": ("", "peft", "train"),
    "identify.py": ("--train {}", "accelerate", "train"),
    "inherit.py": ("", "datasets", "train"),
    "ner.py": ("", "accelerate", "train"),
    "pretrain.py": ("--train {} --validation {} --max_steps 1 --output run", "matplotlib", "train"),
    "score.py": ("{} {}", "datasets", "train"),
    "self_play.py": ("", "trl", "train"),
    "serve.py": ("{}", "fastapi", "serve"),
    "summarize.py": ("", "peft", "train"),
}
assert {*EXTRAS, "generate.py", "push_to_hub.py"} == set(SCRIPTS)  # these two need none


@pytest.mark.parametrize("script", EXTRAS)
def test_an_extra_that_is_missing_is_told_before_anything_is_imported(script, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "a {i}", "lang": "l{i % 2}"}}\n' for i in range(4)))
    options, package, extra = EXTRAS[script]
    files = [SHIPPED if script in ("score.py", "serve.py") else "rows.jsonl", "rows.jsonl", "rows.jsonl"]
    without = f"import sys; sys.modules[{package!r}] = None; " + RUN.strip()
    command = [sys.executable, "-c", without, str(EXAMPLES / script), *options.format(*files).split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    message = f"{script} needs {package}: pip install -c constraints.txt -e '.[{extra}]'\n"
    assert result.returncode == 1 and result.stderr == message
    assert result.stdout.replace(repr(package), "") == "imported: []\n"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_every_number_is_checked():
    for path in EXAMPLES.glob("**/*.py"):
        assert not re.search(r"type=(int|float)\b", path.read_text(encoding="utf-8")), path


def test_every_script_has_a_mistake_to_tell():
    assert {command[0] for command, _ in MISTAKES.values()} == set(SCRIPTS)


ROWS_OF_ANOTHER_KIND = {
    "classify.py": ("--train {}", "expected `text` and `label`"),
    "ner.py": ("--train {} --test {}", "expected `text`, not empty, and `spans`"),
    "embed.py": ("--train {} --test {}", "expected `text` and `label`"),
    "chat_sft.py": ("--train {}", "expected `messages`, each with role and content"),
    "self_play.py": ("--train {}", "expected `dialogue` and `summary`"),
    "summarize.py": ("--train {}", "expected `dialogue` and `summary`"),
}


@pytest.mark.parametrize("script", ROWS_OF_ANOTHER_KIND)
def test_rows_of_another_kind_are_told_before_anything_is_imported(script, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"sentence": "one"}\n{"sentence": "two"}\n')
    options, message = ROWS_OF_ANOTHER_KIND[script]
    result = run(script, *options.format("rows.jsonl", "rows.jsonl").split(), cwd=tmp_path)
    assert result.returncode == 1 and message in result.stderr.splitlines()[-1]
    assert result.stdout == "imported: []\n"


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("inputs")


def test_json_lines_are_read_or_told_by_file_and_line(inputs, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "Zo\u00eb\u2028"}\n', encoding="utf-8")
    assert inputs.read_json_lines(path) == [{"a": 1}, {"a": "Zo\u00eb\u2028"}]
    for text, words in (
        (b'{"a": 1}\n{"a"\n', "rows.jsonl, line 2: no JSON"),
        (b'{"a": 1}\n[2]\n', "rows.jsonl, line 2: a list, expected one object per line"),
        (b"", "has 0 rows, expected at least 1"),
        (b'{"a": "\xe9"}', "not UTF-8: byte 0xe9 at offset 7"),
    ):
        path.write_bytes(text)
        with pytest.raises(SystemExit, match=words):
            inputs.read_json_lines(path)


def test_packed_files_are_unpacked_or_told_to_be_broken(inputs, tmp_path):
    path, packed = tmp_path / "text.txt.gz", gzip.compress("\ufeffZo\u00eb".encode(), mtime=0)
    path.write_bytes(packed)
    assert inputs.read_text(path) == "Zo\u00eb"
    for data in (b"plain text", packed[:-9], packed[:12] + b"\xff\xff" + packed[14:]):
        path.write_bytes(data)
        with pytest.raises(SystemExit, match=r"text\.txt\.gz cannot be unpacked"):
            inputs.read_text(path)


@pytest.mark.parametrize(
    ("body", "status", "printed"),
    [
        ("while True: print('line')", 141, "line"),
        ("print('once'); raise KeyboardInterrupt", 130, "once"),
        ("print('all')", 0, "all"),
        ("print('mine'); raise ValueError('mine')", 1, "mine"),
    ],
    ids=["the reader leaves", "Ctrl-C", "nothing", "an error"],
)
def test_scripts_end_quietly_but_for_errors(body, status, printed):
    code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\nfrom inputs import quiet_exit\nwith quiet_exit():\n    {body}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == printed
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == status
    assert ("ValueError: mine" in errors) if status == 1 else errors == ""


def test_every_script_ends_quietly():
    for script in SCRIPTS:
        if script != "serve.py":  # the library ends it
            assert re.search(r"with quiet_exit\(\):\n        main\(args.*\)\n$", (EXAMPLES / script).read_text()), (
                script
            )


def test_chats_are_checked(inputs, tmp_path, monkeypatch):
    chat_sft = importlib.import_module("chat_sft")
    path = tmp_path / "chats.jsonl"
    user, assistant = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    path.write_text(json.dumps({"messages": [user, assistant], "id": 3}))
    assert chat_sft.read_chats(path) == [{"messages": [user, assistant]}]
    with pytest.raises(SystemExit, match="found 1 chat, expected at least 2: a tenth is held out"):
        chat_sft.hold_out(chat_sft.read_chats(path), 1)
    for count, held_out in ((2, 1), (7, 3), (16, 4), (39, 4), (200, 20)):
        train, other = chat_sft.hold_out(list(range(count)), 1)
        assert len(other) == held_out and sorted(train + other) == list(range(count))
    for row, words in (
        ({"text": "Hi"}, r"row 1 has fields \['text'\]: expected `messages`"),
        ({"messages": []}, r"row 1 has messages \[\]: expected"),
        ({"messages": 5}, "row 1 has messages 5: expected"),
        ({"messages": ["Hi"]}, r"row 1 has messages \['Hi'\]: expected"),
        ({"messages": [user]}, "row 1: no message has the role assistant"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(SystemExit, match=words):
            chat_sft.read_chats(path)
