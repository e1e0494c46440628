# SPDX-License-Identifier: Apache-2.0
"""Turn a finished run of `pretrain.py` into a checkpoint to publish: bfloat16 weights, current code, model card.

    python examples/export.py --run runs/stlm-3m --output examples/checkpoints/stlm-3m --data sources.md \
        --validation validation.jsonl.gz --test test.jsonl.gz

`--data` is a Markdown file that names the training texts and their licences; it goes into the card word for word. The
rounded weights are evaluated anew, so the card says what the files score and not what the run scored.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
from pretrain import documents, run_info
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from modeling_stlm import STLMTokenizer
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.corpus import PackedWindows, write_corpus


CARD = """\
---
license: {licence}
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [stlm, byte-level, tiny]
---

# {name}

A pooled byte-level, weight-tied language model with {stored:,} stored ({effective:,} effective) parameters:
[Super Tiny Language Models](https://arxiv.org/abs/2405.14159) as a transformers model. It reads and writes bytes; the
trunk runs once a word.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
inputs = tokenizer("The history of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```

## Results

Bits per byte, windows of {block_bytes} bytes without overlap, special tokens left out, of these bfloat16 weights
computed in float32:

| split | bits per byte | bytes |
|---|---|---|
{rows}

## Training

- {bytes_seen:,} bytes seen in {steps:,} steps of {batch_size} windows of {block_bytes} bytes; budget: {budget}
- optimizer: Muon {muon_lr} on matrices, AdamW {adamw_lr} on the rest, warm-up 2%, linear decay over the last 60%
- {device}; torch {torch}, transformers {transformers}, commit {commit}
- curve: `loss.png`; all settings: `results.json`

## Data

{data}

## Limits

A model of this size knows little and makes things up; it continues text, follows no instructions and was not filtered
for safety. It learned English only.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of pretrain.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="Markdown about the training texts")
    parser.add_argument("--licence", default="cc-by-sa-4.0", help="licence of the weights, as the Hub spells it")
    parser.add_argument("--validation", nargs="+", required=True, help="files or patterns")
    parser.add_argument("--test", nargs="+", required=True, help="files or patterns")
    return parser.parse_args()


def evaluate(model, tokenizer, patterns: list[str], block_bytes: int) -> dict[str, float]:
    evaluator = BitsPerByteEvaluator()
    with tempfile.TemporaryDirectory() as folder:
        path = write_corpus(Path(folder) / "text.bin", documents(patterns), tokenizer)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder, batch_eval_metrics=True, report_to="none", use_cpu=not torch.cuda.is_available()
            ),
            eval_dataset=PackedWindows(path, tokenizer, block_bytes),
            compute_metrics=evaluator,
            preprocess_logits_for_metrics=evaluator.nats,
        )
        metrics = trainer.evaluate()
    return {"bits_per_byte": metrics["eval_bits_per_byte"], "bytes": metrics["eval_bytes"]}


def main():
    args = parse_arguments()
    results = json.loads((args.run / "results.json").read_text())
    arguments = results["arguments"]
    block_bytes = int(arguments["block_bytes"])
    tokenizer = STLMTokenizer()
    model = AutoModelForCausalLM.from_pretrained(args.run, dtype=torch.bfloat16)
    model.config.use_cache = True
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    scores = {split: evaluate(model, tokenizer, getattr(args, split), block_bytes) for split in ("validation", "test")}
    budget = model.parameter_budget()
    card = CARD.format(
        name=results["model"],
        licence=args.licence,
        stored=budget["stored"]["total"],
        effective=budget["effective"]["total"],
        rows="\n".join(f"| {split} | {s['bits_per_byte']:.4f} | {s['bytes']:,} |" for split, s in scores.items()),
        bytes_seen=results["bytes_seen"],
        steps=results["steps"],
        budget=", ".join(f"{name} {value}" for name, value in results["budget"].items()),
        batch_size=arguments["batch_size"],
        block_bytes=block_bytes,
        muon_lr=arguments["muon_lr"],
        adamw_lr=arguments["adamw_lr"],
        device=results["device"],
        torch=results["torch"],
        transformers=results["transformers"],
        commit=results["commit"],
        data=args.data.read_text(encoding="utf-8").strip(),
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
    shutil.copy(args.run / "loss.png", args.output / "loss.png")
    # Paths of the machine that trained it say nothing to anybody.
    for split in ("train", "validation", "test"):
        names = [Path(name).name for name in json.loads(arguments[split].replace("'", '"'))]
        arguments[split] = " ".join(names)
    arguments["output"] = Path(arguments["output"]).name
    exported = {"dtype": "bfloat16", "scores": scores} | run_info()
    (args.output / "results.json").write_text(json.dumps(results | {"exported": exported}, indent=1) + "\n")
    print(card)


if __name__ == "__main__":
    main()
