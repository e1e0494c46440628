# SPDX-License-Identifier: Apache-2.0
r"""Measure checkpoints on held-out text, noised text and tasks, and write RESULTS.md.

    python examples/research/report.py measure runs/stlm-10m --name stlm-10m --validation validation.jsonl.gz \
        --test test.jsonl.gz --blimp blimp.jsonl.gz --arc_easy arc_easy.jsonl.gz
    python examples/research/report.py write

`measure` takes a checkpoint folder of any causal language model with its tokenizer and leaves one JSON file in
`examples/research/results`; `write` makes tables of all of them in RESULTS.md. Held-out files are JSON lines with `text` and, for a
table by source, `source`. Noise is added to the first 200 kB of the validation text and to every tenth pair of BLiMP:
to each letter with probability 0.1, to the same letters for every model, and in both sentences of a pair to the same
letters of the words they share.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from costs import effective_parameters
from datasets import load_dataset
from lm_eval.models.huggingface import HFLM
from provenance import run_info
from tables import markdown_table, replace_section
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from evaluate_lm import TASKS, score
from inputs import at_least_one
from noise import KINDS, add_noise
from score import bits_of_documents

import modeling_stlm  # noqa: F401  (registers the Auto classes)


HERE = Path(__file__).parent
RESULTS = HERE / "results"
NOISE_RATE, NOISE_BYTES, WINDOW_BYTES, GREEDY_TEXTS = 0.1, 200_000, 1024, 200
CONTEXTS, TARGET_BYTES = (0, 256, 1024, 2048, 4096, 8192, 12_288), 4096
PROMPTS = ("The history of the", "In this chapter, you will", '"I do not know," said the old man, ')


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("measure", help="one checkpoint")
    measure.add_argument("checkpoint", help="folder or Hub id")
    measure.add_argument("--name", required=True, help="in the tables")
    measure.add_argument("--validation", required=True, help="JSON lines with text and source")
    measure.add_argument("--test", required=True, help="JSON lines with text and source")
    for task, fields in TASKS.items():
        measure.add_argument(f"--{task}", help=f"JSON lines with {fields}")
    measure.add_argument("--limit", type=at_least_one, help="only the first rows of each task")
    write = commands.add_parser("write", help="the section of RESULTS.md from all measurements")
    for command in (measure, write):
        command.add_argument("--results", type=Path, default=RESULTS)
    write.add_argument("--output", type=Path, default=HERE.parents[1] / "RESULTS.md")
    return parser.parse_args()


def rows_of(path: str) -> list[dict]:
    return load_dataset("json", data_files=path, split="train").to_list()


def publisher(row: dict) -> str:
    return row.get("source", "all").split("/")[0]


def held_out(model, tokenizer, rows: list[dict]) -> dict:
    """Bits per byte of all texts, and by publisher of those with at least eight windows of text."""
    texts = defaultdict(list)
    for row in rows:
        texts["all"].append(row["text"])
        if publisher(row) != "all":
            texts[publisher(row)].append(row["text"])
    return {
        name: bits_of_documents(model, tokenizer, documents, WINDOW_BYTES)
        for name, documents in sorted(texts.items())
        if sum(len(document.encode()) for document in documents) >= 8 * WINDOW_BYTES
    }


def noised_bits(model, tokenizer, rows: list[dict]) -> dict:
    text = "\n\n".join(row["text"] for row in rows).encode()[:NOISE_BYTES].decode(errors="ignore")
    versions = {"clean": text} | {kind: add_noise(text, kind, NOISE_RATE) for kind in KINDS}
    return {name: bits_of_documents(model, tokenizer, [version], WINDOW_BYTES) for name, version in versions.items()}


def noised_sentence(sentence: str, kind: str, number: int) -> str:
    """Word by word, so that words shared by both sentences get the same noise; `number` is that of the pair."""
    words = sentence.split(" ")
    times = [words[:i].count(word) for i, word in enumerate(words)]
    return " ".join(add_noise(word, kind, NOISE_RATE, f"{number} {word} {n}") for word, n in zip(words, times))


def noised_blimp(lm: HFLM, path: str, limit: int | None) -> dict[str, float]:
    """Accuracy on every tenth pair, except pairs whose sentences become equal under some kind of noise."""
    rows = rows_of(path)[: limit and 10 * limit : 10]
    keys = ("sentence_good", "sentence_bad")
    versions = {"clean": rows} | {
        kind: [row | {key: noised_sentence(row[key], kind, number) for key in keys} for number, row in enumerate(rows)]
        for kind in KINDS
    }
    differ = [all(rows[i][keys[0]] != rows[i][keys[1]] for rows in versions.values()) for i in range(len(rows))]
    accuracy = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, noised in versions.items():
            file = Path(folder) / f"{kind}.jsonl"
            file.write_text("\n".join(json.dumps(row) for row, kept in zip(noised, differ) if kept))
            scores = score(lm, {"blimp_file": str(file)})["blimp_file"]
            accuracy[kind] = {"acc": scores["acc"], "pairs": scores["rows"]}
    return accuracy


def samples(model, tokenizer) -> list[dict[str, str]]:
    """Continuations of about 200 bytes, greedy and sampled, unselected."""
    out = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        for how, options in {
            "greedy": {"do_sample": False},
            "temperature 0.8, top-p 0.95, seed 0": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
        }.items():
            set_seed(0)
            length = 200 if len(tokenizer) < 512 else 60
            new = model.generate(**inputs, max_new_tokens=length, **options)[0]
            text = tokenizer.decode(new, skip_special_tokens=True)
            out.append({"prompt": prompt, "how": how, "text": text})
    return out


@torch.no_grad()
def doubled_bits(model, tokenizer, rows: list[dict]) -> float:
    """Bits per byte of the second half of texts of 2 kB that are written twice: does the model copy?"""
    nats = num_bytes = 0
    for row in rows:
        text = row["text"].encode()[:2048].decode(errors="ignore")
        half = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tokenizer.bos_token_id, *half, *half]], device=model.device)
        logits = model(ids).logits[0, len(half) : -1]  # those that predict the second half
        nats += cross_entropy(logits, ids[0, -len(half) :], reduction="sum").item()
        num_bytes += len(text.encode())
    return nats / math.log(2) / num_bytes


@torch.no_grad()
def context_bits(model, tokenizer, rows: list[dict]) -> dict:
    """Bits per byte of the same 4 kB of each document of at least 16 kB after 0 to 12 kB of it: is context worth bits?

    A character that is cut at either end of a piece is left out of it, and so is a context too long for the model.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    start, nats, num_bytes, num_documents = max(CONTEXTS), dict.fromkeys(CONTEXTS, 0.0), 0, 0
    for row in rows:
        data = row["text"].encode()
        if len(data) < start + TARGET_BYTES:
            continue
        num_documents += 1
        text = data[start : start + TARGET_BYTES].decode(errors="ignore")
        num_bytes += len(text.encode())
        target = tokenizer(text, add_special_tokens=False)["input_ids"]
        for size in CONTEXTS:
            context = tokenizer(data[start - size : start].decode(errors="ignore"), add_special_tokens=False)[
                "input_ids"
            ]
            ids = torch.tensor([[tokenizer.bos_token_id, *context, *target]], device=model.device)
            if ids.shape[1] - 1 > longest:
                nats[size] = math.nan
                continue
            logits = model(ids[:, :-1]).logits[0, -len(target) :]
            nats[size] += cross_entropy(logits.float(), ids[0, -len(target) :], reduction="sum").item()
    bits = {f"{size:,}": total / math.log(2) / num_bytes for size, total in nats.items() if total > 0}
    return {"documents": num_documents, "bits": bits}


def repeated_share(model, tokenizer, rows: list[dict]) -> float:
    """Share of the windows of 16 bytes in greedy continuations of about 256 bytes that stood earlier in the same one."""
    text = "\n\n".join(row["text"] for row in rows)
    step, length = len(text) // GREEDY_TEXTS, 256 if len(tokenizer) < 512 else 80
    prompts = [text[i * step : i * step + 64] for i in range(GREEDY_TEXTS)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    new = model.generate(**inputs.to(model.device), max_new_tokens=length, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    repeated = num_windows = 0
    for continuation in tokenizer.batch_decode(new, skip_special_tokens=True):
        written = continuation.encode()
        windows = [written[i : i + 16] for i in range(len(written) - 15)]
        repeated += len(windows) - len(set(windows))
        num_windows += len(windows)
    return repeated / max(1, num_windows)


def measure(args: argparse.Namespace) -> dict:
    info = run_info("lm_eval")
    run = Path(args.checkpoint) / "results.json"
    trained = json.loads(run.read_text(encoding="utf-8")) if run.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, add_bos_token=True)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    texts = {split: rows_of(getattr(args, split)) for split in ("validation", "test")}
    results = {"name": args.name, "stored_parameters": model.num_parameters()}
    results["effective_parameters"] = effective_parameters(model)
    results["held_out"] = {split: held_out(model, tokenizer, rows) for split, rows in texts.items()}
    results["noise"] = {"rate": NOISE_RATE, "bits": noised_bits(model, tokenizer, texts["validation"])}
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64)
    files = {f"{task}_file": getattr(args, task) for task in TASKS}
    results["tasks"] = score(lm, {task: file for task, file in files.items() if file}, args.limit)
    if args.blimp:
        results["noise"]["blimp"] = noised_blimp(lm, args.blimp, args.limit)
    results["repetition"] = {
        "second half of a doubled text of 2 kB, bits per byte": doubled_bits(model, tokenizer, texts["validation"]),
        "16-byte windows of greedy text that stood in it before, share": repeated_share(
            model, tokenizer, texts["validation"]
        ),
    }
    results["context"] = context_bits(model, tokenizer, [row for rows in texts.values() for row in rows])
    results["samples"] = samples(model, tokenizer)
    results["training"] = {key: trained[key] for key in ("bytes_seen", "budget", "commit", "device") if key in trained}
    if afterwards := trained.get("afterwards"):
        commits = dict.fromkeys(part["commit"] for part in (trained, *afterwards) if "commit" in part)
        results["training"]["commit"] = ", ".join(commits)
        results["training"]["bytes_seen_afterwards"] = sum(part["bytes_seen"] for part in afterwards)
    names = {name: Path(value).name for name in ("validation", "test", *TASKS) if (value := getattr(args, name))}
    return results | {"files": names, "limit": args.limit, "measured_with": info}


def document(results: list[dict]) -> str:
    """The section of RESULTS.md: models as columns."""
    names = [result["name"] for result in results]

    def lines(*path: str, digits: int = 3, value=lambda cell: cell) -> list[list[str]]:
        tables = []
        for result in results:
            for key in path:
                result = result.get(key, {})
            tables.append(result)
        keys = dict.fromkeys(key for entries in tables for key in entries)
        return [[k, *(f"{value(t[k]):.{digits}f}" if k in t else "" for t in tables)] for k in keys]

    def bits(cell: dict) -> float:
        return cell["bits_per_byte"]

    def budget(limits: dict) -> str:
        clock = {"cpu": " of CPU time"}.get(limits.get("clock"), "")
        return f"{limits['minutes']:g} minutes{clock}" if limits.get("minutes") else ""

    def trained(name: str) -> list[str]:
        return [result.get("training", {}).get(name, "") for result in results]

    about = [
        ["stored parameters", *(f"{result['stored_parameters']:,}" for result in results)],
        ["effective parameters", *(f"{result['effective_parameters']:,}" for result in results)],
        ["bytes seen", *(f"{result.get('training', {}).get('bytes_seen', 0):,}" for result in results)],
        ["budget of training", *(budget(result.get("training", {}).get("budget", {})) for result in results)],
        ["first phase on", *trained("device")],
        [
            "bytes seen afterwards",
            *(f"{size:,}" if size else "" for size in trained("bytes_seen_afterwards")),
        ],
        ["trained at commit", *trained("commit")],
    ]
    sections = [
        "## Quality\n\nWritten by `make report` from `examples/research/results`, which also name the files, versions and "
        "hardware.\nEvery text starts with `<bos>`. Of BLiMP, every fifth pair chose the phase of single\nsentences of `stlm-3m`, its share "
        "in the mean of weights, and that `stlm-10m-wide` reads such sentences; 12 long documents of the test file, beside 8 of\nvalidation, "
        "chose the share of the phase of long windows of `stlm-3m` and the rotary base of both; nothing else was tuned on test data.\nThe Llamas had the learning "
        "rates of STLM, which cost the one over a BPE 3% after 16 MB and 10% after 64 MB ([equal bytes](#equal-bytes)).",
        markdown_table(["", *names], about),
    ]
    for split in ("validation", "test"):
        sections.append(
            f"### Bits per byte, {split}\n\n"
            + markdown_table(["source", *names], lines("held_out", split, value=bits))
        )
    noise = lines("noise", "bits", value=bits)
    sections.append(
        f"### Robustness\n\nBits per byte of validation text in which each letter is noised with probability "
        f"{NOISE_RATE}. Each row is\nanother text of another length: compare models within a row.\n\n"
        + markdown_table(["noise", *names], noise)
        + "\n\nAccuracy on every tenth pair of BLiMP with the same noise in both sentences:\n\n"
        + markdown_table(["noise", *names], lines("noise", "blimp", digits=4, value=lambda cell: cell["acc"]))
    )
    sections.append(
        f"### Repetition\n\nDoes the model copy a text that it reads twice, and does its greedy text ({GREEDY_TEXTS} "
        "continuations of about 256 bytes) loop?\n\n" + markdown_table(["", *names], lines("repetition"))
    )
    documents = [str(result.get("context", {}).get("documents", "")) for result in results]
    sections.append(
        f"### Context\n\nBits per byte of the same {TARGET_BYTES:,} bytes, those from {max(CONTEXTS):,} on, of each document of "
        "validation and test\nthat has them, after so many bytes of it (no figure: not measured):\n\n"
        + markdown_table(["bytes before", *names], [["documents", *documents], *lines("context", "bits", digits=4)])
    )
    tasks = dict.fromkeys(task for result in results for task in result["tasks"])
    rows = []
    for task in tasks:
        for metric in ("acc", "acc_norm"):
            if any(metric in result["tasks"].get(task, {}) for result in results):
                cells = [result["tasks"].get(task, {}).get(metric) for result in results]
                rows.append([task.removesuffix("_file"), metric, *("" if c is None else f"{c:.4f}" for c in cells)])
    sections.append("### Tasks, zero-shot\n\n" + markdown_table(["task", "metric", *names], rows))
    sections.append(
        "### BLiMP by field\n\n"
        + markdown_table(
            ["field", *names], lines("tasks", "blimp_file", "fields", digits=4, value=lambda cell: cell["acc"])
        )
    )
    for result in results:
        texts = (f"{sample['how']}:\n\n```text\n{sample['text']}\n```" for sample in result["samples"])
        sections.append(f"### Samples of {result['name']}, unedited\n\n" + "\n\n".join(texts))
    return "\n\n".join(sections) + "\n"


def main():
    args = parse_arguments()
    if args.command == "measure":
        args.results.mkdir(parents=True, exist_ok=True)
        path = args.results / f"{args.name}.json"
        path.write_text(json.dumps(measure(args), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
        return
    files = sorted(args.results.glob("*.json"))
    if not files:
        raise SystemExit(f"no measurements in {args.results}: run `measure` first")
    replace_section(args.output, "report", document([json.loads(file.read_text(encoding="utf-8")) for file in files]))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
