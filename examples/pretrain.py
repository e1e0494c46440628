# SPDX-License-Identifier: Apache-2.0
"""Pretrain a tiny language model from raw text to a checkpoint, with the plain `Trainer`.

    python examples/pretrain.py --train 'corpus/train/*.jsonl.gz' --validation corpus/validation.jsonl.gz \
        --model stlm-3m --max_minutes 90 --output runs/stlm-3m

`--train` takes any file of bytes, text files, or whatever `datasets` reads as json, csv or parquet with a column
`text`. It is written once to a memory-mapped file beside the output. A run that was cut goes on where it stopped when
the same command is given again. At the end the output folder holds the checkpoint with tokenizer and generation config,
`history.json`, `loss.png` and `results.json`.

`--model llama-bytes` and `--model llama-bpe` train the controls of `controls.py` the same way, at the stored size of
`--like`. The budget is time, steps, bytes or floating-point operations; evaluation does not count.
"""

import argparse
import json
import os
from pathlib import Path

import matplotlib
import numpy as np
import torch
from controls import llama_config, train_bpe
from costs import bytes_per_patch, effective_parameters, flops_per_byte
from provenance import run_info
from scoring import bytes_per_token, documents, token_bytes
from stopwatch import Stopwatch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_stlm import STLMConfig, STLMForCausalLM, STLMTokenizer
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows, write_corpus
from modeling_stlm.training.entropy_table import entropy_table
from modeling_stlm.training.optimizer import MuonRecipe
from modeling_stlm.training.patch_curriculum import PatchLengthCurriculum
from modeling_stlm.training.time_budget import TimeBudget


matplotlib.use("Agg")
from matplotlib import pyplot as plt


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", required=True, help="files or patterns")
    parser.add_argument("--validation", nargs="+", required=True, help="files or patterns")
    parser.add_argument("--test", nargs="+", default=[], help="files or patterns, evaluated once at the end")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="where the corpora lie in ids; by default beside the output")
    parser.add_argument("--model", default="stlm-3m", help="a preset, a config folder, llama-bytes or llama-bpe")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="changes to the preset, as JSON")
    parser.add_argument("--curriculum_steps", type=int, help="of patching=learned: steps until patches are long")
    parser.add_argument("--like", default="stlm-3m", help="preset whose stored size the controls take")
    parser.add_argument("--vocab_size", type=int, default=4096, help="of llama-bpe, and of patching=vocabulary")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max_minutes", type=float)
    budget.add_argument("--max_steps", type=int)
    budget.add_argument("--max_bytes", type=float, help="bytes seen")
    budget.add_argument("--max_flops", type=float, help="operations, of forward and backward pass")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what --max_minutes counts")
    parser.add_argument("--block_bytes", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8, help="windows a step")
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adamw_lr", type=float, default=4e-3)
    parser.add_argument("--eval_steps", type=int, default=500, help="steps between checkpoints, which are evaluated")
    parser.add_argument("--eval_at_end", action="store_true", help="evaluate only the last one")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


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


def load_tokenizer(args: argparse.Namespace, folder: Path) -> PreTrainedTokenizerBase:
    """That of the bytes, or a BPE, which is trained once."""
    if args.model != "llama-bpe":
        return STLMTokenizer()
    path = folder / "tokenizer"
    if not path.is_dir():
        train_bpe(documents(args.train), args.vocab_size).save_pretrained(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, dict[str, Path]]:
    """The tokenizer and, by split, the corpora in its ids. What is there already is not made again."""
    name = f"bpe-{args.vocab_size}" if args.model == "llama-bpe" else "bytes"
    folder = (args.data or args.output / "data") / name
    corpora = {split: folder / f"{split}.bin" for split in ("train", "validation", "test") if getattr(args, split)}
    for split, path in corpora.items():
        patterns, sources = getattr(args, split), path.with_suffix(".json")
        if path.is_file() and json.loads(sources.read_text()) != patterns:
            raise SystemExit(f"{path} was made from {sources.read_text()}, not {patterns}: give another --data")
    tokenizer = load_tokenizer(args, folder)
    for split, path in corpora.items():
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".json").write_text(json.dumps(getattr(args, split)))
            write_corpus(path, documents(getattr(args, split)), tokenizer)
    return tokenizer, corpora


def build_model(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, corpora: dict[str, Path]
) -> PreTrainedModel:
    """What a patching rule must know of the texts, it learns from the training texts."""
    if args.model.startswith("llama-"):
        if args.set:
            raise SystemExit(f"--set {args.set}: the controls have no fields of STLMConfig")
        with torch.device("meta"):
            stored = AutoModelForCausalLM.from_config(STLMConfig.from_preset(args.like)).num_parameters()
        return AutoModelForCausalLM.from_config(llama_config(tokenizer, stored))
    changes = {}
    for change in args.set:
        name, _, value = change.partition("=")
        changes[name] = json.loads(value)
    if unknown := sorted(set(changes) - set(STLMConfig().to_dict())):
        raise SystemExit(f"--set {unknown}: not a field of STLMConfig")
    if changes.get("patching") == "vocabulary" and "patch_vocabulary" not in changes:
        changes["patch_vocabulary"] = " ".join(train_bpe(documents(args.train), args.vocab_size).get_vocab())
    if (Path(args.model) / "config.json").is_file():  # a folder alone may be the output
        model = AutoModelForCausalLM.from_config(STLMConfig.from_pretrained(args.model, **changes))
    else:
        model = AutoModelForCausalLM.from_config(STLMConfig.from_preset(args.model, **changes))
    if model.config.patching == "entropy":
        corpus = np.memmap(corpora["train"], dtype=np.uint8, mode="r")
        table = entropy_table(corpus, model.config.entropy_order, model.config.entropy_rows)
        model.model.entropy_table.copy_(table)
    return model


def main():
    args = parse_arguments()
    info = run_info()  # of the code that runs, not of what is committed meanwhile
    set_seed(args.seed)
    tokenizer, corpora = prepare(args)
    model = build_model(args, tokenizer, corpora)
    print(f"{args.model}: {model.num_parameters():,} stored parameters, {model.device}, {model.dtype}")

    sizes = token_bytes(tokenizer)
    ids = torch.from_numpy(PackedWindows(corpora["validation"], tokenizer, 1).ids.astype("int64"))
    id_bytes = bytes_per_token(ids, sizes)
    block_size = round(args.block_bytes / id_bytes)
    sets = {split: PackedWindows(path, tokenizer, block_size) for split, path in corpora.items()}
    windows = sets["validation"]
    sample = torch.stack([windows[i]["input_ids"] for i in range(0, len(windows), -(-len(windows) // 16))])

    def bytes_per_unit() -> float:
        return bytes_per_patch(model, sample) if isinstance(model, STLMForCausalLM) else id_bytes

    # An untrained router says nothing about the patches it will make.
    is_routed = isinstance(model, STLMForCausalLM) and model.config.patching == "learned"
    length = model.config.patch_bytes if is_routed else bytes_per_unit()
    flops = flops_per_byte(model, length, args.block_bytes)
    print(
        f"{len(sets['train']):,} windows of {block_size} ids, {length:.2f} bytes a patch or token, "
        f"{flops / 1e6:.2f} MFLOP a byte"
    )

    timed = args.max_minutes is not None
    step_bytes = args.batch_size * block_size * id_bytes
    if args.max_flops is not None:
        args.max_bytes = args.max_flops / (3 * flops)
    steps = 10**9 if timed else args.max_steps or max(1, round(args.max_bytes / step_bytes))
    evaluator = BitsPerByteEvaluator(sizes)
    training_args = TrainingArguments(
        output_dir=str(args.output),
        max_steps=steps,
        lr_scheduler_type="constant" if timed else "warmup_stable_decay",
        lr_scheduler_kwargs=None if timed else {"num_decay_steps": int(0.6 * steps), "decay_type": "linear"},
        warmup_steps=0 if timed else max(1, int(0.02 * steps)),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        eval_strategy="no" if args.eval_at_end else "steps",
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
    callbacks = [Stopwatch(), *([TimeBudget(args.max_minutes, clock=args.clock)] if timed else [])]
    if args.curriculum_steps:
        callbacks.append(PatchLengthCurriculum(args.curriculum_steps))
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=sets["train"],
        eval_dataset=windows,
        processing_class=tokenizer,
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
        optimizer_cls_and_kwargs=(MuonRecipe, {"muon_lr": args.muon_lr, "adamw_lr": args.adamw_lr}),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output))
    # The one at work: Trainer makes callbacks anew when it resumes.
    stopwatch = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Stopwatch))

    final = {
        split: trainer.evaluate(sets[split], metric_key_prefix=split)[f"{split}_bits_per_byte"]
        for split in ("validation", "test")
        if split in sets
    }
    # Names alone: results are published, and folders of the machine that trained say nothing to anybody.
    names = {split: " ".join(Path(file).name for file in getattr(args, split)) for split in sets}
    names |= {"output": args.output.name, "data": None}
    bytes_seen = round(trainer.state.global_step * step_bytes)
    length = bytes_per_unit()
    flops = flops_per_byte(model, length, args.block_bytes)
    results = {
        "model": args.model,
        "stored_parameters": model.num_parameters(),
        "effective_parameters": effective_parameters(model),
        "bytes_per_patch_or_token": round(length, 3),
        "flops_per_byte": round(flops),
        "steps": trainer.state.global_step,
        "bytes_seen": bytes_seen,
        "training_flops": 3 * flops * bytes_seen,
        "wall_seconds": round(stopwatch.wall_seconds),
        "cpu_seconds": round(stopwatch.cpu_seconds),
        "budget": {"minutes": args.max_minutes, "clock": args.clock} if timed else {"steps": steps},
        "bits_per_byte": final,
        "arguments": {name: str(value) for name, value in (vars(args) | names).items()},
        "config": {name: value for name, value in model.config.to_diff_dict().items() if name != "auto_map"},
    } | info
    if isinstance(model, STLMForCausalLM):
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
    if not args.eval_at_end:
        title = f"{args.model}, {results['bytes_seen']:,} bytes"
        write_curve(trainer.state.log_history, args.output / "loss.png", title)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
