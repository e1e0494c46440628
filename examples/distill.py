# SPDX-License-Identifier: Apache-2.0
r"""Train a small STLM on a text and on what a larger model says about it, beside one that sees only the text.

    python examples/distill.py                             # the shipped stlm-10m-wide teaches a fresh stlm-3m, 2 minutes
    python examples/distill.py --teacher runs/a runs/b     # several checkpoints: a committee
    python examples/distill.py --teacher SmolLM2-135M/ --gguf_file SmolLM2-135M-Instruct.Q4_1.gguf --text my.txt \
        --windows 4000 --max_steps 2000 --output runs/distilled

The teacher may be any causal language model with a byte-level tokenizer or byte fallback. What a model of subwords says is
slow to compute (SmolLM2-135M: 1.5 s for 1 kB on one core with bfloat16 instructions, 4 s without), so it is written once to
`OUTPUT/TEACHER.bin`; after an interruption the same command goes on. Both students see the same windows in the same
order. Prints bits per byte on the last tenth of the text; writes `results.json` and the
distilled student.
"""

import argparse
import json
import time
from pathlib import Path

from inputs import (
    HelpFormatter,
    add_bf16,
    add_rates,
    at_least_one,
    checkpoint,
    choose_precision,
    output_of,
    preset,
    quiet_exit,
    rates_of,
    read_text,
    require,
    share,
    text_file,
    whole,
)


HERE = Path(__file__).parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--teacher", nargs="+", default=[str(HERE / "checkpoints" / "stlm-10m-wide")], help="folder or Hub id"
    )
    parser.add_argument("--gguf_file", help="in the folder of the teacher, read with the package gguf")
    parser.add_argument("--student", type=preset, default="stlm-3m", help="preset, fresh weights")
    parser.add_argument(
        "--text", type=text_file, default=HERE / "data" / "shakespeare.txt", help="nine tenths train, the rest tests"
    )
    parser.add_argument("--output", type=output_of("STLMForCausalLM"), default="runs/distilled", help="folder")
    parser.add_argument(
        "--windows", type=at_least_one, default=256, help="of the text to train on; the teacher reads each once"
    )
    parser.add_argument("--block_bytes", type=at_least_one, default=512, help="bytes per window")
    parser.add_argument("--max_steps", type=at_least_one, default=60, help="of each student")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="windows per step")
    parser.add_argument("--teacher_weight", type=share, default=0.5, help="of its part of the loss, 0 to 1")
    add_rates(parser)
    add_bf16(parser, "bfloat16 autocast, and weights of a teacher of subwords")
    parser.add_argument("--seed", type=whole, default=1, help="of weights and order")
    args = parser.parse_args()
    if not args.gguf_file:
        for name in args.teacher:
            try:
                checkpoint(name)
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument --teacher: {error}")
    return args


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "matplotlib")

import torch
from run_folder import begin, names_and_sizes, per_device, run_info, saved_at_the_end
from torch.utils.data import Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from modeling_stlm import STLMCommittee, STLMConfig, STLMForCausalLM, STLMTokenizer
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows, ids_are_bytes, write_corpus
from modeling_stlm.training.distillation import DistillationTrainer, StoredTeacher, SubwordTeacher, store_teacher
from modeling_stlm.training.optimizer import MuonRecipe


def load_teacher(names: list[str], gguf_file: str | None, bf16: bool):
    """A model of bytes, a committee of these, or a `SubwordTeacher`."""
    options = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizers = [AutoTokenizer.from_pretrained(name, **options) for name in names]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if all(map(ids_are_bytes, tokenizers)):
        models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options) for name in names]
        return (STLMCommittee.from_members(models) if len(models) > 1 else models[0]).to(device)
    if len(names) > 1:
        raise SystemExit(f"--teacher {' '.join(names)}: expected one model of subwords, or models of bytes alone")
    # On a CPU bfloat16 is twice as fast, and eager attention faster than sdpa, which has a mask to read here.
    options |= {"dtype": torch.bfloat16 if bf16 else torch.float32, "attn_implementation": "eager"}
    return SubwordTeacher(AutoModelForCausalLM.from_pretrained(names[0], **options).to(device), tokenizers[0])


def train(args: argparse.Namespace, sets: dict, teacher, teacher_weight: float) -> tuple[DistillationTrainer, dict]:
    set_seed(args.seed)
    evaluator = BitsPerByteEvaluator()
    trainer = DistillationTrainer(
        STLMForCausalLM(STLMConfig.from_preset(args.student)),
        TrainingArguments(
            str(args.output / "trainer"),
            max_steps=args.max_steps,
            per_device_train_batch_size=per_device(args.batch_size),
            per_device_eval_batch_size=args.batch_size,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": int(0.6 * args.max_steps), "decay_type": "linear"},
            warmup_steps=max(1, args.max_steps // 50),
            logging_steps=max(1, args.max_steps // 10),
            seed=args.seed,
            save_strategy="no",
            batch_eval_metrics=True,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        processing_class=STLMTokenizer(),
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
        optimizer_cls_and_kwargs=(MuonRecipe, rates_of(args)),
        teacher=teacher,
        teacher_weight=teacher_weight,
    )
    start = time.monotonic()
    with saved_at_the_end(trainer):
        trainer.train()
    seconds = time.monotonic() - start
    return trainer, {"bits_per_byte": trainer.evaluate()["eval_bits_per_byte"], "seconds": seconds}


def main(args: argparse.Namespace):
    choose_precision(args)
    text = read_text(args.text, min_bytes=10 * (args.block_bytes + 2)).encode()
    tokenizer, cut, sets = STLMTokenizer(), len(text) * 9 // 10, {}
    for split, part in (("train", text[:cut]), ("validation", text[cut:])):
        path = write_corpus(args.output / "data" / f"{split}.bin", [part], tokenizer)
        sets[split] = PackedWindows(path, tokenizer, args.block_bytes)
    sets["train"] = Subset(sets["train"], range(min(args.windows, len(sets["train"]))))
    print(f"{len(sets['train'])} windows of {args.block_bytes} bytes, student {args.student}, teacher {args.teacher}")

    teacher, results = load_teacher(args.teacher, args.gguf_file, args.bf16), {}
    if isinstance(teacher, SubwordTeacher):
        path, start = args.output / f"{Path(args.teacher[0]).name}.bin", time.monotonic()
        begun, names = path.with_suffix(".begun.json"), ("gguf_file", "windows", "block_bytes", "bf16")
        settings = {"teacher": str(Path(args.teacher[0])), "text": names_and_sizes([args.text])}
        settings |= {name: getattr(args, name) for name in names}
        begin(begun, settings, goes_on=begun.is_file() or path.is_file())
        if not path.is_file():
            store_teacher(path, teacher, sets["train"])
            results["teacher_seconds"] = time.monotonic() - start
        teacher = StoredTeacher(path)
    _, results["plain"] = train(args, sets, teacher, 0.0)
    trainer, results["distilled"] = train(args, sets, teacher, args.teacher_weight)
    trainer.model.config.use_cache = True  # Trainer turns it off
    trainer.save_model(args.output)
    files = {"train": f"nine tenths of {args.text.name}", "validation": f"last tenth of {args.text.name}"}
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "text")} | files
    settings["teacher"] = " ".join(Path(name).name for name in args.teacher)
    results |= {
        "model": args.student,
        "stored_parameters": trainer.model.num_parameters(),
        "steps": args.max_steps,
        "bytes_seen": args.max_steps * args.batch_size * args.block_bytes,  # special tokens included
        "budget": {"steps": args.max_steps},
        "bits_per_byte": {"validation": results["distilled"]["bits_per_byte"]},
        "arguments": {name: str(value) for name, value in settings.items()},
    } | run_info(trainer.model.device)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name in ("plain", "distilled"):
        print(f"{name}: {results[name]['bits_per_byte']:.4f} bits per byte, {results[name]['seconds']:.0f} s")


if __name__ == "__main__":
    with quiet_exit():
        main(args)
