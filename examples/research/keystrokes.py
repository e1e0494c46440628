# SPDX-License-Identifier: Apache-2.0
r"""Completion as one types: microseconds a key, and the share of keys that it saves on held-out text.

    python -m modeling_stlm.inference.export examples/checkpoints/stlm-10m-wide stlm.gguf --type q8
    taskset -c 0 python examples/research/keystrokes.py stlm.gguf --text validation.jsonl.gz --words train-*.jsonl.gz
    taskset -c 0 python examples/research/keystrokes.py stlm.gguf --text validation.jsonl.gz --llama runs/llama-bpe --llama_cpp q8_0

Somebody types the first `--characters` characters of every document. After each key the rest of the word is suggested, or
the next word if none is begun; whoever sees that it is right, and longer than one character, takes it with one key. So this
is the most that a careful reader saves, without slips of the finger. A word is what `\w+` matches.

The model suggests what `Engine.complete` writes, up to `--new_bytes`, if the word ends there. Beside it: the commonest word of
the training text that begins so, and the same among the words that followed the word before (where none did, the former).
`--llama` adds a Llama over a BPE that `train.py` wrote, which may be healed at the token that the end of the text cuts (see
`healing.py`); its text begins with `<bos>`.
Times are CPU time of `complete`, with and without the bytes that are written; every 20th suggestion is also written by
`Engine.generate`, which knows nothing of the keys before: the bytes must be the same. (Those of a Llama may differ where logits
are nearly equal, as its matrix products depend on how many tokens they are for.) The last line is one JSON document.
"""

import argparse
import gzip
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import llamacpp
import numpy as np
from healing import Healed, LlamaCppReader, TorchReader
from provenance import run_info
from tables import markdown_table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_stlm.inference.engine import Engine


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one


WORD = re.compile(r"\w+")
CHECKED_EVERY = 20  # of which one suggestion is written from the start, too
GIVEN_BACK = {"not healed": 0, "healed by a token": 1, "healed by the word": None}
Suggest = Callable[[str], str]  # what to show after a text


def documents_of(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]


def begun(text: str) -> tuple[str, str]:
    """The word before the last one of `text`, and what there is of the last one; that is empty after other characters."""
    words = WORD.findall(text[-200:])
    last = words.pop() if words and text[-1:] == words[-1][-1:] else ""
    return (words[-1] if words else ""), last


def first_word(text: str, is_whole: bool) -> str:
    """The word that `text` begins with, or nothing: if it is not whole, the end of the text may cut a word."""
    match = WORD.match(text)
    return match.group() if match and (is_whole or match.end() < len(text)) else ""


def keys_of(text: str, suggest: Suggest) -> int:
    """Keys that `text` takes."""
    at = keys = 0
    while at < len(text):
        shown = suggest(text[:at])
        at += len(shown) if len(shown) > 1 and shown == first_word(text[at:], is_whole=True) else 1
        keys += 1
    return keys


class Words:
    """Suggestions from counts of words, and with `pairs` of words after words.

    Args:
        documents (`Iterable[str]`): text to count.
    """

    def __init__(self, documents: Iterable[str]):
        ids, texts = {"": 0}, []
        for document in documents:
            words = [ids.setdefault(word, len(ids)) for word in WORD.findall(document)]
            texts.append(np.array([0, *words], np.uint32))
        self.ids, self.names, text = ids, list(ids), np.concatenate(texts)
        counts = np.bincount(text, minlength=len(ids))
        self.common = self._by_beginning(np.argsort(-counts[1:], kind="stable") + 1)
        pairs, self.counts = np.unique(text[:-1].astype(np.uint64) << 32 | text[1:], return_counts=True)
        self.before, self.after = pairs >> 32, pairs & 0xFFFFFFFF
        self.followers = {}

    def _by_beginning(self, words: np.ndarray) -> dict[str, str]:
        """The first of `words` that begins so, for every beginning."""
        found = {}
        for word in words:
            name = self.names[word]
            for end in range(len(name)):
                found.setdefault(name[:end], name)
        return found

    def suggest(self, text: str) -> str:
        last = begun(text)[1]
        return self.common.get(last, last)[len(last) :]

    def suggest_after_word(self, text: str) -> str:
        before, last = begun(text)
        if before not in self.followers:
            low, high = np.searchsorted(self.before, [self.ids.get(before, 0), self.ids.get(before, 0) + 1])
            after = self.after[low:high][np.argsort(-self.counts[low:high], kind="stable")]
            self.followers[before] = self._by_beginning(after[after > 0])
        return self.followers[before].get(last, self.common.get(last, last))[len(last) :]


class Completion:
    """Suggestions of a model, and how long each took.

    Args:
        engine ([`Engine`] or [`Healed`]): the model.
        new_bytes (`int`): to write each time.
    """

    def __init__(self, engine: Engine | Healed, new_bytes: int):
        self.engine, self.new_bytes, self.num_different = engine, new_bytes, 0
        self.micros = {"key": [], "suggestion": [], "from the start": []}

    def _time(self, name: str, call: Callable, *arguments) -> bytes:
        started = time.process_time_ns()
        written = call(*arguments)
        self.micros[name].append((time.process_time_ns() - started) / 1000)
        return written

    def suggest(self, text: str) -> str:
        self._time("key", self.engine.complete, text, 0)  # so that the next call reads no more
        written = self._time("suggestion", self.engine.complete, text, self.new_bytes)
        if len(self.micros["key"]) % CHECKED_EVERY == 0:
            self.num_different += written != self._time("from the start", self.engine.generate, text, self.new_bytes)
            assert not self.num_different or isinstance(self.engine, Healed)
        return first_word(written.decode(errors="ignore"), is_whole=False)

    def results(self) -> dict:
        times = {
            name: {"median": statistics.median(micros), "p99": float(np.quantile(micros, 0.99))}
            for name, micros in self.micros.items()
        }
        return times | {"different": self.num_different}


def llamas(folder: Path, kind: str | None) -> Iterator[tuple[str, Healed]]:
    """The model in `folder` by how it is healed, through PyTorch or, as `kind`, through llama.cpp."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.gguf"
        if kind:
            llamacpp.write_gguf(path, kind, model, tokenizer)
        for name, give_back in GIVEN_BACK.items():
            reader = LlamaCppReader(path) if kind else TorchReader(model)
            yield f"{folder.name}, {name}", Healed(reader, tokenizer, give_back)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="files of modeling_stlm.inference.export")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".jsonl.gz with held-out documents")
    parser.add_argument("--words", type=Path, nargs="+", default=[], help=".jsonl.gz whose words are counted")
    parser.add_argument("--llama", type=Path, help="folder of a Llama over a BPE, as train.py writes it")
    parser.add_argument("--llama_cpp", choices=("f32", "f16", "q8_0", "q4_0"), help="run it there, not in PyTorch")
    parser.add_argument("--every", type=at_least_one, default=1, help="take one in so many documents")
    parser.add_argument("--characters", type=at_least_one, default=1000, help="of each document, default 1000")
    parser.add_argument(
        "--new_bytes", type=at_least_one, default=12, help="that are written after each key, default 12"
    )
    args = parser.parse_args()
    info = run_info(*(("llama-cpp-python", "gguf") if args.llama_cpp else ()))  # of the code that runs
    texts = [text[: args.characters] for text in documents_of(args.text)][:: args.every]
    words = Words(documents_of(args.words)) if args.words else None
    suggesters = {} if words is None else {"commonest word": words.suggest, "after the last": words.suggest_after_word}
    models = {path.stem: Engine(path) for path in args.models}
    models |= llamas(args.llama, args.llama_cpp) if args.llama else {}
    models = {name: Completion(engine, args.new_bytes) for name, engine in models.items()}
    suggesters |= {name: model.suggest for name, model in models.items()}
    results, rows, num_characters = {}, [], sum(map(len, texts))
    for name, suggest in suggesters.items():
        keys = [keys_of(text, suggest) for text in texts]
        results[name] = {"saved": 1 - sum(keys) / num_characters, "keys": keys}  # of each document
        if name in models:
            results[name] |= models[name].results()
        cells = (results[name].get(measure) for measure in ("key", "suggestion", "from the start"))
        rows.append([name, f"{100 * results[name]['saved']:.1f}"])
        rows[-1] += [f"{cell['median']:,.0f} ({cell['p99']:,.0f})" if cell else "" for cell in cells]
    info |= {"documents": len(texts), "characters": num_characters}
    print(", ".join(f"{name} {value}" for name, value in info.items()))
    head = [
        "",
        "% of keys saved",
        "us to read a key",
        f"to write {args.new_bytes} bytes",
        "both without the keys before",
    ]
    print(markdown_table(head, rows))
    print(json.dumps({"results": results} | info))


if __name__ == "__main__":
    main()
