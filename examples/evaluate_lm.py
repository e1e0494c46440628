# SPDX-License-Identifier: Apache-2.0
r"""Score a checkpoint on files of minimal pairs (BLiMP) and of multiple choices (HellaSwag) with lm-evaluation-harness.

    python examples/evaluate_lm.py --blimp blimp.jsonl.gz --hellaswag hellaswag_val.jsonl.gz --output scores.json

The harness itself takes the tasks, too, with a published checkpoint and its code instead of the installed package:

    lm_eval run --model hf --device cpu --batch_size 64 --include_path examples/tasks --tasks blimp_file \
        --model_args pretrained=YOUR_NAME/MODEL,trust_remote_code=True,dtype=float32,add_bos_token=True \
        --metadata '{"blimp_file": "blimp.jsonl.gz"}'

Every text starts with `<bos>`, as documents do in training: the harness adds it to texts without a context, and
`add_bos_token` to all others. Scores are sums over a sentence, which bfloat16 would round: hence `dtype=float32`.
"""

import argparse
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from inputs import HelpFormatter, at_least_one, causal_checkpoint, quiet_exit, require, text_file


HERE = Path(__file__).parent
TASKS = {
    "blimp": "sentence_good, sentence_bad, UID, field",
    "hellaswag": "activity_label, ctx_a, ctx_b, endings, label",
    "arc_easy": "query, choices, gold",
    "arc_challenge": "query, choices, gold",
    "openbookqa": "query, choices, gold",
    "copa": "query, choices, gold",
    "piqa": "goal, sol1, sol2, label",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint", type=causal_checkpoint, default=str(HERE / "checkpoints" / "stlm-3m"), help="folder or Hub id"
    )
    for task, fields in TASKS.items():
        parser.add_argument(f"--{task}", type=text_file, help=f"JSON lines with {fields}")
    parser.add_argument("--limit", type=at_least_one, help="only the first rows of each file")
    parser.add_argument("--batch_size", type=at_least_one, default=64, help="texts; they are sorted by length")
    parser.add_argument("--no_bos", action="store_true", help="no <bos> before contexts")
    parser.add_argument("--device", help="cuda, cpu...; default: the fastest there is")
    parser.add_argument("--output", type=Path, help="scores as JSON")
    args = parser.parse_args()
    if not any(getattr(args, task) for task in TASKS):
        parser.error(f"give at least one of {', '.join(f'--{task}' for task in TASKS)}")
    return args


if __name__ == "__main__":
    args = parse_arguments()
    require("eval", "lm_eval")

import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import modeling_stlm  # noqa: F401  (registers the Auto classes)


def accuracy_by(key: str, samples: list[dict]) -> dict[str, dict[str, float]]:
    """Accuracy and number of pairs for each value of `key` in the rows of the file."""
    right = defaultdict(list)
    for sample in samples:
        # One paradigm of BLiMP writes syntax/semantics, the others syntax_semantics.
        right[sample["doc"][key].replace("/", "_")].append(sample["acc"])
    return {name: {"acc": sum(values) / len(values), "pairs": len(values)} for name, values in sorted(right.items())}


def score(lm: HFLM, files: dict[str, str], limit: int | None = None) -> dict:
    """Scores of `lm` on `files`, paths by name of task."""
    manager = TaskManager(include_path=str(HERE / "tasks"), include_defaults=False, metadata=files)
    found = evaluate(lm, manager.load(list(files)), limit=limit, bootstrap_iters=0)
    scores = {}
    for task in files:
        metrics = {name.split(",")[0]: value for name, value in found["results"][task].items() if "," in name}
        scores[task] = {name: value for name, value in metrics.items() if isinstance(value, float)}
        scores[task]["rows"] = found["n-samples"][task]["effective"]
    if "blimp_file" in files:
        samples = found["samples"]["blimp_file"]
        scores["blimp_file"] |= {"fields": accuracy_by("field", samples), "paradigms": accuracy_by("UID", samples)}
    return scores


def table(scores: dict) -> str:
    lines = ["| task | metric | value |", "|---|---|---|"]
    for task, metrics in scores.items():
        for metric, value in metrics.items():
            if isinstance(value, dict):
                lines += [f"| {name} | acc of {part['pairs']} | {part['acc']:.4f} |" for name, part in value.items()]
            else:
                lines.append(
                    f"| {task} | {metric} | {value:.4f} |" if metric != "rows" else f"| {task} | rows | {value} |"
                )
    return "\n".join(lines)


def main(args: argparse.Namespace):
    lm = HFLM(
        pretrained=args.checkpoint,
        dtype="float32",
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch_size=args.batch_size,
        add_bos_token=not args.no_bos,
    )
    print(f"{args.checkpoint}: {lm.model.num_parameters():,} parameters, {lm.model.device}, {lm.model.dtype}")
    files = {f"{task}_file": str(getattr(args, task)) for task in TASKS if getattr(args, task)}
    scores = score(lm, files, args.limit)
    print(table(scores))
    if args.output:
        about = {
            "checkpoint": Path(args.checkpoint).name,
            "add_bos_token": not args.no_bos,
            "batch_size": args.batch_size,
        } | {name: version(name) for name in ("torch", "transformers", "lm_eval")}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(about | {"scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    with quiet_exit():
        main(args)
