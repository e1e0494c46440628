# SPDX-License-Identifier: Apache-2.0
"""Turn a finished run of `pretrain.py` into a checkpoint to publish: bfloat16 weights, current code, model card.

    python examples/research/export.py --run runs/stlm-3m --output examples/checkpoints/stlm-3m --data examples/checkpoints/sources.md \
        --validation validation.jsonl.gz --test test.jsonl.gz

`--data` is a Markdown file that names the training texts and their licences; it goes into the card word for word. The
rounded weights are evaluated anew, so the card says what the files score and not what the run scored.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from provenance import run_info
from scoring import bits_of_documents, documents
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_stlm import STLMTokenizer
from modeling_stlm.training.model_card import build_model_card, write_model_card


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of pretrain.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="Markdown about the training texts")
    parser.add_argument("--licence", default="cc-by-sa-4.0", help="licence of the weights, as the Hub spells it")
    parser.add_argument("--language", default="en", help="of the texts, as the Hub spells it")
    parser.add_argument("--validation", nargs="+", required=True, help="files or patterns")
    parser.add_argument("--test", nargs="+", required=True, help="files or patterns")
    return parser.parse_args()


def main():
    args = parse_arguments()
    results = json.loads((args.run / "results.json").read_text())
    block_bytes = int(results["arguments"]["block_bytes"])
    tokenizer = STLMTokenizer()
    model = AutoModelForCausalLM.from_pretrained(args.run, dtype=torch.bfloat16)
    model.config.use_cache = True
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    scores = {
        split: bits_of_documents(model, tokenizer, documents(getattr(args, split)), block_bytes)
        for split in ("validation", "test")
    }
    shutil.copy(args.run / "loss.png", args.output / "loss.png")
    exported = {"dtype": "bfloat16", "scores": scores} | run_info()
    (args.output / "results.json").write_text(json.dumps(results | {"exported": exported}, indent=1) + "\n")
    card = build_model_card(
        args.output, licence=args.licence, language=args.language, data=args.data.read_text(encoding="utf-8")
    )
    print(card.content if write_model_card(args.output, card) else f"kept {args.output / 'README.md'} as it is")


if __name__ == "__main__":
    main()
