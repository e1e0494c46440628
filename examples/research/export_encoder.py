# SPDX-License-Identifier: Apache-2.0
r"""Turn a finished run of `encoder.py` into a shipped checkpoint: bfloat16 weights, model card, no code.

    python examples/research/export_encoder.py --run runs/encoder --base_model examples/checkpoints/stlm-3m \
        --output examples/checkpoints/stlm-3m-encoder --jobs examples/research/results/jobs.json \
        --data examples/checkpoints/sources-encoder.md

The card inherits licence, language and data from that of the base model; `--data` says what the passages are. With `--jobs`, the file of `jobs.py`, it has these
scores. `config.json` says float32, in which the weights are loaded.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import torch
from provenance import run_info
from transformers import AutoModelForMaskedLM, AutoTokenizer

import modeling_stlm  # noqa: F401  (registers the Auto classes)
from modeling_stlm.training.model_card import build_model_card, describe_base, write_model_card
from modeling_stlm.training.sentence_embeddings import save_sentence_transformer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of encoder.py")
    parser.add_argument("--base_model", type=Path, required=True, help="the checkpoint that the run started from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--jobs", type=Path, help="scores of jobs.py")
    parser.add_argument("--data", type=Path, required=True, help="Markdown about the passages, for the card")
    return parser.parse_args()


def scores_of(path: Path) -> dict[str, dict[str, float]]:
    """Mean accuracies of our encoder by job, clean and noisy."""
    found = defaultdict(list)
    for name, value in json.loads(path.read_text())["cells"].items():
        job, system, _ = name.split(" | ")
        if system == "stlm":
            found[job].append(value)
    return {
        job: {
            "accuracy": statistics.mean(v["clean"] for v in some),
            "accuracy_with_noise": statistics.mean(v["noisy"] for v in some),
        }
        for job, some in found.items()
    }


def main():
    args = parse_arguments()
    model = AutoModelForMaskedLM.from_pretrained(args.run, dtype=torch.bfloat16)
    args.output.mkdir(parents=True, exist_ok=True)
    save_sentence_transformer(model, AutoTokenizer.from_pretrained(args.run), args.output)
    for code in args.output.glob("*.py"):
        code.unlink()
    path = args.output / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32", "use_cache": True}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (args.output / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner reads

    results = json.loads((args.run / "results.json").read_text()) | {"base_model": describe_base(args.base_model)}
    if args.jobs:
        scores = scores_of(args.jobs)
        results["scores"] |= scores
        results["tasks"] |= {
            job: "sentence-similarity" if "nearest" in job else "text-classification" for job in scores
        }
    results["exported"] = {"dtype": "bfloat16"} | run_info()
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    card = build_model_card(args.output, data=args.data.read_text(encoding="utf-8"))
    print(card.content if write_model_card(args.output, card) else f"kept {args.output / 'README.md'} as it is")


if __name__ == "__main__":
    main()
