# SPDX-License-Identifier: Apache-2.0
"""Sentence embeddings and nearest neighbours, with sentence-transformers.

    python examples/embed.py                                          # dialogues that are like each other
    python examples/embed.py --texts lines.txt --query "How do plants grow?"
    python examples/embed.py --train rows.csv --test other_rows.csv   # labels of the nearest neighbours, beside TF-IDF

A folder for sentence-transformers has mean pooling and no chat template (with one, sentence-transformers makes a chat message
of every text): `encoder.py` writes such folders. Labelled rows have the columns `text` and `label`. Needs
`sentence-transformers` and `scikit-learn`.
"""

import argparse
import time
from pathlib import Path

from inputs import HelpFormatter, quiet_exit, read_json_lines, read_text, require, sentence_encoder, text_file
from rows import read_labelled, tell_of_known


HERE = Path(__file__).parent
QUERIES = 256  # compared at a time: all with all of 100,000 rows would be 40 GB


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=sentence_encoder,
        default=str(HERE / "checkpoints" / "stlm-3m-encoder"),
        help="a sentence-transformers folder or Hub id",
    )
    parser.add_argument("--texts", type=text_file, help="one a line; without it, the shipped dialogues")
    parser.add_argument("--query", help="what the nearest texts are looked for; without it, the first text")
    parser.add_argument("--train", type=text_file, help="labelled rows to look in")
    parser.add_argument("--test", type=text_file, help="labelled rows to look for")
    args = parser.parse_args()
    if bool(args.train) != bool(args.test):
        parser.error("--train and --test come together")
    return args


def read_sets(args: argparse.Namespace) -> tuple[list[tuple[list, list]], list[str]]:
    """Labelled rows, if any are given, and texts to look in."""
    rows = [read_labelled(args.train), read_labelled(args.test, fewest_labels=1)] if args.train else []
    if args.texts:
        texts, fewest = [line for line in read_text(args.texts).splitlines() if line.strip()], 1 if args.query else 2
        if len(texts) < fewest and not rows:
            lines = f"{len(texts)} lines with text, expected at least {fewest}"
            raise SystemExit(f"{args.texts} has {lines}: add lines" + ("" if args.query else ", or give --query"))
        return rows, texts
    return rows, [row["dialogue"] for row in read_json_lines(HERE / "data" / "dialogues.jsonl")]


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "sentence_transformers", "sklearn")
    with quiet_exit():
        rows, texts = read_sets(args)  # before the slow imports: a mistake is told at once

import numpy as np
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer

import modeling_stlm  # noqa: F401  (registers the Auto classes)


def neighbours(queries, embeddings) -> np.ndarray:
    """Index of the most similar embedding for each query: `(n, D)` and `(N, D)`, dense or sparse, of length one."""
    found = [
        np.asarray((queries[start : start + QUERIES] @ embeddings.T).argmax(1)).ravel()
        for start in range(0, queries.shape[0], QUERIES)
    ]
    return np.concatenate(found)


def label_accuracy(encoder, train: tuple[list, list], test: tuple[list, list]) -> None:
    """Print how often the nearest row has the right label."""
    labels, right = np.array(train[1]), np.array(test[1])
    known = encoder.encode(train[0], normalize_embeddings=True)
    start = time.perf_counter()
    found = encoder.encode(test[0], normalize_embeddings=True)
    milliseconds = 1000 * (time.perf_counter() - start) / len(test[0])
    score = (labels[neighbours(found, known)] == right).mean()
    words = TfidfVectorizer(sublinear_tf=True)
    known = words.fit_transform(train[0])
    baseline = (labels[neighbours(words.transform(test[0]), known)] == right).mean()
    print(f"label of the nearest of {len(labels):,} rows, for {len(right):,} rows: {100 * score:.1f}%")
    print(f"{milliseconds:.1f} ms per row    with TF-IDF: {100 * baseline:.1f}%")


def nearest_texts(encoder, texts: list[str], query: str) -> None:
    """Print the five texts that are most like the query."""
    similarity = encoder.similarity(encoder.encode(query), encoder.encode(texts))[0]
    print(f"nearest to {query!r}:")
    for i in similarity.argsort(descending=True)[:5].tolist():
        print(f"{similarity[i]:.3f}  {texts[i][:100]!r}")


def main(args: argparse.Namespace, rows: list[tuple[list, list]], texts: list[str]):
    encoder = SentenceTransformer(args.checkpoint)
    print(
        f"{args.checkpoint}: {sum(p.numel() for p in encoder.parameters()):,} parameters, {encoder.device}, {encoder.dtype}"
    )
    if rows:
        tell_of_known(rows[0][0], rows[1][0])
        label_accuracy(encoder, *rows)
        print(f"next: python examples/classify.py --train {args.train} --test {args.test}")
    else:
        query, texts = (args.query, texts) if args.query else (texts[0], texts[1:])
        nearest_texts(encoder, texts, query)
        print("next: python examples/embed.py --texts YOUR_LINES.txt --query 'what you look for'")


if __name__ == "__main__":
    with quiet_exit():
        main(args, rows, texts)
