# SPDX-License-Identifier: Apache-2.0
"""Pretrain a tiny language model from raw text to a checkpoint, with the plain `Trainer`.

    python examples/pretrain.py --train 'corpus/train/*.jsonl.gz' --validation corpus/validation.jsonl.gz \
        --model stlm-3m --max_minutes 90 --output runs/stlm-3m

`--train` takes any file of bytes, text files, or whatever `datasets` reads as json, csv or parquet with a column
`text`. It is written once to a memory-mapped file beside the output. A run that was cut goes on where it stopped when
the same command is given again. At the end the output folder holds the checkpoint with tokenizer and generation config,
`history.json`, `loss.png` and `results.json`.

`--model llama-bytes` and `--model llama-bpe` train the controls of `controls.py` the same way, at the stored size of
`--like`.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from glob import glob
from importlib.metadata import version
from pathlib import Path

import matplotlib
import torch
from controls import bpe_llama, flat_byte_llama
from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_stlm import STLMConfig, STLMTokenizer
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows, write_corpus
from modeling_stlm.training.optimizer import MuonRecipe
from modeling_stlm.training.time_budget import TimeBudget


matplotlib.use("Agg")
from matplotlib import pyplot as plt


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="files or patterns")
    parser.add_argument("--validation", nargs="+", required=True, help="files or patterns")
    parser.add_argument("--test", nargs="+", default=[], help="files or patterns, evaluated once at the end")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="stlm-3m", help="a preset, a config folder, llama-bytes or llama-bpe")
    parser.add_argument("--like", default="stlm-3m", help="preset whose stored size the controls take")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of llama-bpe")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max_minutes", type=float)
    budget.add_argument("--max_steps", type=int)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what --max_minutes counts")
    parser.add_argument("--block_bytes", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8, help="windows a step")
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adamw_lr", type=float, default=3e-3)
    parser.add_argument("--eval_steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def documents(patterns: list[str]) -> Iterable[str | bytes]:
    """Texts of all files that match."""
    files = sorted(file for pattern in patterns for file in glob(pattern))
    if not files:
        raise SystemExit(f"no file matches {patterns}")
    for file in files:
        kind = next((kind for kind in ("json", "csv", "parquet") if f".{kind}" in Path(file).name), None)
        if kind is None:
            yield Path(file).read_bytes()
        else:
            yield from load_dataset(kind, data_files=file, split="train")["text"]


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Bytes behind each id, 0 for special tokens."""
    # A byte-level vocabulary writes each byte as one character.
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return torch.tensor([0 if i in special else len(piece) for i, piece in enumerate(pieces)])


def run_info() -> dict[str, str]:
    """Where a number comes from."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"commit": commit, "device": device, "python": platform.python_version()} | versions


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint: its trainer state is written last."""
    states = output.glob("checkpoint-*/trainer_state.json")
    newest = max(states, key=lambda path: int(path.parent.name.split("-")[1]), default=None)
    return None if newest is None else str(newest.parent)


def write_curve(history: list[dict], path: Path, title: str) -> None:
    bits = [(log["step"], log["eval_bits_per_byte"]) for log in history if "eval_bits_per_byte" in log]
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(*zip(*bits), marker=".")
    axes.set(xlabel="step", ylabel="bits per byte (validation)", title=title)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    args = parse_arguments()
    set_seed(args.seed)
    if args.model.startswith("llama-"):
        stored = AutoModelForCausalLM.from_config(STLMConfig.from_preset(args.like)).num_parameters()
        if args.model == "llama-bytes":
            config, tokenizer = flat_byte_llama(stored)
        else:
            config, tokenizer = bpe_llama(stored, args.vocab_size, documents(args.train))
    else:
        config = (
            STLMConfig.from_pretrained(args.model) if Path(args.model).is_dir() else STLMConfig.from_preset(args.model)
        )
        tokenizer = STLMTokenizer()
    model = AutoModelForCausalLM.from_config(config)
    print(f"{args.model}: {model.num_parameters():,} stored parameters, {model.device}, {model.dtype}")

    corpora = {}
    for split in ("train", "validation", "test"):
        patterns = getattr(args, split)
        path = args.output / "data" / f"{split}.bin"
        sources = path.with_suffix(".json")
        if patterns and not path.is_file():
            write_corpus(path, documents(patterns), tokenizer)
            sources.write_text(json.dumps(patterns))
        elif patterns and json.loads(sources.read_text()) != patterns:
            raise SystemExit(f"{path} was made from {sources.read_text()}, not {patterns}: give another --output")
        corpora[split] = path
    sizes = token_bytes(tokenizer)
    bytes_per_token = 1.0
    if not isinstance(tokenizer, STLMTokenizer):
        sample = PackedWindows(corpora["validation"], tokenizer, 1024)
        ids = torch.from_numpy(sample.ids.astype("int64"))
        bytes_per_token = float(sizes[ids].sum() / len(ids))
    block_size = round(args.block_bytes / bytes_per_token)
    sets = {
        split: PackedWindows(path, tokenizer, block_size) for split, path in corpora.items() if getattr(args, split)
    }
    print(f"{len(sets['train']):,} windows of {block_size} ids, {bytes_per_token:.2f} bytes an id")

    evaluator = BitsPerByteEvaluator(sizes)
    timed = args.max_minutes is not None
    steps = 10**9 if timed else args.max_steps
    training_args = TrainingArguments(
        output_dir=str(args.output),
        max_steps=steps,
        lr_scheduler_type="constant" if timed else "warmup_stable_decay",
        lr_scheduler_kwargs=None if timed else {"num_decay_steps": int(0.6 * steps), "decay_type": "linear"},
        warmup_steps=0 if timed else max(1, int(0.02 * steps)),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        save_steps=args.eval_steps,
        save_total_limit=1,
        logging_steps=50,
        batch_eval_metrics=True,
        restore_callback_states_from_checkpoint=True,
        max_grad_norm=1.0,
        report_to="none",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    budget = TimeBudget(args.max_minutes, clock=args.clock) if timed else None
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        processing_class=tokenizer,
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
        optimizer_cls_and_kwargs=(MuonRecipe, {"muon_lr": args.muon_lr, "adamw_lr": args.adamw_lr}),
        callbacks=[budget] if timed else None,
    )
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output))

    seconds = time.monotonic() - started
    final = {
        split: trainer.evaluate(sets[split], metric_key_prefix=split)[f"{split}_bits_per_byte"]
        for split in ("validation", "test")
        if split in sets
    }
    # Names alone: results are published, and folders of the machine that trained say nothing to anybody.
    names = {split: " ".join(Path(file).name for file in getattr(args, split)) for split in ("train", *sets)}
    results = {
        "model": args.model,
        "stored_parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "bytes_seen": round(trainer.state.global_step * args.batch_size * block_size * bytes_per_token),
        "wall_seconds_of_last_run": round(seconds),
        "budget": {"minutes": args.max_minutes, "clock": args.clock} if timed else {"steps": args.max_steps},
        "bits_per_byte": final,
        "arguments": {name: str(value) for name, value in (vars(args) | names | {"output": args.output.name}).items()},
    } | run_info()
    if isinstance(config, STLMConfig):
        model.config.use_cache = True  # Trainer turns it off, and would save it so
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        max_new_tokens=256,
    )
    trainer.save_model()
    (args.output / "history.json").write_text(json.dumps(trainer.state.log_history, indent=1) + "\n")
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    write_curve(trainer.state.log_history, args.output / "loss.png", f"{args.model}, {results['bytes_seen']:,} bytes")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
