# SPDX-License-Identifier: Apache-2.0
"""The shipped language identifier beside others (`peers.py`), on the test sets of `identify_data.py`.

    OMP_NUM_THREADS=1 python examples/research/identify_peers.py --data runs/langid --output examples/research/results/identify/stlm-langid.json

Accuracy is the mean over the languages that both know, each identifier choosing from all of its own; in "shared" both choose
from the shared ones. Who knows only a macrolanguage (`zh`, `ar`, `no`) has its members as one class, for both. Bytes per
second are of CPU time on one thread, one text after the other (ours: in batches). Answers are kept beside `--data`, so
that a run that was cut goes on.
"""

import argparse
import gzip
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import peers
from provenance import run_info
from tables import markdown_table


sys.path.append(str(Path(__file__).parents[1]))  # the examples

import identify
from inputs import checkpoint
from noise import add_noise


SETS = ("tatoeba", "udhr", "pud")
TYPOS = ("drop", "swap", "repeat")
CASES = (str.upper, str.lower, str)
SHORT = 20  # characters
SPEED_TEXTS, MIXED_LINES = 400, 300


def noisy(text: str, i: int) -> str:
    """A typing error in every tenth letter; upper case, lower case and as it is by turns."""
    return CASES[i % 3](add_noise(text, TYPOS[i // 3 % 3], 0.1, i))


VARIANTS: dict[str, Callable[[str, int], str]] = {
    "whole": lambda text, i: text,
    "20 characters": lambda text, i: text[:SHORT],
    "noisy": noisy,
}
# Set, variant, and whether both choose from the shared languages.
RUNS = [
    *((name, variant, False) for name in SETS for variant in ("whole", "20 characters")),
    ("tatoeba", "noisy", False),
    *((name, "20 characters", True) for name in SETS),
]


def read(path: Path) -> tuple[list[str], list[str]]:
    """Texts and their languages."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return tuple(map(list, zip(*((row["text"], row["lang"]) for row in map(json.loads, lines)))))


def cached(path: Path, answer: Callable[[], list]) -> list:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answer()))
    return json.loads(path.read_text())


def kept_as(peer: peers.Peer, name: str, variant: str, is_shared: bool) -> str:
    """The file of the answers of a peer, which another version would give otherwise."""
    return f"{peer.package} {peer.version} {name} {variant}{' shared' * is_shared}.json"


def macro_accuracy(found: list[str], expected: list[str], classes: dict[str, str]) -> tuple[float, int, int]:
    """Mean over classes, number of classes, number of texts.

    Args:
        found: languages; several, separated by spaces, are right for each.
        classes: class of every shared language; texts in others are left out.
    """
    if len(found) != len(expected):
        raise SystemExit(
            f"{len(found)} answers for {len(expected)} texts: the answers are those of other data, delete them"
        )
    hits = defaultdict(list)
    for answer, language in zip(found, expected):
        if language in classes:
            hits[classes[language]].append(classes[language] in {classes.get(a, a) for a in answer.split()})
    return sum(sum(h) / len(h) for h in hits.values()) / len(hits), len(hits), sum(map(len, hits.values()))


def answers_of_peer(peer: peers.Peer, texts: list[str], among: list[str] | None) -> list[str]:
    return [" ".join(peers.MEMBERS.get(a, [peers.CODES.get(a, a)])) for a in peer.identify(texts, among)]


class Ours:
    """The languages of lines, from the mean logits of each, kept in memory."""

    def __init__(self, folder: str):
        self.model = identify.load(folder)
        self.languages = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def logits(self, texts: list[str]):
        import torch

        empty = torch.zeros(1, len(self.languages))
        chunks = (texts[i : i + identify.CHUNK_LINES] for i in range(0, len(texts), identify.CHUNK_LINES))
        rows = (row for chunk in chunks for row in identify.byte_logits(self.model, chunk))
        return torch.stack([(row if len(row) else empty).mean(0) for row in rows])

    def best(self, logits, among: set[str]) -> list[str]:
        import torch

        allowed = torch.tensor([language in among for language in self.languages])
        return [self.languages[i] for i in logits.masked_fill(~allowed, -torch.inf).argmax(-1)]


def speed(identify_all: Callable[[list[str]], object], texts: list[str]) -> float:
    """Bytes per second of CPU time, loading left out."""
    identify_all(texts[:5])
    start = time.process_time()
    identify_all(texts)
    return sum(len(text.encode()) for text in texts) / (time.process_time() - start)


def mixed_lines(texts: list[str], languages: list[str], known: set[str]) -> list[list[tuple[str, str]]]:
    """Pairs of sentences in two languages, each pair a line."""
    rng = random.Random(1)
    by_language = defaultdict(list)
    for text, language in zip(texts, languages):
        if language in known:
            by_language[language].append(text)
    pairs = (rng.sample(sorted(by_language), 2) for _ in range(MIXED_LINES))
    return [[(language, rng.choice(by_language[language])) for language in pair] for pair in pairs]


def byte_accuracy(found: list[list[tuple[str, str]]], lines: list[list[tuple[str, str]]], classes: dict) -> float:
    """Share of bytes in a span of their language; spans are `(language, piece)` and make up the line."""
    right = total = 0
    for pieces, line in zip(found, lines):
        expected, answer = (
            [classes.get(language, language) for language, piece in row for _ in piece.encode()]
            for row in ([(line[0][0], line[0][1] + " "), line[1]], pieces)
        )
        assert len(expected) == len(answer), (len(expected), len(answer))
        right, total = right + sum(map(str.__eq__, expected, answer)), total + len(expected)
    return right / total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that identify_data.py wrote")
    default = str(Path(__file__).parents[1] / "checkpoints" / "stlm-langid")
    parser.add_argument("--checkpoint", type=checkpoint, default=default)
    parser.add_argument("--peers", nargs="+", default=list(peers.PEERS), choices=list(peers.PEERS))
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    args = parser.parse_args()
    sets = {name: read(args.data / f"{name}.jsonl.gz") for name in SETS}
    ours = Ours(args.checkpoint)
    texts_of = {
        (name, variant): [VARIANTS[variant](text, i) for i, text in enumerate(sets[name][0])]
        for name, variant, _ in RUNS
    }
    logits = {run: ours.logits(texts) for run, texts in texts_of.items()}
    everything = set(ours.languages)
    scores = defaultdict(dict)
    for (name, variant), found in logits.items():
        own = {language: language for language in everything}
        accuracy, classes, texts = macro_accuracy(ours.best(found, everything), sets[name][1], own)
        scores["all languages"][f"{name}, {variant}"] = {"ours": accuracy, "languages": classes, "texts": texts}
    sample = sets["tatoeba"][0][:: max(1, len(sets["tatoeba"][0]) // SPEED_TEXTS)]
    weights = Path(args.checkpoint) / "model.safetensors"
    about = {
        "ours": {"megabytes": weights.stat().st_size / 1e6, "labels": len(everything)}
        | {"bytes_per_second": speed(lambda texts: identify.identify(ours.model, texts), sample)}
    }
    for peer_name in args.peers:
        peer = peers.PEERS[peer_name]()
        classes, shared = peer.classes(everything), list(peer.codes(everything))
        about[peer_name] = {"megabytes": peer.megabytes, "labels": len(peer.labels), "version": peer.version}
        about[peer_name]["bytes_per_second"] = speed(peer.identify, sample)
        for name, variant, is_shared in RUNS:
            if is_shared and not peer.can_choose:
                continue
            among = shared if is_shared else None
            found = cached(
                args.data / "answers" / kept_as(peer, name, variant, is_shared),
                lambda peer=peer, key=(name, variant), among=among: answers_of_peer(peer, texts_of[key], among),
            )
            best = ours.best(logits[name, variant], set(classes) if is_shared else everything)
            theirs, count, texts = macro_accuracy(found, sets[name][1], classes)
            mine, *_ = macro_accuracy(best, sets[name][1], classes)
            key = f"{name}, {variant}{', shared' * is_shared}"
            scores[peer_name][key] = {"ours": mine, "theirs": theirs, "languages": count, "texts": texts}
        if peer.spans is not None:
            known = set(peer.codes(everything).values())
            lines = mixed_lines(*sets["tatoeba"], known)
            joined = [" ".join(text for _, text in line) for line in lines]
            theirs = [[(peers.CODES.get(code, code), piece) for code, piece in line] for line in peer.spans(joined)]
            scores[peer_name]["mixed lines, per byte"] = {
                "ours": byte_accuracy(identify.spans(ours.model, joined), lines, classes),
                "theirs": byte_accuracy(theirs, lines, classes),
                "languages": len(known),
                "texts": len(lines),
            }
        print(f"{peer_name}: {len(classes)} languages shared", flush=True)
    lines = mixed_lines(*sets["tatoeba"], everything)
    found = identify.spans(ours.model, [" ".join(text for _, text in line) for line in lines])
    own = {language: language for language in everything}
    scores["all languages"]["mixed lines, per byte"] = {
        "ours": byte_accuracy(found, lines, own),
        "languages": len(everything),
        "texts": len(lines),
    }
    results = {"scores": scores, "identifiers": about, "command": " ".join(Path(word).name for word in sys.argv)}
    args.output.write_text(json.dumps(results | run_info(), indent=1) + "\n")
    print(tables_of(scores, about))


def tables_of(scores: dict, about: dict) -> str:
    """Accuracy in percent, ours / theirs, and what each identifier is."""
    columns = list(dict.fromkeys(key for of_peer in scores.values() for key in of_peer))
    rows = []
    for name, of_peer in scores.items():
        cells = [
            f"{100 * s['ours']:.1f}" + (f" / {100 * s['theirs']:.1f}" if "theirs" in s else "") if s else ""
            for s in (of_peer.get(column) for column in columns)
        ]
        rows.append([name, *cells])
    accuracy = markdown_table(["ours / theirs", *columns], rows)
    facts = [
        [name, facts.get("version", ""), str(facts["labels"]), f"{facts['megabytes']:.1f}"]
        + [f"{facts['bytes_per_second'] / 1e3:,.0f}"]
        for name, facts in about.items()
    ]
    return accuracy + "\n\n" + markdown_table(["", "version", "languages", "MB", "kB per second"], facts)


if __name__ == "__main__":
    main()
