# SPDX-License-Identifier: Apache-2.0
r"""Does a model know the characters of words? Fine-tunes checkpoints on CUTE (arXiv:2409.15452) and tests on words held out.

    python examples/research/characters.py --data cute.jsonl.gz --output characters.json \
        --checkpoints examples/checkpoints/stlm-10m-wide runs/llama-bpe

Rows have a `task`, `inputs` and a `label`: to spell, to find, insert, delete, replace and swap characters or words. A row is
read as `sub_char: h | c | the = tce`; the loss is that of the label and the end. CUTE asks large models with examples in the prompt; models
this small learn each task from rows. A fifth of the words and sentences (the last inputs) is held out, in all tasks. A label is
right when the greedy continuation is the same text. `--data` has the tables of the authors (github.com/Leukas/CUTE) as JSON lines.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from zlib import crc32

from provenance import run_info
from tables import markdown_table


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import (
    add_bf16,
    at_least_one,
    causal_checkpoint,
    choose_precision,
    positive,
    quiet_exit,
    read_json_lines,
    text_file,
)


NUM_PARTS = 5  # one of which is held out


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=text_file, required=True, help="JSON lines with task, inputs, label")
    parser.add_argument(
        "--checkpoints", type=causal_checkpoint, nargs="+", required=True, help="folders of causal models"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--learning_rates", type=positive, nargs="+", default=[3e-3])
    parser.add_argument("--batch_size", type=at_least_one, default=32, help="rows")
    parser.add_argument("--seeds", type=at_least_one, default=1)
    add_bf16(parser)
    return parser.parse_args()


def read_sets(path: Path) -> dict[str, list[dict]]:
    """Rows with `prompt` and `completion`, to train on and to test on."""
    sets = {"train": [], "test": []}
    for number, row in enumerate(read_json_lines(path), start=1):
        if missing := {"task", "inputs", "label"} - set(row):
            raise SystemExit(f"{path}, row {number} lacks {sorted(missing)}: expected task, inputs and label")
        word = row["inputs"][-1].replace(" ", "")  # a word is spelled with spaces, too
        split = "test" if crc32(word.encode()) % NUM_PARTS == 0 else "train"
        prompt = f"{row['task']}: {' | '.join(row['inputs'])} ="
        sets[split].append({"task": row["task"], "prompt": prompt, "completion": f" {row['label']}"})
    tasks = {split: {row["task"] for row in rows} for split, rows in sets.items()}
    if missing := tasks["train"] ^ tasks["test"]:
        raise SystemExit(f"{path} has too few rows of {sorted(missing)}: none to train on, or none to test on")
    return sets


if __name__ == "__main__":
    args = parse_arguments()
    with quiet_exit():
        sets = read_sets(args.data)

import torch
from run_folder import saved_at_the_end
from summarize import tokenize, trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

import modeling_stlm  # noqa: F401  (registers the Auto classes)


def fine_tune(
    model: PreTrainedModel, tokenizer, rows: list[dict], args: argparse.Namespace, rate: float, seed: int
) -> None:
    options = {"num_train_epochs": args.epochs, "learning_rate": rate, "warmup_steps": 0.1, "disable_tqdm": True}
    options["train_sampling_strategy"] = "group_by_length"
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(output=Path(folder), batch_size=args.batch_size, bf16=args.bf16, seed=seed)
        trainer = trainer_of(model, tokenizer, settings, tokenize(rows, tokenizer), **options)
        with saved_at_the_end(trainer):
            trainer.train()


def continuations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[str]:
    """What the model writes after each prompt, up to the end that it sets, in the order of `rows`."""
    tokenizer.padding_side = "left"
    ids = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    limit = max(map(len, ids)) + 1
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
    found = [""] * len(rows)
    for start in range(0, len(rows), 128):
        chosen = order[start : start + 128]
        options = {
            "return_tensors": "pt",
            "padding": True,
            "add_special_tokens": False,
            "return_token_type_ids": False,
        }
        prompts = tokenizer([rows[i]["prompt"] for i in chosen], **options).to(model.device)
        new = model.generate(**prompts, max_new_tokens=limit, do_sample=False, use_cache=True)
        texts = tokenizer.batch_decode(new[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts):
            found[i] = text
    return found


def exact_matches(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> dict[str, float]:
    """Share of the rows of each task, and of all (the mean over tasks), whose label the model writes."""
    hits = defaultdict(list)
    for row, text in zip(rows, continuations(model.eval(), tokenizer, rows)):
        hits[row["task"]].append(text == row["completion"])
    scores = {task: statistics.mean(found) for task, found in hits.items()}
    return scores | {"all": statistics.mean(scores.values())}


def main(args: argparse.Namespace, sets: dict[str, list[dict]]):
    choose_precision(args)
    info, runs = run_info(), []
    settings = {name: getattr(args, name) for name in ("epochs", "batch_size", "bf16")} | {"data": args.data.name}
    for folder in args.checkpoints:
        for rate in args.learning_rates:
            for seed in range(1, args.seeds + 1):
                set_seed(seed)
                tokenizer = AutoTokenizer.from_pretrained(folder)
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
                fine_tune(model, tokenizer, sets["train"], args, rate, seed)
                scores = exact_matches(model, tokenizer, sets["test"])
                runs.append({"checkpoint": Path(folder).name, "learning_rate": rate, "seed": seed, "scores": scores})
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps({"runs": runs, "arguments": settings} | info, indent=1) + "\n")
                print(f"{folder}, rate {rate:g}, seed {seed}: {100 * scores['all']:.1f}% right", flush=True)
    names = [f"{run['checkpoint']}, {run['learning_rate']:g}, seed {run['seed']}" for run in runs]
    rows = [[task, *(f"{100 * run['scores'][task]:.1f}" for run in runs)] for task in runs[0]["scores"]]
    print(markdown_table(["task, % right", *names], rows))


if __name__ == "__main__":
    with quiet_exit():
        main(args, sets)
