# SPDX-License-Identifier: Apache-2.0
"""Talk to a checkpoint in the terminal; text streams as it is generated.

    python examples/generate.py                                     # go on from what you type
    python examples/generate.py --prompt "Once upon a time"         # once, then leave
    python examples/generate.py --chat --checkpoint runs/my-chat    # with the chat template; turns share one cache

An empty line or the end of the input leaves. Lines may be piped in.
"""

import argparse
import sys
from pathlib import Path

from inputs import HelpFormatter, at_least_one, at_least_zero, causal_checkpoint, quiet_exit


BASE_MODEL = """{checkpoint} is a base model: it was not trained on chats (its generation config does not end at <|im_end|>).
It continues text and does not answer. `python examples/chat_sft.py` trains a model that does."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    default = Path(__file__).parent / "checkpoints" / "stlm-3m"
    parser.add_argument("--checkpoint", type=causal_checkpoint, default=str(default), help="folder or Hub id")
    parser.add_argument("--prompt", help="generate once from this; empty: from the beginning of a text")
    parser.add_argument("--chat", action="store_true", help="use the chat template")
    parser.add_argument("--max_new_tokens", type=at_least_one, default=256, help="bytes")
    parser.add_argument("--temperature", type=at_least_zero, default=0.8, help="0: greedy")
    args = parser.parse_args()
    if args.chat and args.prompt == "":
        parser.error("--prompt is empty: with --chat it is what the user says")
    return args


if __name__ == "__main__":
    args = parse_arguments()

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

import modeling_stlm  # noqa: F401  (registers the Auto classes)


def ask() -> str:
    """What the user typed, empty at the end of the input."""
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def end_turn(ids: torch.Tensor, tokenizer) -> torch.Tensor:
    """`ids (1, T)` after an answer, ended as the chat template ends it. The cache holds all but the last of `ids`."""
    if ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    missing = [] if ids[0, -1] == end else [end]
    return torch.cat([ids, torch.tensor([[*missing, *tokenizer.encode_bytes("\n")]])], dim=1)


def main(args: argparse.Namespace):
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    print(f"{args.checkpoint}: {model.num_parameters():,} parameters, {model.device}, {model.dtype}")
    options = {
        "max_new_tokens": args.max_new_tokens,
        "streamer": TextStreamer(tokenizer, skip_prompt=args.chat or args.prompt == "", skip_special_tokens=args.chat),
    }
    if args.temperature > 0:
        options |= {"do_sample": True, "temperature": args.temperature, "top_p": 0.95}
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None}
    if args.chat:
        end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
        if end_of_turn not in np.atleast_1d(model.generation_config.eos_token_id):
            print(BASE_MODEL.format(checkpoint=args.checkpoint), file=sys.stderr)
        options["eos_token_id"] = [tokenizer.eos_token_id, end_of_turn]

    if args.prompt is None:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    cache, ids = DynamicCache(config=model.config), torch.empty(1, 0, dtype=torch.long)
    while True:
        text = args.prompt if args.prompt is not None else ask()
        if not text and args.prompt is None:
            return
        if args.chat:
            turn = [{"role": "user", "content": text}]
            new = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            ids = torch.cat([ids, new], dim=1)
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **options)
            ids = end_turn(ids, tokenizer)
        else:
            beginning = {"input_ids": torch.tensor([[tokenizer.bos_token_id]])}
            model.generate(**(tokenizer(text, return_tensors="pt") if text else beginning), **options)
        if args.prompt is not None:
            return


if __name__ == "__main__":
    with quiet_exit():
        main(args)
