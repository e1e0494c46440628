# SPDX-License-Identifier: Apache-2.0
"""Summaries of dialogues and meetings: zero-shot, LoRA and full fine-tuning beside trivial baselines.

    python examples/summarize.py                                       # 16 shipped dialogues: seconds, and no result
    python examples/summarize.py --train dialogsum/train.jsonl.gz --test dialogsum/test.jsonl.gz --max_steps 600

The question of Tiny Titans (arXiv:2402.00841). Files are JSON lines as DialogSum (`dialogue`, `summary` or `summary1` to
`summary3`) or QMSum (`meeting_transcripts`, `general_query_list`) ships them. Texts are cut to their first `--text_bytes`.

Prints ROUGE, with several references that of the best one, and bits per byte of the first reference. ROUGE comes from
`evaluate.load` on the file of the installed package, so that nothing is asked of the Hub. The full fine-tuned model is
saved to `OUTPUT/full`, from where `self_play.py` may go on, the adapter to `OUTPUT/lora`.
"""

import argparse
import json
from pathlib import Path

from inputs import at_least_one, choose_precision, positive, quiet_exit, require, summary_parser
from rows import summary_sets


def parse_arguments() -> argparse.Namespace:
    parser = summary_parser(__doc__)
    parser.add_argument("--max_steps", type=at_least_one, default=20, help="of each training")
    parser.add_argument("--learning_rate", type=positive, default=1e-3, help="of AdamW")
    parser.add_argument("--lora_rank", type=at_least_one, default=16, help="of the adapter")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets", "evaluate", "matplotlib", "peft")
    with quiet_exit():
        train, test = summary_sets(args)  # before the slow imports: a mistake is told at once

import evaluate
import torch
from peft import LoraConfig, get_peft_model
from run_folder import per_device, run_info, saved_at_the_end, write_results
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

import modeling_stlm  # noqa: F401  (registers the Auto classes)
from modeling_stlm.training import rouge
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator


NUM_CANDIDATES = 50  # summaries among which the constant one is chosen, and on which


def tokenize(rows: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """Ids of prompt, summary and end; only the last two are targets."""
    items = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        items.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return items


def trainer_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, rows=None, **options
) -> Trainer:
    evaluator = BitsPerByteEvaluator()
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output / "trainer"),
            per_device_train_batch_size=per_device(args.batch_size),
            per_device_eval_batch_size=args.batch_size,
            lr_scheduler_type="linear",
            logging_steps=50,
            save_strategy="no",
            batch_eval_metrics=True,
            bf16=args.bf16,
            report_to="none",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
            **options,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
    )


def rouge_of(summaries: list[str], rows: list[dict]) -> dict[str, float]:
    references = [row["references"] for row in rows]
    return evaluate.load(rouge.__file__).compute(predictions=summaries, references=references)


def scores_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], args: argparse.Namespace
) -> tuple[dict[str, float], list[str]]:
    """ROUGE of greedy summaries, bits per byte of the references, and the summaries."""
    metrics = trainer_of(model, tokenizer, args).evaluate(tokenize(rows, tokenizer))
    generator = pipeline("text-generation", model=model.eval(), tokenizer=tokenizer)
    options = {"do_sample": False, "max_new_tokens": args.summary_bytes, "return_full_text": False, "use_cache": True}
    found = generator([row["prompt"] for row in rows], batch_size=args.batch_size, **options)
    summaries = [texts[0]["generated_text"].strip() for texts in found]
    return rouge_of(summaries, rows) | {"bits_per_byte": metrics["eval_bits_per_byte"]}, summaries


def constant_summary(train: list[dict]) -> str:
    """The one of the first summaries that is most like the others."""
    candidates = [row["completion"].strip() for row in train[:NUM_CANDIDATES]]
    return max(candidates, key=lambda text: sum(rouge.rouge(text, other)["rougeL"] for other in candidates))


def first_words(train: list[dict], rows: list[dict]) -> list[str]:
    """As many words of each text as a summary has on average."""
    count = round(sum(len(row["completion"].split()) for row in train) / len(train))
    return [" ".join(row["text"].split()[:count]) for row in rows]


def table(results: dict[str, dict[str, float]]) -> str:
    columns = ("rouge1", "rouge2", "rougeL", "bits_per_byte")
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, scores in results.items():
        values = (f"{scores[column]:.4f}" if column in scores else "" for column in columns)
        lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def record(folder: Path, args: argparse.Namespace, steps: int, scores: dict[str, float]) -> None:
    """`results.json` of a checkpoint, for its card."""
    arguments = {
        "train": args.train.name,
        "test": args.test.name if args.test else f"last quarter of {args.train.name}",
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
    }
    write_results(folder, args.checkpoint, steps=steps, scores={"test": scores}, arguments=arguments)


def main(args: argparse.Namespace, train: list[dict], test: list[dict]):
    choose_precision(args)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, padding_side="left")
    print(f"{args.checkpoint}: {len(train):,} rows to train on, {len(test):,} to test on")

    results = {"constant": rouge_of([constant_summary(train)] * len(test), test)}
    results["first words"] = rouge_of(first_words(train, test), test)
    summaries = {"reference": [row["references"][0] for row in test]}
    for kind in ("zero-shot", "lora", "full"):
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
        if kind == "lora":
            options = {"r": args.lora_rank, "lora_alpha": 2 * args.lora_rank, "target_modules": "all-linear"}
            lora = LoraConfig(**options, task_type="CAUSAL_LM")
            model = get_peft_model(model, lora)
        if kind != "zero-shot":
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            print(f"{kind}: {trainable:,} parameters, {model.device}, {model.dtype}")
            options = {"max_steps": args.max_steps, "learning_rate": args.learning_rate, "warmup_steps": 0.1}
            trainer = trainer_of(model, tokenizer, args, tokenize(train, tokenizer), **options)
            with saved_at_the_end(trainer):
                trainer.train()
            model.config.use_cache = True  # Trainer turns it off, and would save it so
            model.save_pretrained(args.output / kind)
            tokenizer.save_pretrained(args.output / kind)
        results[kind], summaries[kind] = scores_of(model, tokenizer, test, args)
        if kind == "full":
            record(args.output / kind, args, args.max_steps, results[kind])
    print(table(results))
    for kind, texts in summaries.items():
        print(f"\n{kind}: {texts[0]}")
    results = {"scores": results, "summaries": summaries} | run_info(model.device)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    with quiet_exit():
        main(args, train, test)
