# SPDX-License-Identifier: Apache-2.0
"""Start a smaller model from the weights of a larger one, and see how many steps that saves (arXiv:2402.02791).

    python examples/inherit.py                         # a third of the shipped stlm-10m-wide, on the shipped Shakespeare
    python examples/inherit.py --train 'texts/*.txt' --validation held_out.txt --max_steps 1000 --output runs/small
    python examples/inherit.py --set trunk_intermediate_size=384 --importance taylor

The same model is trained from random weights and from the inherited ones, with the same data, rates and seed. Prints
bits per byte of both while they train and the steps that each needs to equal loss; saves the inherited model and tokenizer.
"""

import argparse
from itertools import islice
from pathlib import Path

from inputs import (
    HelpFormatter,
    add_rates,
    at_least_one,
    causal_checkpoint,
    config_change,
    file_pattern,
    naming,
    output_of,
    quiet_exit,
    rates_of,
    require,
    whole,
)


HERE = Path(__file__).parent
TEXT = HERE / "data" / "shakespeare.txt"
# About the sizes of `stlm-3m`; heads of 32 channels cannot become its heads of 64. 7,400 rows divide 29,600.
THIRD = "hidden_size=128 intermediate_size=256 num_attention_heads=4 num_key_value_heads=4 ngram_rows=7400 trunk_hidden_size=256 "
THIRD += "trunk_intermediate_size=432 num_trunk_layers=4 num_unique_trunk_layers=3 trunk_num_attention_heads=8"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=causal_checkpoint,
        default=str(HERE / "checkpoints" / "stlm-10m-wide"),
        help="folder of the larger model",
    )
    parser.add_argument(
        "--set",
        type=config_change,
        nargs="*",
        default=THIRD.split(),
        metavar="FIELD=VALUE",
        help="sizes of the smaller one",
    )
    parser.add_argument(
        "--importance",
        choices=("l2", "taylor"),
        default="l2",
        help="of rows and columns: by their size, or by their effect on the loss",
    )
    parser.add_argument(
        "--data_batches", type=whole, default=8, help="batches for taylor and for n-gram tables; 0 for none"
    )
    parser.add_argument(
        "--train", type=file_pattern, nargs="+", help="files or patterns; by default nine tenths of the shipped text"
    )
    parser.add_argument(
        "--validation", type=file_pattern, nargs="+", help="files or patterns; by default the rest of it"
    )
    parser.add_argument("--output", type=output_of("STLMForCausalLM"), default="runs/inherited", help="folder")
    parser.add_argument("--max_steps", type=at_least_one, default=100, help="of each training")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="windows of 1024 bytes per step")
    add_rates(parser)
    parser.add_argument("--seed", type=whole, default=1, help="of weights and order")
    args = parser.parse_args()
    if bool(args.train) != bool(args.validation):
        parser.error("give --train and --validation, or neither for the shipped text")
    return args


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets", "matplotlib")

import torch
from pretrain import load_config
from run_folder import per_device, saved_at_the_end, write_results
from score import documents
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows, write_corpus
from modeling_stlm.training.inheritance import inherit
from modeling_stlm.training.optimizer import MuonRecipe


def make_windows(args: argparse.Namespace, tokenizer) -> dict[str, PackedWindows]:
    text = TEXT.read_bytes()
    shipped = {"train": [text[: len(text) * 9 // 10]], "validation": [text[len(text) * 9 // 10 :]]}
    windows = {}
    for split, default in shipped.items():
        files = getattr(args, split)
        path = args.output / "data" / f"{split}.bin"
        with naming(split, files or [str(TEXT)], "Take longer texts"):
            write_corpus(path, documents(files) if files else default, tokenizer)
            windows[split] = PackedWindows(path, tokenizer, block_size=1024)
    return windows


def train(model: PreTrainedModel, args: argparse.Namespace, windows: dict[str, PackedWindows]) -> dict[int, float]:
    """Bits per byte on the validation text by step. The rate is constant, so that every step counts the same."""
    evaluator = BitsPerByteEvaluator()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.max_steps,
            per_device_train_batch_size=per_device(args.batch_size),
            per_device_eval_batch_size=args.batch_size,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=max(1, args.max_steps // 20),
            eval_strategy="steps",
            eval_steps=max(1, args.max_steps // 10),
            eval_on_start=True,
            save_strategy="no",
            batch_eval_metrics=True,
            report_to="none",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=windows["train"],
        eval_dataset=windows["validation"],
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
        optimizer_cls_and_kwargs=(MuonRecipe, rates_of(args)),
    )
    with saved_at_the_end(trainer):
        trainer.train()
    logs = trainer.state.log_history
    return {log["step"]: log["eval_bits_per_byte"] for log in logs if "eval_bits_per_byte" in log}


def steps_to(loss: float, curve: dict[int, float]) -> float | None:
    """Step at which a curve first reaches `loss`, on straight lines between evaluations."""
    steps, losses = list(curve), list(curve.values())
    for i, reached in enumerate(losses):
        if reached <= loss:
            share = (losses[i - 1] - loss) / (losses[i - 1] - reached) if i else 0
            return steps[i - 1] + share * (steps[i] - steps[i - 1]) if i else 0
    return None


def main(args: argparse.Namespace):
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    larger = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    config = load_config(args.checkpoint, args.set, is_checkpoint=True)
    windows = make_windows(args, tokenizer)
    data = islice(DataLoader(windows["train"], args.batch_size), args.data_batches) if args.data_batches else None
    models = {
        "random": AutoModelForCausalLM.from_config(config),
        "inherited": inherit(larger, config, args.importance, data),
    }
    print(f"{larger.num_parameters():,} parameters to {models['inherited'].num_parameters():,}")
    curves = {name: train(model, args, windows) for name, model in models.items()}

    print(f"\n{'step':>6} {'random':>10} {'inherited':>10}")
    for step, bits in curves["random"].items():
        print(f"{step:>6} {bits:>10.3f} {curves['inherited'][step]:>10.3f}")
    for share in (2, 1):
        step = max(step for step in curves["random"] if step <= args.max_steps / share)
        loss = curves["random"][step]
        inherited = steps_to(loss, curves["inherited"])
        reached = "not reached" if inherited is None else f"{inherited:.0f} steps"
        print(f"{loss:.3f} bits per byte: {step} steps from random weights, from inherited ones {reached}")

    model = models["inherited"]
    model.config.use_cache = True  # Trainer turns it off, and would save it so
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    write_results(
        args.output,
        args.checkpoint,
        steps=args.max_steps,
        scores={"validation": {"bits_per_byte": curves["inherited"][max(curves["inherited"])]}},
        arguments={
            "block_bytes": 1024,
            **{name: getattr(args, name) for name in ("batch_size", "importance", "matrix_optimizer")},
        },
    )


if __name__ == "__main__":
    with quiet_exit():
        main(args)
