# SPDX-License-Identifier: Apache-2.0
"""Labelled texts that the examples read."""

import csv
import gzip
import io
import random
import re
from collections import Counter
from pathlib import Path

from inputs import decode, read_json_lines


def read_labelled(path: Path) -> tuple[list[str], list[str]]:
    """Texts and labels of a csv or of JSON lines, also packed (.gz), with columns `text` and `label`."""
    if ".csv" in path.suffixes:
        data = path.read_bytes()
        text = decode(gzip.decompress(data) if path.suffix == ".gz" else data, path)
        rows = csv.DictReader(io.StringIO(text, newline=""))
    else:
        rows = read_json_lines(path)
    texts, labels = [], []
    for number, row in enumerate(rows, start=1):
        if not row.get("text") or row.get("label") in (None, ""):
            raise SystemExit(
                f"row {number} of {path} has the columns {sorted(map(str, row))}, expected `text` and `label`, separated by "
                "commas and neither of them empty"
            )
        texts.append(row["text"])
        labels.append(str(row["label"]))
    if len(set(labels)) < 2:
        raise SystemExit(
            f"{path} has {len(texts)} rows with the labels {sorted(set(labels))}, expected at least two labels"
        )
    return texts, labels


def speeches(path: Path, names: int = 4) -> tuple[list[str], list[str]]:
    """Speeches of at least 100 letters in a play, and who says them: the `names` who say most."""
    turns = re.findall(r"(?ms)^([A-Z][A-Z ]+):\n(.+?)\n(?=\n|\Z)", path.read_text(encoding="utf-8"))
    turns = [(speech.replace("\n", " "), name.title()) for name, speech in turns if len(speech) >= 100]
    common = {name for name, _ in Counter(name for _, name in turns).most_common(names)}
    texts, labels = zip(*((speech, name) for speech, name in turns if name in common))
    return list(texts), list(labels)


def split_rows(
    rows: tuple[list, list], share: float = 0.2, seed: int = 0
) -> tuple[tuple[list, list], tuple[list, list]]:
    """Rows to train on and, a share of them, to test on."""
    order = list(range(len(rows[0])))
    random.Random(seed).shuffle(order)
    cut = round(len(order) * (1 - share))
    if not 0 < cut < len(order):
        raise SystemExit(f"{len(order)} rows are too few to test on a share of {share} of them: give more, or --test")
    first, second = ([[column[i] for i in part] for column in rows] for part in (order[:cut], order[cut:]))
    return tuple(first), tuple(second)
