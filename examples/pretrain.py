# SPDX-License-Identifier: Apache-2.0
"""Pretrain STLM from raw text to a checkpoint, with the plain `Trainer`.

    python examples/pretrain.py --train 'texts/*.txt' --validation held_out.txt --max_minutes 60 --output runs/mine

`--train` takes files of bytes, or what `datasets` reads as json, csv or parquet with a column `text`; they are written
once to a memory-mapped file. Ctrl-C and SIGTERM save; the same command goes on, also with a larger budget. The output
folder gets the checkpoint with tokenizer and generation config, `history.json`, `loss.png` and `results.json`.
"""

import argparse
import json
from hashlib import blake2b
from pathlib import Path

from inputs import (
    HelpFormatter,
    add_bf16,
    add_rates,
    at_least_one,
    at_least_zero,
    causal_checkpoint,
    choose_precision,
    config_change,
    file_pattern,
    naming,
    output_of,
    positive,
    presets,
    quiet_exit,
    rates_of,
    require,
    share,
    whole,
)


SPLITS = ("train", "validation", "test")
# What another call may change when a run goes on; the results describe all other settings as those of the whole run. The
# second line is of `research/train.py`. Texts are checked by `write_once`: those of a corpus that is there may not change.
MAY_CHANGE = (
    "output",
    "validation",
    "test",
    "max_minutes",
    "max_steps",
    "max_bytes",
    "workers",
    "eval_steps",
    "compile",
)
MAY_CHANGE += ("max_flops", "data", "eval_at_end")


def argument_parser(controls: tuple[str, ...] = ()):
    """The parser, and its group of budgets, one of which must be given; `controls` are models beside the presets."""

    def model(value: str) -> str:
        if value not in (*presets(), *controls) and not (Path(value) / "config.json").is_file():
            known = ", ".join(presets())
            raise argparse.ArgumentTypeError(f"{value} is no preset ({known}) and no folder with a config.json")
        return value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--train", type=file_pattern, nargs="+", required=True, help="files or patterns")
    parser.add_argument("--validation", type=file_pattern, nargs="+", required=True, help="files or patterns")
    parser.add_argument(
        "--test", type=file_pattern, nargs="+", default=[], help="files or patterns, evaluated once at the end"
    )
    parser.add_argument(
        "--output",
        type=output_of("STLMForCausalLM", *(["LlamaForCausalLM"] if controls else []), own=("begun.json",)),
        required=True,
        help="folder of the run, new or to go on with",
    )
    parser.add_argument(
        "--noise", type=share, default=0.0, help="share of the training documents that get the errors of noise.py"
    )
    parser.add_argument(
        "--repeat", type=share, default=0.0, help="share of the training documents of which a passage is repeated"
    )
    parser.add_argument(
        "--sentences",
        type=share,
        default=0.0,
        help="share of the training documents that are replaced by documents of one of their sentences",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--model", type=model, default="stlm-3m", help="a preset or a folder with a config.json: random weights"
    )
    start.add_argument("--checkpoint", type=causal_checkpoint, help="folder or Hub id with weights to start from")
    parser.add_argument(
        "--set",
        type=config_change,
        nargs="*",
        default=[],
        metavar="FIELD=VALUE",
        help="config fields to change, as JSON",
    )
    parser.add_argument("--only", metavar="NAME", help="train only weights in whose names this stands")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max_minutes", type=positive, help="of training; evaluation does not count")
    budget.add_argument("--max_steps", type=at_least_one, help="of training")
    budget.add_argument("--max_bytes", type=positive, help="bytes seen")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="for --max_minutes")
    parser.add_argument("--block_bytes", type=at_least_one, default=1024, help="bytes per window")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="windows per step")
    add_rates(parser)
    parser.add_argument("--weight_decay", type=at_least_zero, default=0.0, help="of the matrices")
    parser.add_argument("--decay", type=share, default=0.6, help="share of the budget in which the rates fall to zero")
    add_bf16(parser)
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile each layer, for a GPU; up to a minute of the budget",
    )
    parser.add_argument(
        "--workers", type=whole, default=0, help="processes that cut windows; then signal the main process alone"
    )
    parser.add_argument("--eval_steps", type=at_least_one, default=500, help="steps between evaluated checkpoints")
    parser.add_argument("--seed", type=whole, default=1, help="of weights and order")
    return parser, budget


if __name__ == "__main__":
    args = argument_parser()[0].parse_args()
    require("train", "accelerate", "datasets", "matplotlib")

import torch
from alterations import ALTERATIONS, altered
from huggingface_hub.errors import StrictDataclassError
from run_folder import (
    EndOnDivergence,
    ProgressLines,
    begin,
    check_same,
    is_spent,
    last_checkpoint,
    launch_state,
    names_and_sizes,
    per_device,
    run_info,
    save,
)
from score import documents
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from modeling_stlm import STLMConfig, STLMForCausalLM, STLMTokenizer
from modeling_stlm.layers_stlm import STLMTrunkAttentionBlock, STLMTrunkFeedForwardBlock
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows, write_corpus
from modeling_stlm.training.long_runs import SaveByTime, StopOnSignal
from modeling_stlm.training.model_card import describe_base
from modeling_stlm.training.optimizer import MuonRecipe
from modeling_stlm.training.time_budget import TimeBudget


def write_corpora(args: argparse.Namespace, tokenizer, folder: Path) -> dict[str, Path]:
    """The tokenized texts by split; those already in `folder` are kept."""
    corpora = {}
    for split in SPLITS:
        if patterns := getattr(args, split):
            shares = {name: getattr(args, name) for name in ALTERATIONS} if split == "train" else {}
            with launch_state().main_process_first():
                corpora[split] = write_once(folder / f"{split}.bin", patterns, tokenizer, **shares)
    return corpora


def write_once(path: Path, patterns: list[str], tokenizer, **shares: float) -> Path:
    """The tokenized texts of a split, which the file is named after, with `shares` of the documents altered; kept if made from
    the same files and shares."""
    shares = {name: value for name, value in shares.items() if value}
    made_from = {"files": names_and_sizes(patterns)} | shares
    record = path.with_suffix(".json")
    if not path.is_file():
        begin(record, made_from, goes_on=False)
        texts = documents(patterns)
        with naming(path.stem, patterns, "Take other texts"):
            write_corpus(path, altered(texts, **shares) if shares else texts, tokenizer)
    elif record.is_file() and isinstance(recorded := json.loads(record.read_text()), list):
        # Of an earlier version, which recorded the patterns: nothing tells whether they match other files now.
        if recorded != [*patterns, *([shares] if shares else [])]:
            raise SystemExit(f"{record} was made with {recorded}: use another folder")
    else:
        check_same(record, made_from)
    return path


def tell_of_known(sets: dict[str, PackedWindows]) -> None:
    """Print how many documents of the other splits are among those to train on, if any."""

    def digest(document: memoryview) -> bytes:
        return blake2b(document, digest_size=16).digest()

    known = set(map(digest, sets["train"].documents()))
    for split, windows in sets.items():
        found = [digest(document) in known for document in windows.documents()] if split != "train" else []
        if any(found):
            launch_state().print(
                f"{sum(found):,} of the {len(found):,} documents of --{split} are among those to train on: "
                "the score is not that of new texts"
            )


def field_value(value: str):
    """A value as JSON, or the word itself: `patching=fixed` needs no quotes."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def load_config(model: str, changes: list[str], is_checkpoint: bool = False) -> STLMConfig:
    """The config of a preset, or of a folder or an id on the Hub, with `changes`."""
    fields = {name: field_value(value) for name, _, value in (change.partition("=") for change in changes)}
    if unknown := sorted(set(fields) - set(STLMConfig().to_dict())):
        raise SystemExit(f"--set {unknown}: not a field of STLMConfig")
    is_checkpoint = is_checkpoint or (Path(model) / "config.json").is_file()
    try:
        config = (STLMConfig.from_pretrained if is_checkpoint else STLMConfig.from_preset)(model, **fields)
        config.validate()  # `from_pretrained` checks the fields of the file alone
        return config
    except (ValueError, StrictDataclassError) as error:
        raise SystemExit(f"{model} {' '.join(changes)}: {error}") from None


def build_model(args: argparse.Namespace) -> STLMForCausalLM:
    """With random weights, or with those of `--checkpoint`; only those of `--only` are trained."""
    if args.checkpoint is None:
        model = AutoModelForCausalLM.from_config(load_config(args.model, args.set))
    else:
        config = load_config(args.checkpoint, args.set, is_checkpoint=True)
        try:
            model = AutoModelForCausalLM.from_pretrained(args.checkpoint, config=config, dtype=torch.float32)
        except RuntimeError as error:  # the library names the shapes before, in its own words
            raise SystemExit(f"--checkpoint {args.checkpoint} --set {' '.join(args.set)}: {error}") from None
    if args.only is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(args.only in name)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            modules = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters()})
            raise SystemExit(f"--only {args.only}: no weight is called so; there are {', '.join(modules)}")
    return model


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every layer for itself, in place. A graph of the whole model would have room for one patch per byte."""
    torch._dynamo.config.recompile_limit = 64  # of one function, which all layers share
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            is_of_patches = isinstance(module, (STLMTrunkAttentionBlock, STLMTrunkFeedForwardBlock))
            # The number of patches changes in every step. A convolution looks up the bytes at document starts, whose number
            # only a full graph holds.
            module.compile(fullgraph=True, dynamic=is_of_patches or None)


def describe_start(args: argparse.Namespace) -> dict:
    """For `results.json`: the preset or folder of the config, and what the weights of `--checkpoint` bring with them."""
    if args.checkpoint is None:
        return {"model": args.model}
    return {"model": args.output.resolve().name, "base_model": describe_base(args.checkpoint)}


def training_arguments(args: argparse.Namespace, step_bytes: float, **changes) -> TrainingArguments:
    if args.max_minutes is None:  # warm up for 2% of the steps
        steps = args.max_steps or max(1, round(args.max_bytes / step_bytes))
        warmup = max(1, int(0.02 * steps))
        decay = {"num_decay_steps": min(int(args.decay * steps), steps - warmup), "decay_type": "linear"}
        schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay}
        schedule |= {"max_steps": steps, "warmup_steps": warmup}
    else:  # the same, but by the clock of `TimeBudget`
        schedule = {"lr_scheduler_type": "constant", "max_steps": 10**9}
    batch = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), per_device(args.batch_size))
    every = {"eval_strategy": "steps", "eval_steps": args.eval_steps, "save_steps": args.eval_steps}
    settings = (
        schedule
        | batch
        | every
        | {"logging_steps": 50, "logging_first_step": True, "save_total_limit": 1, "seed": args.seed}
    )
    settings |= {
        "batch_eval_metrics": True,
        "disable_tqdm": True,
        "bf16": args.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_num_workers": args.workers,
        "report_to": "none",
    }
    return TrainingArguments(str(args.output), **settings | changes)


def optimizer_arguments(args: argparse.Namespace) -> dict[str, float]:
    """Keywords of `MuonRecipe`."""
    return rates_of(args) | {"weight_decay": args.weight_decay}


def train(args: argparse.Namespace, trainer: Trainer, step_bytes: float) -> None:
    """Train, or go on from the newest checkpoint; after a signal, leave."""
    budget = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TimeBudget)]

    def progress(state) -> str:
        megabytes = f"{state.global_step * step_bytes / 1e6:.1f}"
        if budget:
            return f"{budget[0].elapsed_seconds / 60:.1f} of {args.max_minutes:g} min, {megabytes} MB"
        if args.max_steps:
            return f"step {state.global_step} of {state.max_steps}"
        return f"{megabytes} of {state.max_steps * step_bytes / 1e6:.1f} MB"

    begun, checkpoint = args.output / "begun.json", last_checkpoint(args.output)
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings["train"] = names_and_sizes(args.train)
    if checkpoint is not None and begun.is_file():
        recorded = json.loads(begun.read_text())  # of earlier versions: fewer settings, and patterns of the texts
        known = settings.keys() & (recorded.keys() | {"matrix_optimizer"})  # without one it was Muon
        if recorded.get("train", "").startswith("["):
            known -= {"train"}  # `write_once` compares the files
        check_same(begun, recorded | {name: settings[name] for name in known})
    begin(begun, settings, goes_on=False)
    stop = StopOnSignal()
    trainer.remove_callback(PrinterCallback)
    rates = f"--muon_lr {args.muon_lr:g} or --adamw_lr {args.adamw_lr:g}, with a new --output"
    for callback in (stop, SaveByTime(minutes=10), ProgressLines(progress), EndOnDivergence(rates)):
        trainer.add_callback(callback)
    splits = [split for split in SPLITS if split != "train" and getattr(args, split)]
    if is_spent(trainer, checkpoint, args.max_minutes, splits):
        return
    if args.compile:
        compile_layers(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint)
    if args.compile:
        torch.compiler.set_stance("force_eager")  # a last evaluation is not worth graphs of its own
    if stop.received is not None:
        launch_state().print(
            f"{stop.received.name}: saved at {progress(trainer.state)}; the same command goes on from here"
        )
        raise SystemExit(128 + stop.received)


def main(args: argparse.Namespace):
    logging.disable_progress_bar()
    set_seed(args.seed)
    choose_precision(args)
    tokenizer, sets = STLMTokenizer(), {}
    model = build_model(args)  # before anything is written
    for split, path in write_corpora(args, tokenizer, args.output / "data").items():
        with naming(split, getattr(args, split), "Take longer texts and a new --output, or smaller --block_bytes"):
            sets[split] = PackedWindows(path, tokenizer, args.block_bytes)
    tell_of_known(sets)
    launch_state().print(
        f"{args.checkpoint or args.model}: {model.num_parameters():,} parameters, {model.device}, {model.dtype}"
    )
    evaluator, step_bytes = BitsPerByteEvaluator(), args.batch_size * args.block_bytes
    timed = args.max_minutes is not None
    trainer = Trainer(
        model=model,
        args=training_arguments(args, step_bytes),
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        processing_class=tokenizer,
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
        optimizer_cls_and_kwargs=(MuonRecipe, optimizer_arguments(args)),
        callbacks=[TimeBudget(args.max_minutes, decay=args.decay, clock=args.clock)] if timed else [],
    )
    train(args, trainer, step_bytes)
    steps = trainer.state.global_step
    scores = {split: trainer.evaluate(sets[split], metric_key_prefix=split) for split in sets if split != "train"}
    results = {
        **describe_start(args),
        "stored_parameters": model.num_parameters(),
        "steps": steps,
        "bytes_seen": steps * step_bytes,  # special tokens included
        "corpus_bytes": len(sets["train"]) * args.block_bytes,
        "budget": {"minutes": args.max_minutes, "clock": args.clock} if timed else {"steps": steps},
        "bits_per_byte": {split: score[f"{split}_bits_per_byte"] for split, score in scores.items()},
    } | run_info(model.device)
    save(trainer, results, args)


if __name__ == "__main__":
    with quiet_exit():
        main(args)
