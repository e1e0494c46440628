# SPDX-License-Identifier: Apache-2.0
"""Labelled texts and summaries that the examples read."""

import argparse
import csv
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

from inputs import kind_of, read_json_lines, read_utf8


def read_labelled(path: Path, fewest_labels: int = 2) -> tuple[list[str], list[str]]:
    """Texts and labels of a csv or of JSON lines, also packed (.gz), with columns `text` and `label`."""
    kind = kind_of(path)
    if kind == "csv":
        csv.field_size_limit(2**31 - 1)  # 131,072 by default
        rows = csv.DictReader(io.StringIO(read_utf8(path), newline=""))
    elif kind == "json":
        rows = read_json_lines(path)
    else:
        raise SystemExit(f"{path} is neither .csv nor .jsonl (or these with .gz): expected rows in one of these forms")
    texts, labels = [], []
    for number, row in enumerate(rows, start=1):
        if missing := {"text", "label"} - row.keys():
            raise SystemExit(
                f"row {number} of {path} has the columns {sorted(map(str, row))}, expected `text` and `label`, separated by "
                f"commas: {' and '.join(sorted(missing))} is missing"
            )
        for name in ("text", "label"):
            if row[name] is None or not str(row[name]).strip():
                raise SystemExit(f"row {number} of {path} has an empty `{name}`: leave the row out")
        if not isinstance(row["text"], str):
            raise SystemExit(f"row {number} of {path} has the text {json.dumps(row['text'])[:80]}, expected a string")
        texts.append(row["text"])
        labels.append(str(row["label"]).strip())
    if len(set(labels)) < fewest_labels:
        raise SystemExit(
            f"{path} has {len(texts)} rows with the labels {sorted(set(labels))}, expected at least {fewest_labels}"
        )
    return texts, labels


def speeches(path: Path, names: int = 4) -> tuple[list[str], list[str]]:
    """Speeches of at least 100 letters in a play, and who says them: the `names` who say most."""
    turns = re.findall(r"(?ms)^([A-Z][A-Z ]+):\n(.+?)\n(?=\n|\Z)", path.read_text(encoding="utf-8"))
    turns = [(speech.replace("\n", " "), name.title()) for name, speech in turns if len(speech) >= 100]
    common = {name for name, _ in Counter(name for _, name in turns).most_common(names)}
    texts, labels = zip(*((speech, name) for speech, name in turns if name in common))
    return list(texts), list(labels)


def tell_of_known(train: list[str], test: list[str]) -> None:
    """Print how many texts to test on are among those to train on, if any."""
    known = set(train)
    if count := sum(text in known for text in test):
        print(f"{count:,} of the texts to test on are among those to train on: the score is not that of new texts")


def split_rows(
    rows: tuple[list, list], share: float = 0.2, seed: int = 0
) -> tuple[tuple[list, list], tuple[list, list]]:
    """Texts and labels to train on and, a share of them, to test on; of each label at least one row is to train on."""
    order = list(range(len(rows[0])))
    random.Random(seed).shuffle(order)
    cut = round(len(order) * (1 - share))
    if not 0 < cut < len(order):
        raise SystemExit(f"{len(order)} rows are too few to test on a share of {share} of them: give more, or --test")
    known = {rows[1][i] for i in order[:cut]}
    parts = (
        order[:cut] + [i for i in order[cut:] if rows[1][i] not in known],
        [i for i in order[cut:] if rows[1][i] in known],
    )
    if not parts[1]:
        raise SystemExit("each of the rows to test on has a label of its own: give more rows of each label, or --test")
    first, second = ([[column[i] for i in part] for column in rows] for part in parts)
    return tuple(first), tuple(second)


def summary_example(row: dict, text_bytes: int, name: str = "a row") -> dict:
    """Prompt, completion and references of a row of DialogSum or QMSum, whose text is cut to its first `text_bytes`."""
    if "meeting_transcripts" in row:
        text = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in row["meeting_transcripts"])
        references = [row["general_query_list"][0]["answer"]]
    else:
        text = row.get("dialogue")
        references = [row[key] for key in ("summary", "summary1", "summary2", "summary3") if key in row]
    if not references or ("dialogue" not in row and "meeting_transcripts" not in row):
        raise SystemExit(f"{name} has the fields {sorted(row)}, expected `dialogue` and `summary`, or those of QMSum")
    for value in (text, *references):
        if not isinstance(value, str):
            kind = type(value).__name__
            raise SystemExit(f"{name} has a {kind} where a dialogue or a summary should be, expected a text")
    if not text:
        raise SystemExit(f"{name} has an empty `dialogue`: leave it out")
    text = text.encode("utf-8")[:text_bytes].decode("utf-8", errors="ignore")
    prompt = f"<bos>{text}\n\nSummary:"
    return {"text": text, "prompt": prompt, "completion": f" {references[0].strip()}", "references": references}


def read_summaries(path: Path, limit: int | None, text_bytes: int) -> list[dict]:
    """`prompt`, `completion` and all `references` of each row, and its `text`."""
    rows = enumerate(read_json_lines(path)[:limit], start=1)
    return [summary_example(row, text_bytes, f"row {number} of {path}") for number, row in rows]


def summary_sets(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Summaries to train on and to test on, of the arguments of `inputs.summary_parser`."""
    train = read_summaries(args.train, args.train_rows, args.text_bytes)
    if args.test:
        return train, read_summaries(args.test, args.test_rows, args.text_bytes)
    if len(train) < 2:
        raise SystemExit(f"{args.train} has one row, which leaves none to test on: add rows, or give --test")
    cut = max(1, len(train) * 3 // 4)
    return train[:cut], train[cut:][: args.test_rows]
