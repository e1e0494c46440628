# SPDX-License-Identifier: Apache-2.0
r"""Turn a run of `identify.py` into the shipped identifier: bfloat16 weights, results, model card.

    python examples/research/identify_export.py --run runs/langid --scores examples/research/results/identify/stlm-langid.json \
        --output examples/checkpoints/stlm-langid

`--scores` is what `identify_peers.py` measured; without it the card has no results. `config.json` says float32, in which
the weights are loaded; the folder gets no code (`push_to_hub.py` adds it).
"""

import argparse
import json
from pathlib import Path

import torch
from provenance import run_info
from tables import markdown_table
from transformers import AutoModelForTokenClassification, AutoTokenizer

import modeling_stlm  # noqa: F401  (registers the Auto classes)


CARD = """\
---
language: multilingual
library_name: transformers
license: cc-by-4.0
metrics:
- accuracy
pipeline_tag: token-classification
tags:
- stlm
- byte-level
- tiny
- language-identification
---

# stlm-langid

Which language is it? {languages} languages (ISO 639-3), one label per byte, {parameters:,} parameters. Made for short,
noisy and mixed lines.

```python
import modeling_stlm  # or trust_remote_code=True, once published
from transformers import pipeline

identify = pipeline("text-classification", "examples/checkpoints/stlm-langid")
print(identify("Guten Tag"))
```

The language of a line is that of the mean logits of its bytes, so that the head for sequences, which loads the same weights
(its bias, which is left out then, is zero), gives the same answer: the load report calls `score.bias` UNEXPECTED. `examples/identify.py` also cuts mixed lines into spans
and answers `und` where there is no letter; pipelines name a language there, too.

## Results

{results}

## Training

{steps:,} steps of {batch_size} lines, {minutes:.1f} minutes of one CPU core ({device}): sentences cut,
mixed, mistyped and re-cased anew in every step; {matrix_optimizer} {muon_lr} on matrices, AdamW {adamw_lr} on the rest, warm-up 2%, linear
decay over the last 60%, from random weights.{note}

## Data

{sentences:,} sentences. Tatoeba, CC BY 2.0 FR, 112 languages (up to 925 sentences each); ELTeC novels, CC BY 4.0, ten of
these; Open Source Guides, CC BY 4.0, 25; African Storybook, CC BY, seven; English from Pratham Books and Book Dash stories
(CC BY), Standard Ebooks (CC0), posts of US agencies (public domain) and Taskmaster-4 (CC BY 4.0). Sentences whose letters
are those of a test sentence, and lines of these documents in Latin letters in languages that are written in others, were left
out.
`examples/research/identify_data.py` makes the files.

## Limits

Languages with few sentences (about a hundred: Swabian, Talossan, Alemannic, Asturian, West Frisian) and close relatives
(Bosnian, Croatian and Serbian; Bokmal and Danish; Arabic and its dialects; constructed languages) are told apart less well.
Text in any other language gets the nearest label: there is no "none of these". Languages written in several scripts are
known in the one of the data.

## Licence

The weights are under `cc-by-4.0`, with the attributions above; the code files beside them under `apache-2.0`.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of identify.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scores", type=Path, help="JSON of identify_peers.py")
    parser.add_argument("--note", default="", help="a sentence for the card, on how the run went")
    return parser.parse_args()


def results_of(scores: dict[str, dict]) -> str:
    """Macro accuracy over all languages as a table."""
    rows = [
        [name, f"{100 * score['ours']:.1f}", str(score["languages"]), f"{score['texts']:,}"]
        for name, score in scores["all languages"].items()
    ]
    table = markdown_table(["test", "accuracy", "languages", "lines"], rows)
    return (
        "Percent, mean over languages, choosing from all; `tatoeba` is the domain of the training, `udhr` (legal text) "
        f"and `pud` (news) are not.\n\n{table}\n\nBeside other identifiers: `examples/README.md`."
    )


def main():
    args = parse_arguments()
    model = AutoModelForTokenClassification.from_pretrained(args.run, dtype=torch.bfloat16)
    assert not model.score.bias.any()  # the card says so
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.run).save_pretrained(args.output)
    for name in ("chat_template.jinja", *(path.name for path in args.output.glob("*.py"))):
        (args.output / name).unlink(missing_ok=True)
    path = args.output / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    config.pop("auto_map", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (args.output / "model.safetensors").chmod(0o644)

    results = json.loads((args.run / "results.json").read_text())
    scores = json.loads(args.scores.read_text())["scores"] if args.scores else {}
    exported = {"dtype": "bfloat16", "scores": scores.get("all languages", {})} | run_info()
    (args.output / "results.json").write_text(json.dumps(results | {"exported": exported}, indent=1) + "\n")
    arguments = results["arguments"]
    card = CARD.format(
        **{name: results[name] for name in ("languages", "steps", "sentences")},
        **{name: arguments[name] for name in ("batch_size", "muon_lr", "adamw_lr")},
        parameters=results["stored_parameters"],
        minutes=results["cpu_minutes"],
        device=results["device"],
        matrix_optimizer=arguments.get("matrix_optimizer", "Muon"),
        note=args.note and f" {args.note}",
        results=results_of(scores) if scores else "Not measured yet.",
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
