# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a checkpoint on a text with the plain `Trainer`, in full or with LoRA, and see what it learned.

    python examples/finetune.py                        # the shipped stlm-3m on the shipped Shakespeare
    python examples/finetune.py --lora_rank 8          # LoRA on every linear layer of the trunk and of the byte layers
    python examples/finetune.py --text my.txt --checkpoint runs/stlm-10m --output runs/mine

Prints bits per byte on the last tenth of the text before and after, writes the curve to `OUTPUT/loss.png`,
streams a sample, saves the checkpoint and loads it again through `AutoModelForCausalLM`. Ctrl-C and SIGTERM save, and the
same command goes on.
"""

import argparse
import shutil
from pathlib import Path

from inputs import (
    HelpFormatter,
    add_bf16,
    at_least_one,
    causal_checkpoint,
    choose_precision,
    output_of,
    positive,
    quiet_exit,
    read_text,
    require,
    text_file,
    whole,
)


HERE = Path(__file__).parent
BLOCK_BYTES = 1024


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint", type=causal_checkpoint, default=str(HERE / "checkpoints" / "stlm-3m"), help="folder or Hub id"
    )
    parser.add_argument(
        "--text", type=text_file, default=HERE / "data" / "shakespeare.txt", help="the last tenth is held out"
    )
    parser.add_argument(
        "--output", type=output_of("STLMForCausalLM", own=("begun.json",)), default="runs/finetuned", help="folder"
    )
    parser.add_argument("--max_steps", type=at_least_one, default=150, help="of training")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="windows of 1024 bytes per step")
    parser.add_argument("--learning_rate", type=positive, help="of AdamW; by default 0.003, of an adapter 0.01")
    parser.add_argument("--lora_rank", type=whole, default=0, help="0: train all weights")
    parser.add_argument("--seed", type=whole, default=1, help="of adapters and order")
    add_bf16(parser)
    parser.add_argument("--prompt", help="start of the sample at the end; by default that of the held-out text")
    args = parser.parse_args()
    args.learning_rate = args.learning_rate or (0.01 if args.lora_rank else 0.003)
    return args


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets", "matplotlib", "peft")
    with quiet_exit():  # before the slow imports: a mistake is told at once
        text = read_text(args.text, min_bytes=10 * (BLOCK_BYTES + 2)).encode()

import torch
from peft import LoraConfig, get_peft_model
from run_folder import (
    EndOnDivergence,
    ResumeLine,
    begin,
    check_same,
    is_spent,
    last_checkpoint,
    names_and_sizes,
    per_device,
    plot,
    write_results,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, Trainer, TrainingArguments, set_seed

import modeling_stlm  # noqa: F401  (registers the Auto classes)
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows, write_corpus
from modeling_stlm.training.long_runs import StopOnSignal


def main(args: argparse.Namespace, text: bytes):
    choose_precision(args)
    begun, interrupted = args.output / "begun.json", last_checkpoint(args.output)
    settings = {"text": names_and_sizes([args.text]), "checkpoint": args.checkpoint}
    names = ("max_steps", "batch_size", "learning_rate", "lora_rank", "seed", "bf16")
    settings |= {name: str(getattr(args, name)) for name in names}
    if interrupted is not None:
        check_same(begun, settings)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    print(f"{args.checkpoint}: {model.num_parameters():,} parameters, {model.device}, {model.dtype}")
    begin(begun, settings, goes_on=False)  # now: nothing of the run before is lost where the checkpoint does not load
    if interrupted is None:
        (args.output / "results.json").unlink(missing_ok=True)
    if args.lora_rank:
        lora = LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear")
        model = get_peft_model(model, lora)
        model.print_trainable_parameters()

    cut = len(text) * 9 // 10
    sets = {}
    for split, part in (("train", text[:cut]), ("validation", text[cut:])):
        path = write_corpus(args.output / "data" / f"{split}.bin", [part], tokenizer)
        sets[split] = PackedWindows(path, tokenizer, block_size=BLOCK_BYTES)

    evaluator, stop, eval_steps = BitsPerByteEvaluator(), StopOnSignal(), max(1, args.max_steps // 3)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.max_steps,
            per_device_train_batch_size=per_device(args.batch_size),
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.max_steps // 10,
            logging_steps=max(1, args.max_steps // 10),
            eval_strategy="steps",
            eval_steps=eval_steps,
            eval_on_start=True,
            save_strategy="no",  # but where a signal cuts it
            save_total_limit=1,
            batch_eval_metrics=True,
            report_to="none",
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=sets["train"],
        eval_dataset=sets["validation"],
        processing_class=tokenizer,
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
        callbacks=[
            stop,
            ResumeLine(lambda state: f"step {state.global_step} of {args.max_steps}"),
        ],
    )
    trainer.add_callback(EndOnDivergence("--learning_rate, with a new --output"))
    if not is_spent(trainer, interrupted):
        trainer.train(resume_from_checkpoint=interrupted)
    if stop.received is not None:
        print(f"{stop.received.name}: saved at step {trainer.state.global_step}; the same command goes on from here")
        raise SystemExit(128 + stop.received)
    if interrupted is not None:
        shutil.rmtree(interrupted)  # the next run starts over
    if args.max_steps % eval_steps:
        trainer.evaluate()  # the last weights have no score yet
    logs = trainer.state.log_history
    curve = [(log["step"], log["eval_bits_per_byte"]) for log in logs if "eval_bits_per_byte" in log]
    before, after = (bits for _, bits in (curve[0], curve[-1]))
    plot(logs, args.output / "loss.png")

    if args.lora_rank:
        model.save_pretrained(args.output / "adapter")
        model = model.merge_and_unload()
    model.config.use_cache = True  # Trainer turns it off, and would save it so
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    arguments = {"train": f"nine tenths of {args.text.name}", "validation": f"last tenth of {args.text.name}"}
    arguments |= {"block_bytes": BLOCK_BYTES}
    arguments |= {name: getattr(args, name) for name in ("batch_size", "learning_rate", "lora_rank", "bf16", "seed")}
    write_results(
        args.output,
        args.checkpoint,
        steps=args.max_steps,
        scores={"validation": {"bits_per_byte": after}},
        baselines={"validation, before fine-tuning": {"bits_per_byte": before}},
        arguments=arguments,
    )

    model = AutoModelForCausalLM.from_pretrained(args.output).eval()
    print("\nA sample from the saved checkpoint:\n")
    prompt = opening(text[cut:]) if args.prompt is None else args.prompt
    inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, streamer=streamer, max_new_tokens=300, do_sample=True, temperature=0.7, top_p=0.9)

    print(f"\nbits per byte on the last tenth of {args.text.name}: {before:.3f} before, {after:.3f} after")
    print(f"curve: {args.output / 'loss.png'}    checkpoint: {args.output}")
    print(
        f"publish it: python examples/push_to_hub.py --checkpoint {args.output} --repo_id YOUR_NAME/{args.text.stem}"
    )


def opening(text: bytes, num_bytes: int = 40) -> str:
    """The start of the first whole line; of a single line, its start."""
    _, _, rest = text.partition(b"\n")
    return (rest.lstrip() or text)[:num_bytes].decode(errors="ignore")


if __name__ == "__main__":
    with quiet_exit():
        main(args, text)
