# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a checkpoint on chats with `SFTTrainer` of trl, so that it answers and ends its turn.

    python examples/chat_sft.py                                    # 16 shipped chats: seconds, too few to answer
    python examples/chat_sft.py --train my_chats.jsonl --max_steps 2000 --output runs/my-chat
    python examples/generate.py --chat --checkpoint runs/my-chat

The file has one chat a line: `{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}`.
Only what the assistant says, with the mark that ends it, is learned. That mark is an end in the generation config that is
saved, so `generate`, pipelines, servers and the engine stop there. Prints one reply, and the bits per byte of what the
assistant says in chats that were held out, before and after: more steps than the chats are worth make it worse.
"""

import argparse
import math
import random
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
    read_json_lines,
    require,
    text_file,
    whole,
)


HERE = Path(__file__).parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint", type=causal_checkpoint, default=str(HERE / "checkpoints" / "stlm-3m"), help="folder or Hub id"
    )
    parser.add_argument("--train", type=text_file, default=HERE / "data" / "chats.jsonl", help="JSON lines")
    parser.add_argument("--output", type=output_of("STLMForCausalLM"), default="runs/chat", help="folder")
    parser.add_argument("--max_steps", type=at_least_one, default=8, help="of training")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="chats per step")
    parser.add_argument("--max_length", type=at_least_one, default=2048, help="bytes of a chat; the rest is cut")
    parser.add_argument("--learning_rate", type=positive, default=1e-3, help="of AdamW")
    add_bf16(parser)
    parser.add_argument("--seed", type=whole, default=1, help="of the order")
    parser.add_argument("--prompt", default="How much is the red lamp?", help="what is asked in the end")
    return parser.parse_args()


def read_chats(path: Path) -> list[dict]:
    """Rows with `messages`, at least one of them of the assistant; what is wrong ends the program."""
    rows = read_json_lines(path)
    for number, row in enumerate(rows, 1):
        messages = row.get("messages")
        is_list = isinstance(messages, list) and len(messages) > 0
        if not is_list or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages):
            found = f"fields {sorted(row)}" if messages is None else f"messages {str(messages)[:80]}"
            raise SystemExit(f"{path}, row {number} has {found}: expected `messages`, each with role and content")
        if all(message["role"] != "assistant" for message in messages):
            raise SystemExit(f"{path}, row {number}: no message has the role assistant, so there is nothing to learn")
    return [{"messages": row["messages"]} for row in rows]


def hold_out(chats: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Chats to train on and, a tenth of them but at least four if there are eight, held out."""
    if len(chats) < 2:
        raise SystemExit(f"found {len(chats)} chat, expected at least 2: a tenth is held out")
    order = random.Random(seed).sample(chats, len(chats))
    cut = max(len(chats) // 10, min(4, len(chats) // 2))
    return order[cut:], order[:cut]


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets", "matplotlib", "trl")
    with quiet_exit():
        sets = hold_out(read_chats(args.train), args.seed)  # before the slow imports: a mistake is told at once

import torch
from datasets import Dataset
from run_folder import per_device, saved_at_the_end, write_results
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import modeling_stlm  # noqa: F401  (registers the Auto classes)


def reply(model, tokenizer, prompt: str) -> str:
    turn = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    new = model.generate(**inputs.to(model.device), max_new_tokens=300, do_sample=False)
    return tokenizer.decode(new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def bits_of_answers(model, tokenizer, chats: list[dict], max_length: int) -> tuple[float, float]:
    """Bits per byte of what the assistant says, and bits of the mark that ends each answer."""
    nats, counts = [0.0, 0.0], [0, 0]  # of bytes, of marks
    for chat in chats:
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
        row = tokenizer.apply_chat_template(chat["messages"], **options).to(model.device)
        ids, is_answer = (row[name][:, :max_length] for name in ("input_ids", "assistant_masks"))
        is_mark = ids == tokenizer.convert_tokens_to_ids("<|im_end|>")
        losses = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        for i, chosen in enumerate((is_answer.bool() & ~is_mark, is_answer.bool() & is_mark)):
            nats[i] += float(losses[chosen[0, 1:]].sum())
            counts[i] += int(chosen.sum())
    if 0 in counts:
        raise SystemExit(
            f"no whole answer in the first {max_length:,} bytes of the chats held out: raise --max_length"
        )
    return tuple(nat / math.log(2) / count for nat, count in zip(nats, counts))


def main(args: argparse.Namespace, chats: list[dict], held_out: list[dict]):
    choose_precision(args)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    print(
        f"{args.checkpoint}: {model.num_parameters():,} parameters, {len(chats):,} chats, {len(held_out):,} held out"
    )
    before = bits_of_answers(model.eval(), tokenizer, held_out, args.max_length)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_turn]
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            str(args.output / "trainer"),
            assistant_only_loss=True,
            max_length=args.max_length,
            max_steps=args.max_steps,
            per_device_train_batch_size=per_device(args.batch_size),
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            logging_steps=max(1, args.max_steps // 10),
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            bf16=args.bf16,
            activation_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
    )
    if left_out := len(chats) - len(trainer.train_dataset):
        print(f"{left_out:,} of the chats have no answer in their first {args.max_length:,} bytes and are left out")
    with saved_at_the_end(trainer):
        trainer.train()
    model.config.use_cache = True  # Trainer turns it off, and would save it so
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    names = ("batch_size", "learning_rate", "bf16", "seed")
    arguments = {"train": args.train.name} | {name: getattr(args, name) for name in names}
    after = bits_of_answers(model.eval(), tokenizer, held_out, args.max_length)
    write_results(
        args.output,
        args.checkpoint,
        steps=args.max_steps,
        scores={"answers held out": {"bits_per_byte": after[0]}},
        baselines={"answers held out, before fine-tuning": {"bits_per_byte": before[0]}},
        arguments=arguments,
        rows={"train": len(trainer.train_dataset), "held out": len(held_out)},
    )

    print(f"\n> {args.prompt}\n{reply(model, tokenizer, args.prompt)}")
    (bits, mark), (new_bits, new_mark) = before, after
    print(
        f"\nbits per byte of the answers in {len(held_out):,} chats held out: {bits:.3f} before, {new_bits:.3f} after"
    )
    print(f"bits of the mark that ends an answer: {mark:.1f} before, {new_mark:.1f} after")
    print(f"next: python examples/generate.py --chat --checkpoint {args.output}")


if __name__ == "__main__":
    with quiet_exit():
        main(args, *sets)
