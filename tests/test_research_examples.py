# SPDX-License-Identifier: Apache-2.0
"""The examples behind the numbers: noise, budgets, ablations, the report."""

import gzip
import importlib
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modeling_stlm
from modeling_stlm import STLMTokenizer
from modeling_stlm.training.corpus import PackedWindows, write_corpus

from .test_examples import ROOT, TEXT, pretrain, run
from .test_examples import small_text as small_text  # a fixture
from .test_repeats import draft_by_search
from .tiny import TEXT as SAMPLE
from .tiny import ids_of, tiny_model


sys.path.insert(0, str(ROOT / "examples"))
EXAMPLES = ("ablate", "controls", "costs", "drafts", "noise", "scoring")
ablate, controls, costs, drafts, noise, scoring = (importlib.import_module(name) for name in EXAMPLES)


def json_lines(path: Path, rows: list[dict]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


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
    scored = scoring.bits_of_documents(model, tokenizer, documents, block_bytes=16)
    assert scored["bytes"] == count
    assert scored["bits_per_byte"] == pytest.approx(nats / math.log(2) / count, rel=1e-5)


def test_bits_of_a_checkpoint_in_one_command(tmp_path):
    model, tokenizer = tiny_model(), STLMTokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = TEXT.read_text(encoding="utf-8")[:5000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    printed = run("scoring.py", tmp_path / "model", tmp_path / "text.txt", cwd=tmp_path).splitlines()[-1]
    assert json.loads(printed) == pytest.approx(scoring.bits_of_documents(model, tokenizer, [text]), rel=1e-6)


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
        scoring.token_bytes(words)


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


def test_budgets_in_bytes_and_operations(small_text, tmp_path):
    by_bytes = pretrain(small_text, tmp_path / "bytes", "--max_bytes", 128 * 2 * 5, "--eval_at_end")
    assert by_bytes["steps"] == 5 and by_bytes["bytes_seen"] == 128 * 2 * 5
    flops = by_bytes["training_flops"]
    assert flops == pytest.approx(3 * by_bytes["flops_per_byte"] * by_bytes["bytes_seen"], rel=1e-6)
    changes = ["--set", "num_trunk_layers=8", 'layer_sharing="middle"']
    deeper = pretrain(small_text, tmp_path / "deep", "--max_flops", 2 * flops, "--eval_at_end", *changes)
    assert deeper["config"]["num_trunk_layers"] == 8 and deeper["stored_parameters"] == by_bytes["stored_parameters"]
    assert deeper["flops_per_byte"] > by_bytes["flops_per_byte"]
    assert abs(deeper["training_flops"] / (2 * flops) - 1) < 0.1


@pytest.mark.parametrize("patching", ["vocabulary", "entropy", "learned"])
def test_rules_learn_from_the_training_texts(patching, small_text, tmp_path):
    changes = ["--set", f'patching="{patching}"', "entropy_rows=4096", "--vocab_size", 400]
    steps = ["--curriculum_steps", 2] if patching == "learned" else []
    results = pretrain(small_text, tmp_path / "run", "--max_steps", 3, "--eval_at_end", *changes, *steps)
    config = modeling_stlm.STLMConfig.from_pretrained(tmp_path / "run")
    assert len(config.pieces) == (400 if patching == "vocabulary" else 0)
    model = modeling_stlm.STLMForCausalLM.from_pretrained(tmp_path / "run")
    if patching == "entropy":
        assert 16 < model.model.entropy_table.float().mean() < 256
    assert 1 < results["bytes_per_patch_or_token"] < 16


def test_fields_that_do_not_exist_are_named(small_text, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "pretrain.py"), "--train", str(small_text), "--max_steps", "1"]
    command += ["--validation", str(small_text), "--output", str(tmp_path), "--set", "depth=3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "--set ['depth']: not a field of STLMConfig" in result.stderr


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


def test_ablations_leave_a_table_and_are_not_repeated(small_text, tmp_path):
    tiny = {"trunk_intermediate_size": 8, "intermediate_size": 8}
    listed = {
        "arguments": {"max_bytes": 1024, "block_bytes": 128, "batch_size": 2},
        "runs": {
            "base": {"set": tiny, "seeds": [2]},
            "fixed": {"set": tiny | {"patching": "fixed"}},
            "llama-bpe": {"model": "llama-bpe", "vocab_size": 300},
        },
    }
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(listed))
    arguments = ["--train", small_text, "--validation", small_text, "--output", tmp_path / "runs"]
    first = run("ablate.py", path, *arguments, "--only", "base", "fixed", cwd=tmp_path)
    assert "2 runs, 2 to do" in first
    assert {file.stem for file in (tmp_path / "tiny").glob("*.json")} == {"base-s2", "fixed-s1"}
    again = run("ablate.py", path, *arguments, cwd=tmp_path)
    assert "3 runs, 1 to do" in again
    table = (tmp_path / "tiny" / "README.md").read_text()
    results = json.loads((tmp_path / "tiny" / "fixed-s1.json").read_text())
    assert f"| fixed-s1 | {results['bits_per_byte']['validation']:.4f} |" in table and "| llama-bpe-s1 |" in table
    assert (tmp_path / "tiny" / "plots.png").stat().st_size > 10_000
    assert results["config"]["patching"] == "fixed" and results["arguments"]["seed"] == "1"
    # A run of the same name with other arguments is no reason to believe its results, nor to go on where it was.
    listed["runs"]["fixed"]["set"]["patch_bytes"] = 3
    path.write_text(json.dumps(listed))
    command = [sys.executable, ROOT / "examples" / "ablate.py", path, *arguments]
    for file in ("tiny/fixed-s1.json", "runs/fixed-s1"):
        refused = subprocess.run([str(word) for word in command], capture_output=True, text=True)
        assert refused.returncode != 0
        assert f"{tmp_path / file} holds a run with other arguments" in refused.stderr
        (tmp_path / "tiny" / "fixed-s1.json").unlink(missing_ok=True)


def test_the_report_measures_and_writes(tmp_path):
    model = tiny_model()
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(tmp_path / "model")
    STLMTokenizer().save_pretrained(tmp_path / "model")
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
        *("report.py", "measure", tmp_path / "model", "--name", "tiny", "--validation", held_out, "--test", held_out),
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
    assert all(sample["text"].startswith(sample["prompt"]) for sample in measured["samples"])
    run("report.py", "write", "--results", tmp_path / "results", "--output", tmp_path / "RESULTS.md", cwd=tmp_path)
    written = (tmp_path / "RESULTS.md").read_text()
    assert f"| two | {measured['held_out']['test']['two']['bits_per_byte']:.3f} |" in written
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
    last = run("benchmark.py", *options, "stlm-onnx-int8", *only, cwd=tmp_path).splitlines()[-1]
    table = json.loads(last)["table"]
    for name, row in table.items():
        for measure in ("generate bytes/s, batch 16", *(["first byte ms, 3 kB"] if "onnx" not in name else [])):
            assert 0 < row[measure]["low"] <= row[measure]["median"] <= row[measure]["high"] < 1e5
    assert "first byte ms, 3 kB" not in table["stlm-onnx-int8"]
    assert table["stlm"]["bytes a unit"] > 3 and abs(table["llama-bpe"]["stored"] / table["stlm"]["stored"] - 1) < 0.02

    sweep = run("benchmark.py", *options, "--sweep", "--only", "context 1024", "--plot", "plot.png", cwd=tmp_path)
    assert json.loads(sweep.splitlines()[-1])["table"]["stlm"]["context 1024"]["median"] > 0
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_start_up_and_memory_are_measured(tmp_path):
    output = run("startup.py", "--preset", "stlm-3m", "--repeats", 1, "--new_bytes", 300, cwd=tmp_path)
    results = json.loads(output.splitlines()[-1])["results"]
    (ours,), (theirs,) = results["stlm"], results["llama"]
    assert ours["import CPU s"] < 2 * theirs["import CPU s"]
    assert (
        11 < ours["weights and cache MB"] < 20 and 2 < ours["peak MB"] < 40
    )  # pages of weights come when they are read


def test_passes_over_drafts_are_counted():
    # Byte 0 alone, bytes 1 to 3, bytes 4 and 5; and a row whose last drafts reach behind its end.
    assert drafts.bytes_a_pass(torch.tensor([[0, 2, 9, 9, 1, 9]])) == 2
    assert drafts.bytes_a_pass(torch.tensor([[1, 9, 3], [0, 0, 0]])) == (2 + 4 + 3) / 5


def counted_by_a_loop(layer, model, text: list[int], drafted: int) -> dict[str, list[int]]:
    """For each drafter, how many of its drafts are right behind each byte from `drafts.PROMPT` on."""
    outputs = model(torch.tensor([text]), output_boundaries=True)
    hidden, table = model.model(torch.tensor([text])).last_hidden_state[0], model.get_input_embeddings().weight
    likeliest, ends = outputs.logits[0].argmax(-1).tolist(), outputs.boundaries[0].tolist()
    names = ("layer", "layer, inside a patch", "repeats", "model, inside a patch")
    counts = {name: [] for name in names}
    for t in range(drafts.PROMPT, len(text) - drafted - 1):
        state, byte, own = hidden[t], text[t + 1], []
        for _ in range(drafted):
            state = layer(state, table[byte])
            byte = int((table @ layer.norm(state)).argmax())
            own.append(byte)
        repeats = draft_by_search(text[: t + 2], 48, len(text) + 1)
        own_text = [likeliest[i - 1] for i in range(t + 2, t + 2 + drafted)]
        proposals = (own, False), (own, True), (repeats, False), (own_text, True)
        for name, (proposal, inside) in zip(names, proposals):
            agreed = 0
            for i, byte in enumerate(proposal, t + 2):
                if byte != text[i] or (inside and ends[i]):
                    break
                agreed += 1
            counts[name].append(agreed)
    return counts


def test_drafters_agree_with_a_loop_over_the_text(tmp_path):
    torch.manual_seed(0)
    model, layer, drafted = tiny_model(use_cache=True).requires_grad_(False), drafts.DraftLayer(16, 64), 3
    corpus = write_corpus(tmp_path / "corpus", [SAMPLE] * 30, STLMTokenizer())
    assert drafts.train(layer, model, PackedWindows(corpus, STLMTokenizer(), 256), drafted, 0.15) > 3
    repeated = (ids_of(SAMPLE) * 4)[:500]
    prompt = torch.tensor([repeated[: drafts.PROMPT]])
    written = model.generate(prompt, max_new_tokens=200, do_sample=False, eos_token_id=None)[0].tolist()
    found = {}
    for kind, text in {"repeated": repeated, "written": written}.items():
        found[kind] = drafts.measure(layer, model, torch.tensor([text]), drafted, drafts.PROMPT)
        for name, agreed in counted_by_a_loop(layer, model, text, drafted).items():
            assert found[kind][name] == drafts.bytes_a_pass(torch.tensor([agreed])), (kind, name)
    # Every drafter was right now and then, and the end of a patch stopped one.
    assert found["repeated"]["repeats"] > 3 and found["written"]["model, inside a patch"] > 1.5
    assert found["repeated"]["layer"] > found["repeated"]["layer, inside a patch"] > 1.1


@pytest.mark.slow
def test_drafts_of_a_checkpoint_in_one_command(tmp_path):
    model = tiny_model(use_cache=True)
    model.generation_config.update(do_sample=True, temperature=0.1, top_p=0.5)  # which the texts must not follow
    model.save_pretrained(tmp_path / "model")
    STLMTokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.txt").write_text(SAMPLE * 60)
    rows = [{"text": SAMPLE * 30, "source": "a/b"}, {"text": SAMPLE * 20, "source": "c"}, {"text": "-", "source": "d"}]
    validation = json_lines(tmp_path / "validation.jsonl.gz", rows)
    command = ["model", "--train", "train.txt", "--validation", validation, "--minutes", "0.02", "--rows", "2"]
    output = run("drafts.py", *command, cwd=tmp_path)
    found = json.loads(output.splitlines()[-1])
    assert set(found["results"]) == {
        *("a", "c", "twice, edited", "written greedily", "sampled", "sampled, temperature 0.7")
    }
    assert found["results"]["a"]["repeats"] > 9  # the text repeats itself
    assert found["results"]["twice, edited"]["repeats"] > 4
    assert 1 <= found["results"]["sampled"]["repeats"] < 1.5
    model_agrees = {kind: row["model, inside a patch"] for kind, row in found["results"].items()}
    # At the temperature of the checkpoint most bytes would be the likeliest ones.
    assert max(model_agrees["sampled"], model_agrees["sampled, temperature 0.7"]) < 1.5
    assert model_agrees["written greedily"] > 2
    assert not any(found["differ"].values())
    assert all(value > 0 for row in (found["pass"], *found["milliseconds"].values()) for value in row.values())


def test_every_tenth_word_is_edited():
    text = "One two three four five six seven eight nine ten, eleven Zoë. "
    assert bytes(drafts.edited(torch.tensor(ids_of(text))).tolist()).decode() == text + text.replace("ten,", "TEN,")
