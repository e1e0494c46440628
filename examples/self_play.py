# SPDX-License-Identifier: Apache-2.0
r"""Self-play on summaries (SPIN, arXiv:2401.01335): does a model gain from telling its own text from the real one?

    python examples/self_play.py                                       # 16 shipped dialogues: seconds, and no result
    python examples/self_play.py --checkpoint runs/summaries/full --train dialogsum/train.jsonl.gz \
        --test dialogsum/test.jsonl.gz --train_rows 512 --output runs/spin

Start from a model that was fine-tuned on the task, such as that of `summarize.py`, whose files and measures these are.
Prints ROUGE and bits per byte by round. The same command resumes an interrupted run. Needs trl.
"""

import argparse
import json
from pathlib import Path

from inputs import at_least_one, choose_precision, positive, quiet_exit, require, summary_parser
from rows import summary_sets


MAY_CHANGE = ("output", "num_rounds")  # where a self-play goes on


def parse_arguments() -> argparse.Namespace:
    parser = summary_parser(__doc__, own=("begun.json",))
    parser.set_defaults(output="runs/self-play")
    parser.add_argument("--num_rounds", type=at_least_one, default=3, help="of generation and training")
    parser.add_argument("--max_steps", type=at_least_one, default=10, help="steps in a round")
    parser.add_argument("--learning_rate", type=positive, default=1e-5, help="of AdamW")
    parser.add_argument("--beta", type=positive, default=0.1, help="lambda of the paper")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets", "evaluate", "matplotlib", "peft", "trl")
    with quiet_exit():
        train, test = summary_sets(args)  # before the slow imports: a mistake is told at once

import torch
from run_folder import begin, is_finite, names_and_sizes, per_device
from summarize import record, scores_of, table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from modeling_stlm.training.self_play import SelfPlayConfig, SelfPlayTrainer


def main(args: argparse.Namespace, train: list[dict], test: list[dict]):
    choose_precision(args)
    played = args.output / "rounds.json"
    files = {name: names_and_sizes([path]) for name in ("train", "test") if (path := getattr(args, name))}
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE} | files
    begun = args.output / "begun.json"
    begin(begun, settings, goes_on=begun.is_file() or played.is_file())
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    print(f"{args.checkpoint}: {model.num_parameters():,} parameters, {model.device}, {model.dtype}")

    def measure(model) -> dict[str, float]:
        if not is_finite(model):
            raise SystemExit(
                "the training diverged, its weights are not finite: lower --learning_rate, with a new --output"
            )
        return scores_of(model, tokenizer, test, args)[0]

    trainer = SelfPlayTrainer(
        model,
        args=SelfPlayConfig(
            output_dir=str(args.output),
            num_rounds=args.num_rounds,
            max_new_tokens=args.summary_bytes,
            max_length=args.text_bytes + 2 * args.summary_bytes,
            max_steps=args.max_steps,
            per_device_train_batch_size=per_device(args.batch_size),
            learning_rate=args.learning_rate,
            beta=args.beta,
            bf16=args.bf16,
            activation_checkpointing=False,
            save_steps=50,
            report_to="none",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=train,
        processing_class=tokenizer,
        compute_round_metrics=measure,
    )
    if played.is_file():
        print(f"{args.output}: goes on after round {len(json.loads(played.read_text())) - 1} of {args.num_rounds}")
    rounds = trainer.train(resume_from_checkpoint=True)
    for index, scores in enumerate(rounds):
        scores = {name: value for name, value in scores.items() if name != "round"}
        record(Path(trainer.folder(index)), args, index * args.max_steps, scores)
    print(table({f"round {scores['round']}": scores for scores in rounds}))
    print(json.dumps(rounds))


if __name__ == "__main__":
    with quiet_exit():
        main(args, train, test)
