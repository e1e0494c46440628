# SPDX-License-Identifier: Apache-2.0
"""Find spans in texts, such as names: fine-tune an encoder with a class for every byte.

    python examples/ner.py                                       # names in the shipped Shakespeare, none of them seen before
    python examples/ner.py --train rows.jsonl --test other_rows.jsonl

Rows are JSON lines with `text` and `spans`, a list of `[start, end, label]` in characters. Printed is the exact F1 of spans,
beside that of looking up the spans of the rows to train on.

`is_causal=False`: whether a byte belongs to a name is often decided by what follows it ("Washington" and "Washington Post"),
and a causal model labels the first byte of a span before it has seen the second one. Spans come from `SpanPipeline`: the
library's `aggregation_strategy="simple"` joins neighbouring bytes of one label and cuts words in two, and its other strategies take
what stands between spaces for a word, punctuation included. Training is adversarial, as in `classify.py`, and in each
step some words have random letters: a model soon knows the names in a few hundred rows by heart, and finds no others.
"""

import argparse
import json
import math
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

from inputs import (
    HelpFormatter,
    add_label_training,
    choose_precision,
    positive,
    quiet_exit,
    read_json_lines,
    require,
    share,
    text_file,
)
from rows import tell_of_known


HERE = Path(__file__).parent
OUTSIDE = "O"
FEWEST_STEPS = 200  # by default; 3 epochs of 200 rows are 39


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--train", type=text_file, help="rows with spans; without it, names in the shipped Shakespeare"
    )
    parser.add_argument("--test", type=text_file, help="rows with spans; needed with --train")
    by_default = f"by default 3, or more where these are fewer than {FEWEST_STEPS} steps"
    parser.add_argument("--epochs", type=positive, help=f"over the rows; {by_default}")
    add_label_training(parser, "runs/spans", "STLMForTokenClassification", 5e-3, 16)
    parser.add_argument(
        "--word_noise", type=share, default=0.3, help="share of the words that get random ASCII letters in each step"
    )
    args = parser.parse_args()
    if bool(args.train) != bool(args.test):
        parser.error("--train and --test come together")
    return args


def enough_epochs(rows: int, batch_size: int) -> int:
    """How often to read so many rows by default."""
    return max(3, math.ceil(FEWEST_STEPS / math.ceil(rows / batch_size)))


def is_span(span, length: int) -> bool:
    """Whether `span` is [start, end, label] in a text of `length` characters."""
    if not isinstance(span, list) or [type(part) for part in span] != [int, int, str]:
        return False
    return 0 <= span[0] < span[1] <= length and span[2].strip() != ""


def fault_of(row: dict) -> str | None:
    """What is wrong with `text` and `spans`, if anything."""
    text, spans = row.get("text"), row.get("spans")
    if not isinstance(text, str) or not text or not isinstance(spans, list):
        shown = json.dumps(spans, ensure_ascii=False)[:80]
        return f"has the fields {sorted(row)} and the spans {shown}, expected `text`, not empty, and `spans`: a list of [start, end, 'label']"
    for span in spans:
        if not is_span(span, len(text)):
            shown = json.dumps(span, ensure_ascii=False)[:80]
            return f'has the span {shown}, expected [start, end, "label"] within its {len(text)} characters'
    if any(span[2].strip() == OUTSIDE for span in spans):
        return f"has a span of the label {OUTSIDE!r}, which is that of bytes outside of spans: call it something else"
    for before, after in pairwise(sorted(spans)):
        if after[0] < before[1]:
            return f"has the spans {before} and {after}, which overlap: a character has one label"
    return None


def read_rows(path: Path) -> list[dict]:
    """Rows with `text` and `spans`; the first one that has not, ends the program."""
    rows = read_json_lines(path)
    for number, row in enumerate(rows, start=1):
        if fault := fault_of(row):
            raise SystemExit(f"row {number} of {path} {fault}")
        row["spans"] = [[start, end, label.strip()] for start, end, label in row["spans"]]
    if not any(row["spans"] for row in rows):
        raise SystemExit(f"no row of {path} has a span")
    return rows


def names_in_a_play(path: Path) -> tuple[list[dict], list[dict]]:
    """Lines with names of those who speak; no name of the rows to test on occurs in the rows to train on."""
    text = path.read_text(encoding="utf-8")
    words = {word.title() for name in re.findall(r"(?m)^([A-Z][A-Z ]+):$", text) for word in name.split()}
    words -= {word.title() for word in re.findall(r"\b[a-z]+\b", text)}  # titles: a king is no name
    names = sorted(word for word in words if len(word) > 2)
    random.Random(0).shuffle(names)
    held_out, sets = set(names[: len(names) // 4]), ([], [])
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    for line in text.splitlines():
        found = list(pattern.finditer(line))
        kinds = {match[1] in held_out for match in found}
        if len(kinds) == 1:
            sets[kinds.pop()].append({"text": line, "spans": [[*match.span(), "NAME"] for match in found]})
    return sets


def read_sets(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Rows to train on and to test on."""
    if args.train:
        return read_rows(args.train), read_rows(args.test)
    train, test = names_in_a_play(HERE / "data" / "shakespeare.txt")
    return train, test[:300]


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "matplotlib")
    with quiet_exit():
        train, test = read_sets(args)  # before the slow imports: a mistake is told at once

import torch
import torch.nn.functional as F
from run_folder import per_device, train_runs, write_label_results
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    TrainingArguments,
    pipeline,
    set_seed,
)

from modeling_stlm.inference.spans import SpanPipeline  # modeling_stlm registers the Auto classes
from modeling_stlm.training.adversarial import AdversarialTrainer
from modeling_stlm.training.sentence_embeddings import look_both_ways


def tagged(row: dict, tokenizer, label2id: dict[str, int], max_bytes: int) -> dict[str, list[int]]:
    """Ids of a text, and the class of every byte: `B-` where a span starts, `I-` in it."""
    encoded = tokenizer(row["text"], truncation=True, max_length=max_bytes, return_offsets_mapping=True)
    labels = [label2id[OUTSIDE]] * len(encoded["input_ids"])
    for start, end, label in row["spans"]:
        inside = [i for i, (first, last) in enumerate(encoded["offset_mapping"]) if start <= first and last <= end]
        for i in inside:
            labels[i] = label2id[f"{'B' if i == inside[0] else 'I'}-{label}"]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def with_random_words(input_ids: torch.Tensor, rate: float) -> torch.Tensor:
    """`input_ids (B, T)`; words have, with probability `rate`, random letters and digits (ASCII), of their case."""
    kinds = [(input_ids >= ord(first)) & (input_ids <= ord(last)) for first, last in ("AZ", "az", "09")]
    is_in_word = torch.stack([*kinds, (input_ids >= 128) & (input_ids < 256)]).any(0)
    number = (is_in_word & ~F.pad(is_in_word[:, :-1], (1, 0))).cumsum(1)  # of the word, from 1 on
    drawn = torch.rand(input_ids.shape[0], input_ids.shape[1] + 1, device=input_ids.device) < rate
    is_drawn = is_in_word & drawn.gather(1, number)
    for is_kind, (first, last) in zip(kinds, ("AZ", "az", "09"), strict=True):
        other = torch.randint_like(input_ids, ord(first), ord(last) + 1)
        input_ids = torch.where(is_drawn & is_kind, other, input_ids)
    return input_ids


class NoisyCollator(DataCollatorForTokenClassification):
    """Batches of rows, with words of random letters."""

    def __init__(self, tokenizer, word_noise: float):
        super().__init__(tokenizer)
        self.word_noise = word_noise

    def torch_call(self, features):
        batch = super().torch_call(features)
        batch["input_ids"] = with_random_words(batch["input_ids"], self.word_noise)
        return batch


def f1(found: list[set], right: list[set]) -> float:
    """Of spans that are right in start, end and label."""
    hits = sum(len(a & b) for a, b in zip(found, right, strict=True))
    return 2 * hits / max(1, sum(map(len, found)) + sum(map(len, right)))


def with_label(spans: set, label: str) -> set:
    return {span for span in spans if span[2] == label}


def pattern_of(span: str) -> str:
    """A pattern of `span` that is not part of a longer word. Punctuation, and scripts without spaces, have no word boundary."""

    def is_edge(character: str) -> bool:
        # Chinese and Japanese characters begin at U+2E80.
        return re.match(r"\w", character) is not None and character < "\u2e80"

    before, after = is_edge(span[0]) * r"(?<!\w)", is_edge(span[-1]) * r"(?!\w)"
    return before + re.escape(span) + after


def looked_up(train: list[dict], test: list[dict]) -> list[set]:
    """Spans of the texts to test on that read like one of those to train on, with the label that these have most often."""
    labels = defaultdict(Counter)
    for row in train:
        for start, end, label in row["spans"]:
            labels[row["text"][start:end]][label] += 1
    known = re.compile("|".join(pattern_of(span) for span in sorted(labels, key=len, reverse=True)))
    return [{(*m.span(), labels[m[0]].most_common(1)[0][0]) for m in known.finditer(row["text"])} for row in test]


def main(args: argparse.Namespace, train: list[dict], test: list[dict]):
    choose_precision(args)
    args.epochs = args.epochs or enough_epochs(len(train), args.batch_size)
    set_seed(args.seed)
    kinds = sorted({label for row in train for _, _, label in row["spans"]})
    names = [OUTSIDE, *(f"{place}-{kind}" for kind in kinds for place in "BI")]
    label2id = {name: i for i, name in enumerate(names)}
    # The library's pipelines cannot pad an empty text on the left.
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, padding_side="right")
    model = AutoModelForTokenClassification.from_pretrained(
        args.checkpoint, is_causal=False, dtype=torch.float32, id2label=dict(enumerate(names)), label2id=label2id
    )
    if AutoConfig.from_pretrained(args.checkpoint).is_causal:
        look_both_ways(model)
    print(f"{args.checkpoint}: {model.num_parameters():,} parameters, {model.device}, {model.dtype}")
    print(f"{len(train):,} rows to train on, {len(test):,} to test on, spans of {kinds}")
    tell_of_known([row["text"] for row in train], [row["text"] for row in test])
    trainer = AdversarialTrainer(
        model,
        TrainingArguments(
            str(args.output),
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            per_device_train_batch_size=per_device(args.batch_size),
            train_sampling_strategy="group_by_length",
            logging_steps=50,
            save_strategy="no",
            bf16=args.bf16,
            seed=args.seed,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=[tagged(row, tokenizer, label2id, args.max_bytes) for row in train],
        data_collator=NoisyCollator(tokenizer, args.word_noise),
        processing_class=tokenizer,
        epsilon=args.adversarial_epsilon,
    )
    train_runs(trainer, args.runs)
    model.config.use_cache = True  # Trainer turns it off, and would save it so
    trainer.save_model()

    tagger = pipeline(
        "token-classification", str(args.output), pipeline_class=SpanPipeline, aggregation_strategy="first"
    )
    found = [
        {(span["start"], span["end"], span["entity_group"]) for span in spans}
        for spans in tagger([row["text"] for row in test], batch_size=args.batch_size)
    ]
    right = [{tuple(span) for span in row["spans"]} for row in test]
    score, baseline = f1(found, right), f1(looked_up(train, test), right)
    write_label_results(
        trainer,
        args,
        {
            split: getattr(args, split).name if args.train else "lines of shakespeare.txt"
            for split in ("train", "test")
        },
        own=("word_noise",),
        rows={"train": len(train), "test": len(test)},
        scores={"test": {"f1": score}},
        baselines={"test, spans of the training rows looked up": {"f1": baseline}},
        scoring="F1 of spans whose start, end and label are right, as `SpanPipeline` reads them",
    )
    print(f"\nexact F1 of spans: {score:.3f}    looked up: {baseline:.3f}")
    if len(kinds) > 1:
        shown = sorted({label for row in test for _, _, label in row["spans"]})
        of_label = {kind: f1(*([with_label(row, kind) for row in rows] for rows in (found, right))) for kind in shown}
        print("of each label:", ", ".join(f"{kind} {value:.3f}" for kind, value in of_label.items()))
    options = 'pipeline_class=SpanPipeline, aggregation_strategy="first"'
    print(
        "next, in Python:\n\n    from transformers import pipeline\n    from modeling_stlm.inference.spans import SpanPipeline"
    )
    print(f'    tagger = pipeline("token-classification", "{args.output}", {options})')
    print(f"    tagger({test[0]['text']!r})")


if __name__ == "__main__":
    with quiet_exit():
        main(args, train, test)
