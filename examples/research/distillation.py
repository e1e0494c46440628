# SPDX-License-Identifier: Apache-2.0
r"""Does it pay to learn from a teacher? At equal time of the student, and at equal time of all.

    python examples/research/distillation.py        # 24 kB of the shipped Shakespeare: shows that it runs
    python examples/research/distillation.py --train 'corpus/train/*.jsonl.gz' --validation corpus/validation.jsonl.gz \
        --teacher SmolLM2-135M/ --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --windows 1400 --minutes 2 --seeds 1 2 3

The outputs of the teacher are stored once; the same command resumes. Then students of every seed train for the same CPU
time: `distilled` on the stored windows and outputs, `same` on these windows in the same order without a teacher, `fresh`
on all other windows; with `--longer 2 3`, `fresh` also for two and three times as long. Finished students are not
repeated. Prints a table, and writes `OUTPUT/TEACHER.json`.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path


HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # the examples

from inputs import MATRIX_OPTIMIZER, add_bf16, at_least_one, choose_precision, positive, share, whole


TEXT = HERE.parent / "data" / "shakespeare.txt"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", help="files or patterns; by default the shipped text")
    parser.add_argument("--validation", nargs="+", help="files or patterns")
    parser.add_argument(
        "--teacher", nargs="+", default=[str(HERE.parent / "checkpoints" / "stlm-10m-wide")], help="folders"
    )
    parser.add_argument("--gguf_file", help="in the folder of the teacher, read with the package gguf")
    parser.add_argument("--name", help="of the teacher in files and tables; by default that of its folder")
    parser.add_argument("--student", default="stlm-3m", help="preset, fresh weights")
    parser.add_argument("--output", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--windows", type=at_least_one, default=24, help="that the teacher reads")
    parser.add_argument("--validation_windows", type=at_least_one, default=16, help="spread over the validation text")
    parser.add_argument("--block_bytes", type=at_least_one, default=1024, help="bytes per window")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="windows per step")
    parser.add_argument("--minutes", type=positive, default=0.1, help="CPU time of each student")
    parser.add_argument("--longer", nargs="*", type=positive, default=[2], help="times that `fresh` trains, too")
    parser.add_argument("--teacher_weight", type=share, default=0.5, help="of its part of the loss, 0 to 1")
    parser.add_argument("--seeds", nargs="+", type=whole, default=[1, 2])
    add_bf16(parser, "bfloat16 autocast, and weights of a teacher of subwords")
    parser.set_defaults(matrix_optimizer=MATRIX_OPTIMIZER)
    args = parser.parse_args()
    if bool(args.train) != bool(args.validation):
        parser.error("give --train and --validation, or neither for the shipped text")
    args.train, args.validation = args.train or [str(TEXT)], args.validation or [str(TEXT)]
    args.name = args.name or "+".join(Path(name).name for name in args.teacher)
    return args


if __name__ == "__main__":
    args = parse_arguments()

import distill
import torch
from pretrain import write_once
from provenance import run_info
from run_folder import begin, per_device
from stopwatch import Stopwatch
from tables import markdown_table
from torch.utils.data import Subset
from transformers import PrinterCallback, TrainingArguments, logging, set_seed

from modeling_stlm import STLMConfig, STLMForCausalLM, STLMTokenizer
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator, bits_per_byte
from modeling_stlm.training.corpus import PackedWindows
from modeling_stlm.training.distillation import (
    DistillationTrainer,
    StoredTeacher,
    store_teacher,
    teacher_log_probs,
)
from modeling_stlm.training.optimizer import MuonRecipe
from modeling_stlm.training.time_budget import TimeBudget


def prepare(args: argparse.Namespace) -> dict[str, Subset]:
    """Windows in random order, those that the teacher reads and all after them; and for validation."""
    tokenizer, windows = STLMTokenizer(), {}
    for split in ("train", "validation"):
        path = write_once(args.output / "data" / f"{split}.bin", getattr(args, split), tokenizer)
        windows[split] = PackedWindows(path, tokenizer, args.block_bytes)
    # Not those that start inside a character.
    order = [
        i for i in range(len(windows["train"])) if windows["train"][i]["input_ids"][0] & 0b1100_0000 != 0b1000_0000
    ]
    random.Random(0).shuffle(order)
    every = max(1, len(windows["validation"]) // args.validation_windows)
    return {
        "same": Subset(windows["train"], order[: args.windows]),
        "fresh": Subset(windows["train"], order[args.windows :]),
        "validation": Subset(
            windows["validation"], range(0, len(windows["validation"]), every)[: args.validation_windows]
        ),
    }


def settings(args: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(args, name) for name in names}


def store(args: argparse.Namespace, windows: Subset) -> tuple[StoredTeacher, float]:
    """The outputs of the teacher, and the CPU time in seconds that they took, without loading it."""
    path = args.output / f"{args.name}.bin"
    clock, begun = path.with_suffix(".seconds.json"), path.with_suffix(".begun.json")
    teachers = [str(Path(name)) for name in args.teacher]
    made_with = {"teacher": teachers, **settings(args, "gguf_file", "windows")}
    begin(begun, made_with, goes_on=begun.is_file() or path.is_file())
    if not path.is_file():
        teacher = distill.load_teacher(args.teacher, args.gguf_file, args.bf16)
        spent = json.loads(clock.read_text()) if clock.is_file() else 0.0
        start = time.process_time()

        def counted():
            for number, window in enumerate(windows):
                clock.write_text(json.dumps(spent + time.process_time() - start))
                if number % 50 == 0:
                    print(f"teacher: {number} of {len(windows)} windows", flush=True)
                yield window

        store_teacher(path, teacher, counted())
        clock.write_text(json.dumps(spent + time.process_time() - start))
    return StoredTeacher(path), json.loads(clock.read_text())


@torch.no_grad()
def teacher_bits(teacher: StoredTeacher, windows: Subset) -> float:
    """Bits per byte of the teacher on the windows it read. What is not stored of a position counts as spread evenly."""
    nats = count = 0
    for window in windows:
        labels = window["labels"][1:]
        log_probs = teacher_log_probs(teacher, {name: value[None] for name, value in window.items()})[0, :-1]
        said = (labels >= 0) & (labels < 256) & (log_probs > -torch.inf).any(-1)
        log_probs, labels = log_probs[said], labels[said]
        others = (log_probs == -torch.inf).sum(-1)
        spread = (1 - log_probs.exp().sum(-1)).clamp(min=1e-8).log() - others.log()
        found = log_probs.gather(1, labels[:, None])[:, 0]
        nats -= torch.where(found > -torch.inf, found, spread).double().sum().item()
        count += len(labels)
    return bits_per_byte(nats, count)


def train(args: argparse.Namespace, sets: dict[str, Subset], arm: str, longer: float, seed: int, teacher) -> dict:
    """A student of one kind; one that is finished is not trained again."""
    minutes = longer * args.minutes
    kind = f"{args.name}-{args.teacher_weight:g}" if arm == "distilled" else arm
    name = f"{kind}-{args.windows}-{minutes:g}min-{seed}"
    folder = args.output / "students" / name
    path = folder / "results.json"
    if path.is_file():
        return json.loads(path.read_text())
    set_seed(seed)
    evaluator, watch = BitsPerByteEvaluator(), Stopwatch()
    trainer = DistillationTrainer(
        STLMForCausalLM(STLMConfig.from_preset(args.student)),
        TrainingArguments(
            str(folder),
            max_steps=10**9,
            lr_scheduler_type="constant",  # TimeBudget has the schedule
            per_device_train_batch_size=per_device(args.batch_size),
            per_device_eval_batch_size=args.batch_size,
            logging_steps=50,
            seed=seed,
            save_strategy="no",
            batch_eval_metrics=True,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=sets["fresh" if arm == "fresh" else "same"],
        eval_dataset=sets["validation"],
        processing_class=STLMTokenizer(),
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
        optimizer_cls_and_kwargs=(MuonRecipe, {"muon_lr": 0.02, "adamw_lr": 4e-3}),
        callbacks=[TimeBudget(minutes, clock="cpu"), watch],
        teacher=teacher,
        teacher_weight=args.teacher_weight if arm == "distilled" else 0.0,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    results = {
        "student": arm,
        "seed": seed,
        "minutes": minutes,
        "steps": trainer.state.global_step,
        "passes": round(trainer.state.epoch, 3),
        "wall_seconds": round(watch.wall_seconds, 1),
        "bits_per_byte": trainer.evaluate()["eval_bits_per_byte"],
    }
    trainer.model.config.use_cache = True  # Trainer turns it off
    trainer.save_model()
    for checkpoint in folder.glob("checkpoint-*"):  # TimeBudget asks for one at the end
        shutil.rmtree(checkpoint)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results), flush=True)
    return results


def spread(values: list[float], sign: str = "") -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}"


def main(args: argparse.Namespace):
    logging.disable_progress_bar()
    choose_precision(args)
    shared = settings(args, "student", "block_bytes", "batch_size", "matrix_optimizer", "validation_windows", "bf16")
    begun = args.output / "begun.json"
    begin(begun, shared, goes_on=begun.is_file() or (args.output / "students").is_dir())
    sets = prepare(args)
    teacher, seconds = store(args, sets["same"])
    kinds = [("distilled", 1.0), ("same", 1.0), ("fresh", 1.0), *(("fresh", longer) for longer in args.longer)]
    students = {kind: [train(args, sets, *kind, seed, teacher) for seed in args.seeds] for kind in kinds}
    results = {
        "teacher": args.name,
        "teacher_minutes": round(seconds / 60, 2),
        "teacher_bits_per_byte": teacher_bits(teacher, sets["same"]),
        "bytes": len(sets["same"]) * args.block_bytes,
        "students": [result for kind in kinds for result in students[kind]],
    }
    files = {split: " ".join(Path(file).name for file in getattr(args, split)) for split in ("train", "validation")}
    arguments = (
        vars(args) | files | {"teacher": [Path(name).name for name in args.teacher], "output": args.output.name}
    )
    results |= {"arguments": {name: str(value) for name, value in arguments.items()}} | run_info()
    (args.output / f"{args.name}.json").write_text(json.dumps(results, indent=1) + "\n")

    reached = [result["bits_per_byte"] for result in students["distilled", 1.0]]
    rows = []
    for (arm, longer), found in students.items():
        bits = [result["bits_per_byte"] for result in found]
        extra = results["teacher_minutes"] if arm == "distilled" else 0
        differences = [other - mine for mine, other in zip(reached, bits)]
        minutes, passes = longer * args.minutes, statistics.mean(result["passes"] for result in found)
        rows.append(
            [arm, f"{minutes:g}", f"{minutes + extra:.1f}", f"{passes:.1f}", spread(bits), spread(differences, "+")]
        )
    print(
        f"{args.name} read {results['bytes']:,} bytes in {results['teacher_minutes']} minutes of CPU time, "
        f"{results['teacher_bits_per_byte']:.4f} bits per byte; {len(args.seeds)} seeds, standard deviation\n"
    )
    head = ["", "minutes of the student", "of all", "passes", "bits per byte", "more than distilled, by seed"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main(args)
