# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness gives the scores of an obvious loop: one text at a time, sums of log probabilities of bytes."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_stlm import STLMTokenizer

from .tiny import MIXERS, TEXT, tiny_model


ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "checkpoints" / "stlm-3m"
BOS = 257
ATOL = 1e-4  # of sums over up to 150 bytes; measured below 2e-5

PAIRS = {
    ("agreement", "morphology"): [
        ("The children play in the garden.", "The children plays in the garden."),
        ("She has seen the house.", "She have seen the house."),
        ("These books are old.", "These book are old."),
        ("He was in the city.", "He were in the city."),
        ("Zoë's cats sleep.", "Zoë's cats sleeps."),
        ("This is a very old house near the river.", "This are a very old house near the river."),
        ("My friends were happy.", "My friends was happy."),
        ("A dog runs.", "A dog run."),
    ],
    ("order", "syntax"): [
        ("They went to the market.", "They to went the market."),
        ("I do not know what he said.", "I do know not what said he."),
        ("The first of the books is here.", "The first the of books is here."),
        ("It is one of the most important things.", "It is of one the most important things."),
        ("What did you see?", "What you did see?"),
        ("She gave him the letter yesterday.", "She him gave the letter yesterday."),
        ("東京 is a city.", "東京 is city a."),
        ("No one came.", "One no came."),
    ],
    ("npi", "syntax/semantics"): [
        ("Nobody has ever been there.", "Somebody has ever been there."),
        ("He does not have any money.", "He does have any money."),
        ("No man saw anyone.", "A man saw anyone."),
        ("I have never seen any of them.", "I have often seen any of them."),
    ],
    ("negation", "syntax_semantics"): [
        ("It is not at all good.", "It is at all good."),
        ("We did not see him either.", "We did see him either."),
        ("She hardly ever sleeps.", "She soundly ever sleeps."),
        ("Not until then did he go.", "Not until then he did go."),
    ],
}
CHOICES = [
    ("Cooking", "A man cuts an onion.", "he then", ["puts it in a pan.", "flies.", "is the river of it."], 0),
    ("Rain", "It starts to rain.", "the woman", ["drinks the moon.", "opens an umbrella."], 1),
    ("Reading [title] Books", "The girl takes a book from the shelf.", "she", ["reads  it.", "of the.", "x"], 0),
    ("Music", "Zoë sits down at the piano.", "she", ["[step] plays a song…", "eats the keys…"], 0),
    ("Sport", "The players run onto the field.", "the crowd", ["cheers loudly for them.", "?", "sells it"], 0),
    ("Travel", "We came to 東京 in the spring.", "then we", ["was.", "went to see the old part of the city."], 1),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    pairs = [
        {"sentence_good": good, "sentence_bad": bad, "field": field, "UID": uid, "pairID": str(number)}
        for (uid, field), rows in PAIRS.items()
        for number, (good, bad) in enumerate(rows)
    ]
    names = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    paths = {}
    for task, rows in (("blimp_file", pairs), ("hellaswag_file", [dict(zip(names, row)) for row in CHOICES])):
        paths[task] = str(folder / f"{task}.jsonl")
        Path(paths[task]).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return paths


@pytest.fixture(scope="module", params=["conv", "both", "shipped"])
def checkpoint(request, tmp_path_factory) -> str:
    if request.param == "shipped":
        return str(SHIPPED)
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(**MIXERS[request.param]).save_pretrained(folder)
    STLMTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def evaluate_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("evaluate_lm")


def harness(checkpoint: str, **options) -> HFLM:
    return HFLM(pretrained=checkpoint, device="cpu", dtype="float32", **options)


@torch.no_grad()
def log_probability(model, context: list[int], continuation: list[int]) -> float:
    log_probabilities = model(torch.tensor([context + continuation]), use_cache=False).logits[0].log_softmax(-1)
    return sum(log_probabilities[len(context) - 1 + i, byte].item() for i, byte in enumerate(continuation))


def without_brackets(text: str) -> str:
    """HellaSwag's texts as everybody scores them."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def expected_scores(model, add_bos_token: bool):
    """Log probabilities by task, and accuracies."""
    pairs = [
        [log_probability(model, [BOS], list(sentence.encode())) for sentence in pair]
        for rows in PAIRS.values()
        for pair in rows
    ]
    choices, right, right_by_length = [], 0, 0
    for activity, first, second, endings, label in CHOICES:
        prompt = without_brackets(f"{activity}: {first} {second.capitalize()}").encode()
        endings = [without_brackets(ending) for ending in endings]
        values = [log_probability(model, [BOS] * add_bos_token + [*prompt], [*f" {e}".encode()]) for e in endings]
        choices.append(values)
        right += max(range(len(values)), key=lambda i: values[i]) == label
        right_by_length += max(range(len(values)), key=lambda i: values[i] / len(endings[i])) == label
    accuracies = {
        "acc of pairs": sum(good > bad for good, bad in pairs) / len(pairs),
        "acc": right / len(CHOICES),
        "acc_norm": right_by_length / len(CHOICES),
    }
    return {"blimp_file": pairs, "hellaswag_file": choices}, accuracies


def measured(monkeypatch, evaluate_lm, lm: HFLM, files):
    """Scores of `evaluate_lm.score`, and the log probabilities behind them by task."""
    found = []
    evaluate = evaluate_lm.evaluate
    monkeypatch.setattr(evaluate_lm, "evaluate", lambda *a, **k: found.append(evaluate(*a, **k)) or found[-1])
    scores = evaluate_lm.score(lm, files)
    values = {
        task: [[value for value, _ in row["filtered_resps"]] for row in sorted(rows, key=lambda row: row["doc_id"])]
        for task, rows in found[0]["samples"].items()
    }
    return scores, values


@pytest.mark.parametrize("add_bos_token", [True, False], ids=["bos", "no bos"])
def test_every_log_likelihood_and_accuracy_equals_the_obvious_loop(
    checkpoint, files, evaluate_lm, monkeypatch, add_bos_token
):
    lm = harness(checkpoint, batch_size=8, add_bos_token=add_bos_token)
    scores, values = measured(monkeypatch, evaluate_lm, lm, files)
    expected, accuracies = expected_scores(lm.model, add_bos_token)
    for task in files:
        assert [len(row) for row in values[task]] == [len(row) for row in expected[task]]
        for row, expected_row in zip(values[task], expected[task]):
            assert row == pytest.approx(expected_row, abs=ATOL, rel=0)
    assert scores["blimp_file"]["acc"] == pytest.approx(accuracies["acc of pairs"])
    assert scores["hellaswag_file"]["acc"] == pytest.approx(accuracies["acc"])
    assert scores["hellaswag_file"]["acc_norm"] == pytest.approx(accuracies["acc_norm"])


def test_batch_size_changes_nothing(checkpoint, files, evaluate_lm, monkeypatch):
    one, eight = (
        measured(monkeypatch, evaluate_lm, harness(checkpoint, batch_size=size, add_bos_token=True), files)
        for size in (1, 8)
    )
    assert one[0] == eight[0]
    for task in files:
        for row, other in zip(one[1][task], eight[1][task]):
            assert row == pytest.approx(other, abs=ATOL, rel=0)


def test_scores_by_paradigm_and_field_are_printed_and_written(files, evaluate_lm, monkeypatch, tmp_path, capsys):
    output = tmp_path / "scores" / "scores.json"
    arguments = ["--blimp", files["blimp_file"], "--batch_size", "8", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["evaluate_lm.py", *arguments, "--device", "cpu"])
    evaluate_lm.main(evaluate_lm.parse_arguments())
    printed, scores = capsys.readouterr().out, json.loads(output.read_text())["scores"]["blimp_file"]
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    right = {
        uid: sum(
            log_probability(model, [BOS], [*good.encode()]) > log_probability(model, [BOS], [*bad.encode()])
            for good, bad in rows
        )
        for (uid, _), rows in PAIRS.items()
    }
    assert scores["rows"] == 24
    for uid, count in right.items():
        pairs = 4 if uid in ("npi", "negation") else 8
        assert scores["paradigms"][uid] == {"acc": count / pairs, "pairs": pairs}
        assert f"| {uid} | acc of {pairs} | {count / pairs:.4f} |" in printed
    # BLiMP writes syntax/semantics once and syntax_semantics else.
    assert set(scores["fields"]) == {"morphology", "syntax", "syntax_semantics"}
    assert scores["fields"]["syntax_semantics"] == {"acc": (right["npi"] + right["negation"]) / 8, "pairs": 8}
    assert scores["acc"] == sum(right.values()) / 24 > 0.7, "the shipped model has learned some English"


def test_perplexity_of_a_text_starts_behind_bos(checkpoint):
    text = TEXT[:130]
    request = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    for size, max_length in ((1, None), (3, 40)):
        lm = harness(checkpoint, batch_size=size, max_length=max_length)
        # A window of `max_length` ids is predicted from the one before it; the last window is full.
        ids = [BOS, *text.encode()]
        step = max_length or len(ids)
        expected = 0.0
        for start in range(0, len(ids) - 1, step):
            predicted = ids[start + 1 : start + 1 + step]
            first = min(start, max(0, start + 1 + len(predicted) - 1 - step))
            expected += log_probability(lm.model, ids[first : start + 1], predicted)
        assert lm.loglikelihood_rolling(request) == pytest.approx([expected], abs=ATOL, rel=1e-6)


def test_perplexity_with_add_bos_token_scores_bos_itself():
    # Of lm_eval 0.4.13, for every model: the prefix is <bos>, and add_bos_token puts one more into the text. The model
    # is never trained to predict <bos>, so tasks of perplexity are run without add_bos_token.
    text = "It was the first of the month."
    lm = harness(str(SHIPPED), add_bos_token=True)
    expected = log_probability(lm.model, [BOS], [BOS, *text.encode()])
    found = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert found == pytest.approx([expected], abs=ATOL, rel=1e-6)
    assert expected < log_probability(lm.model, [BOS], [*text.encode()]) - 3


def test_generate_until_gives_the_greedy_text_of_each_prompt_alone():
    lm = harness(str(SHIPPED), batch_size=4, add_bos_token=True)
    prompts = ["The history of the", "It was", "In the year 1900, the first", "Zoë"]
    options = {"until": ["the", "\n"], "max_gen_toks": 40, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)]
    for prompt, found in zip(prompts, lm.generate_until(requests)):
        ids = torch.tensor([[BOS, *prompt.encode()]])
        alone = lm.model.generate(ids, max_new_tokens=40, do_sample=False, use_cache=False)[0, ids.shape[1] :]
        text = lm.tokenizer.decode(alone, skip_special_tokens=True)
        assert found == text.split("the")[0].split("\n")[0]


@pytest.mark.slow
def test_the_command_of_the_harness_scores_a_checkpoint_with_its_own_code(files, tmp_path):
    # A new process, where nobody imports the package: config, model and cache are those of the folder.
    published = tmp_path / "published"
    AutoModelForCausalLM.from_pretrained(SHIPPED).save_pretrained(published)  # writes the code
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(published)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={published},trust_remote_code=True,dtype=float32,add_bos_token=True"]
    command += ["--include_path", str(ROOT / "examples" / "tasks"), "--tasks", *files]
    command += ["--metadata", json.dumps(files), "--output_path", str(tmp_path / "out"), "--log_samples"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    expected, accuracies = expected_scores(model, add_bos_token=True)
    assert results["blimp_file"]["acc,none"] == pytest.approx(accuracies["acc of pairs"])
    assert results["hellaswag_file"]["acc,none"] == pytest.approx(accuracies["acc"])
    assert results["hellaswag_file"]["acc_norm,none"] == pytest.approx(accuracies["acc_norm"])
    for task in files:
        (path,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        rows = sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])
        for row, expected_row in zip(rows, expected[task], strict=True):
            values = [float(value) for value, _ in row["filtered_resps"]]
            assert values == pytest.approx(expected_row, abs=ATOL, rel=0)
