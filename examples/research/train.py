# SPDX-License-Identifier: Apache-2.0
r"""Train STLM or one of its controls under the same budget and recipe, and record what the training cost.

    python examples/research/train.py --train 'corpus/train/*.jsonl.gz' --validation corpus/validation.jsonl.gz \
        --model llama-bpe --like stlm-10m --vocab_size 8192 --muon_lr 0.007 --adamw_lr 0.0014 --max_minutes 60 --clock cpu \
        --output runs/llama-bpe

The arguments and files are those of `examples/pretrain.py`. `--model llama-bytes` and `--model llama-bpe` are the
controls of `controls.py` at the stored size of `--like`; a third of the default rates suits them better, with Muon (LOG.md). `results.json` also has the time, the patch length and the
operations, which `ablate.py` and `report.py` read.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from controls import llama_config, train_bpe
from costs import bytes_per_patch, effective_parameters, flops_per_byte
from provenance import run_info
from stopwatch import Stopwatch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    logging,
    set_seed,
)


sys.path.append(str(Path(__file__).parents[1]))  # the examples

import pretrain
from inputs import at_least_one, positive
from run_folder import launch_state, save
from score import bytes_per_token, documents, token_bytes

from modeling_stlm import STLMConfig, STLMForCausalLM, STLMTokenizer
from modeling_stlm.training import objectives
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows
from modeling_stlm.training.dropout_schedule import DropoutSchedule
from modeling_stlm.training.optimizer import MuonRecipe
from modeling_stlm.training.patch_curriculum import PatchLengthCurriculum
from modeling_stlm.training.repetition import LearnedRepetitionPenalty  # noqa: F401  (an objective)
from modeling_stlm.training.replay import ReplayRounds, ReplayWindows
from modeling_stlm.training.time_budget import TimeBudget


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser, budget = pretrain.argument_parser(controls=("llama-bytes", "llama-bpe"))
    parser.description = __doc__
    budget.add_argument("--max_flops", type=positive, help="operations of forward and backward pass")
    parser.add_argument("--data", type=Path, help="folder for the corpora; by default in the output folder")
    parser.add_argument("--like", default="stlm-3m", help="preset whose stored size the controls take")
    parser.add_argument(
        "--vocab_size", type=at_least_one, default=4096, help='of llama-bpe and of patching="vocabulary"'
    )
    parser.add_argument(
        "--curriculum_steps", type=at_least_one, help='of patching="learned": steps to the full patch length'
    )
    parser.add_argument(
        "--replay", type=at_least_one, help="after one pass, replay one in so many of the windows, the hardest"
    )
    parser.add_argument(
        "--objective",
        nargs="+",
        action="append",
        default=[],
        help="besides the next byte, as in `--objective MultiByte 4 0.3`: class, its arguments, weight; may be repeated",
    )
    parser.add_argument(
        "--dropout", nargs=2, help="schedule of DropoutSchedule and probability, for a budget in steps"
    )
    parser.add_argument("--eval_at_end", action="store_true", help="evaluate only the last checkpoint")
    args = parser.parse_args(arguments)
    if args.compile and args.dropout and args.dropout[0] != "constant":
        parser.error("--compile and a --dropout that changes: layers would be compiled again at every change")
    if args.max_minutes is not None and args.dropout and args.dropout[0] != "constant":
        parser.error("--max_minutes and a --dropout that changes: by steps, so give --max_bytes or --max_steps")
    try:
        objectives_of(args.objective)
    except (TypeError, ValueError) as error:  # before the corpora are written
        parser.error(f"--objective {args.objective}: {error}")
    if args.checkpoint is None and "LearnedRepetitionPenalty" in (name for name, *_ in args.objective):
        parser.error("--objective LearnedRepetitionPenalty follows the weights of a trained model: give --checkpoint")
    return args


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, dict[str, Path]]:
    """The tokenizer, which for `llama-bpe` is trained once, and the corpora in its ids."""
    is_bpe = args.model == "llama-bpe"
    folder = (args.data or args.output / "data") / (f"bpe-{args.vocab_size}" if is_bpe else "bytes")
    tokenizer = STLMTokenizer()
    if is_bpe:
        path = folder / "tokenizer"
        with launch_state().main_process_first():
            if not path.is_dir():
                train_bpe(documents(args.train), args.vocab_size).save_pretrained(path)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer, pretrain.write_corpora(args, tokenizer, folder)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    if args.checkpoint is None and args.model.startswith("llama-"):
        if args.set or args.only:
            raise SystemExit(f"--set {args.set}, --only {args.only}: the controls have no fields and names of STLM")
        with torch.device("meta"):
            stored = AutoModelForCausalLM.from_config(STLMConfig.from_preset(args.like)).num_parameters()
        return AutoModelForCausalLM.from_config(llama_config(tokenizer, stored))
    is_by_vocabulary = {"patching=vocabulary", 'patching="vocabulary"'} & set(args.set)
    if is_by_vocabulary and not any(change.startswith("patch_vocabulary=") for change in args.set):
        # Sorted: the order of `get_vocab` is another one in each process, and a run that goes on compares its settings.
        pieces = " ".join(sorted(train_bpe(documents(args.train), args.vocab_size).get_vocab()))
        args.set = [*args.set, f"patch_vocabulary={json.dumps(pieces)}"]
    return pretrain.build_model(args)


def objectives_of(chosen: list[list[str]]) -> list[tuple[objectives.Objective, float]]:
    """Those of `--objective`, each with its weight."""
    known = {
        each.__name__: each
        for each in objectives.Objective.__subclasses__()
        if each.__module__.startswith("modeling_stlm.") and each is not objectives.WeightedSum
    }
    pairs = []
    for name, *arguments in chosen:
        if name not in known or not arguments:
            raise ValueError(f"expected one of {', '.join(sorted(known))}, its arguments and a weight")
        *arguments, weight = map(json.loads, arguments)
        pairs.append((known[name](*arguments), float(weight)))
    return pairs


def main():
    args = parse_arguments()
    info = run_info()  # of the code that runs, not of what is committed meanwhile
    logging.disable_progress_bar()
    set_seed(args.seed)
    pretrain.choose_precision(args)
    tokenizer, corpora = prepare(args)
    model = build_model(args, tokenizer)
    launch_state().print(
        f"{args.checkpoint or args.model}: {model.num_parameters():,} stored parameters, {model.device}, {model.dtype}"
    )

    sizes = token_bytes(tokenizer)
    # A window has as many ids in training as in evaluation; what is read is counted in bytes of the training text.
    id_bytes = bytes_per_token(PackedWindows(corpora["validation"], tokenizer, 1).ids, sizes)
    training_id_bytes = bytes_per_token(PackedWindows(corpora["train"], tokenizer, 1).ids, sizes)
    block_size = round(args.block_bytes / id_bytes)
    sets = {split: PackedWindows(path, tokenizer, block_size) for split, path in corpora.items()}
    pretrain.tell_of_known(sets)
    windows = sets["validation"]
    sample = torch.stack([windows[i]["input_ids"] for i in range(0, len(windows), -(-len(windows) // 16))])

    def bytes_per_unit() -> float:
        return bytes_per_patch(model, sample.to(model.device)) if isinstance(model, STLMForCausalLM) else id_bytes

    # An untrained router does not tell the patch length it will be trained for.
    is_routed = isinstance(model, STLMForCausalLM) and model.config.patching == "learned"
    length = model.config.patch_bytes if is_routed else bytes_per_unit()
    flops = flops_per_byte(model, length, args.block_bytes)
    launch_state().print(
        f"{len(sets['train']):,} windows of {block_size} ids, {length:.2f} bytes per patch or token, "
        f"{flops / 1e6:.2f} MFLOP per byte"
    )

    timed = args.max_minutes is not None
    step_bytes = args.batch_size * block_size * training_id_bytes
    validation_step_bytes = args.batch_size * block_size * id_bytes  # `flops` is of a byte of the validation text
    if args.max_flops is not None:
        args.max_bytes = args.max_flops / (3 * flops * validation_step_bytes) * step_bytes
    stopwatch = Stopwatch()
    callbacks = [stopwatch, *([TimeBudget(args.max_minutes, decay=args.decay, clock=args.clock)] if timed else [])]
    if args.curriculum_steps:
        callbacks.append(PatchLengthCurriculum(args.curriculum_steps))
    changes, train_set = {"eval_strategy": "no"} if args.eval_at_end else {}, sets["train"]
    if args.replay:
        train_set, changes = ReplayWindows(train_set, args.replay), changes | ReplayRounds.arguments
        callbacks.append(ReplayRounds(args.seed))
    if args.dropout:
        callbacks.append(DropoutSchedule(args.dropout[0], float(args.dropout[1])))
    evaluator = BitsPerByteEvaluator(sizes)
    trainer = Trainer(
        model=objectives.with_objectives(model, objectives_of(args.objective)) if args.objective else model,
        args=pretrain.training_arguments(args, step_bytes, **changes),
        train_dataset=train_set,
        eval_dataset=windows,
        processing_class=tokenizer,
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
        optimizer_cls_and_kwargs=(MuonRecipe, pretrain.optimizer_arguments(args)),
        callbacks=callbacks,
    )
    pretrain.train(args, trainer, step_bytes)

    steps = trainer.state.global_step
    scores = {split: trainer.evaluate(sets[split], metric_key_prefix=split) for split in sets if split != "train"}
    bytes_seen = round(steps * step_bytes)
    length = bytes_per_unit()
    flops = flops_per_byte(model, length, args.block_bytes)
    results = {
        **pretrain.describe_start(args),
        "stored_parameters": model.num_parameters(),
        "effective_parameters": effective_parameters(model),
        "bytes_per_patch_or_token": round(length, 3),
        "bytes_per_training_id": training_id_bytes,
        "flops_per_byte": round(flops),
        "steps": steps,
        "bytes_seen": bytes_seen,
        "corpus_bytes": round(len(sets["train"]) * block_size * training_id_bytes),
        "training_flops": 3 * flops * steps * validation_step_bytes,
        "wall_seconds": round(stopwatch.wall_seconds),
        "cpu_seconds": round(stopwatch.cpu_seconds),
        "budget": {"minutes": args.max_minutes, "clock": args.clock} if timed else {"steps": steps},
        "bits_per_byte": {split: score[f"{split}_bits_per_byte"] for split, score in scores.items()},
        "config": {name: value for name, value in model.config.to_diff_dict().items() if name != "auto_map"},
    }
    args.data = None
    save(trainer, results | info, args)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
