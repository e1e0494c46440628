# SPDX-License-Identifier: Apache-2.0
"""Which language is it? One label per byte, so that short, noisy and mixed lines work.

    python examples/identify.py "Guten Tag" "Dzień dobry"     # or lines of standard input: code (ISO 639-3), probability, line
    python examples/identify.py --spans < mixed_lines.txt # where which language stands
    python examples/identify.py --train train.jsonl.gz --validation validation.jsonl.gz --output runs/langid

The model is an `STLMForTokenClassification` that looks both ways, most of it n-gram tables. The language of a line is that
of its mean logits; the loss is that of bytes and of lines. Training reads JSON lines with `text` and `lang` and takes the
plain `Trainer`; Ctrl-C and SIGTERM save, and the same command goes on.
"""

import argparse
import json
import math
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from inputs import (
    HelpFormatter,
    add_bf16,
    add_rates,
    at_least_one,
    checkpoint,
    choose_precision,
    output_of,
    positive,
    quiet_exit,
    rates_of,
    read_json_lines,
    require,
    text_file,
    whole,
)


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


SHIPPED = Path(__file__).parent / "checkpoints" / "stlm-langid"
CONFIG = {  # 1.4 million parameters, 1.2 million of them in tables
    "is_causal": False,
    "hidden_size": 80,
    "intermediate_size": 160,
    "num_local_encoder_layers": 1,
    "num_local_decoder_layers": 1,
    "ngram_rows": 15000,
    "ngram_embedding_size": 16,
    "trunk_hidden_size": 96,
    "trunk_intermediate_size": 192,
    "trunk_num_attention_heads": 2,
    "trunk_num_key_value_heads": 2,
    "num_trunk_layers": 1,
}
LINE_BYTES = 8, 192  # shortest and longest line that is trained on
MIXED, CASED, MISTYPED, CUT = 0.2, 0.15, 0.2, 0.5  # shares of lines, and of sentences
LENGTHS = {"whole lines": None, "first 20 characters": 20}  # in characters
WINDOW_BYTES = 1024  # longer lines are read in pieces
BATCH_BYTES = 16384
CHUNK_LINES = 256  # read, identified and printed at a time
WORDS = re.compile(r"[\u0800-\U0010ffff]\s*|[^\s\u0800-\U0010ffff]+\s*|\s+")
SWITCH_NATS = 8.0  # what a change of language must gain
COMPARED = ("batch_size", "muon_lr", "adamw_lr", "matrix_optimizer", "bf16", "seed")  # where a training goes on


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("lines", nargs="*", help="texts; without any, the lines of standard input")
    # A path, which `argparse` does not check: training needs no checkpoint.
    parser.add_argument("--checkpoint", type=checkpoint, default=SHIPPED, help="folder or Hub id")
    parser.add_argument("--spans", action="store_true", help="spans of one language each")
    parser.add_argument("--train", type=text_file, nargs="+", help="JSON lines with text and lang: train a model")
    parser.add_argument("--validation", type=text_file, nargs="+", default=[], help="JSON lines: accuracy at the end")
    parser.add_argument("--output", type=Path, default="runs/langid", help="folder of the model that --train makes")
    parser.add_argument("--max_minutes", type=positive, default=30, help="of training, in CPU time")
    parser.add_argument("--batch_size", type=at_least_one, default=64, help="lines per step")
    add_rates(parser, 0.03, 0.03)
    add_bf16(parser)
    parser.add_argument("--seed", type=whole, default=1, help="of weights and order")
    args = parser.parse_args()
    if args.train:
        try:
            output_of("STLMForTokenClassification", own=("begun.json",))(str(args.output))
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --output: {error}")
    return args


# Identify


def load(checkpoint: str | Path) -> "PreTrainedModel":
    """A model with a label for every byte; any other ends the program, for it would get labels at random."""
    from transformers import AutoConfig, AutoModelForTokenClassification

    import modeling_stlm  # noqa: F401  (registers the Auto classes)

    config = AutoConfig.from_pretrained(checkpoint)
    names = config.architectures or ["model of no known kind"]
    if not names[0].endswith("ForTokenClassification"):
        raise SystemExit(
            f"{checkpoint} is a {names[0]} and knows no languages: expected what `identify.py --train` writes"
        )
    if spans := [label for label in config.id2label.values() if label.startswith(("B-", "I-"))]:
        raise SystemExit(
            f"{checkpoint} has labels of spans ({spans[0]}) and knows no languages: expected what `identify.py --train` writes"
        )
    return AutoModelForTokenClassification.from_pretrained(checkpoint).eval()


def byte_logits(model: "PreTrainedModel", texts: list[str]) -> list["torch.Tensor"]:
    """Logits of the languages at every byte of each text, (T, L); an empty text has none."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    windows = [(i, window) for i, text in enumerate(texts) for window in cut(text)]
    found: list[torch.Tensor] = [torch.empty(0)] * len(windows)
    order = sorted(range(len(windows)), key=lambda j: len(windows[j][1]))
    while order:  # the longest first, with as many of about its length as fit
        size = max(1, BATCH_BYTES // len(windows[order[-1]][1]))
        order, chosen = order[:-size], order[-size:]
        rows = [torch.tensor(list(windows[j][1])) for j in chosen]
        ids = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
        with torch.inference_mode():
            ids = ids.to(model.device)
            logits = model(ids, attention_mask=(ids != model.config.pad_token_id).long()).logits.cpu()
        for j, row, of_row in zip(chosen, rows, logits):
            found[j] = of_row[: len(row)]
    pieces = defaultdict(list)
    for (i, _), logits in zip(windows, found):
        pieces[i].append(logits)
    none = torch.empty(0, model.config.num_labels)
    return [torch.cat(pieces[i]) if i in pieces else none for i in range(len(texts))]


def cut(text: str) -> list[bytes]:
    """UTF-8 in windows of whole characters."""
    data, windows = text.encode(errors="replace"), []
    while data:
        window = data[:WINDOW_BYTES].decode(errors="ignore").encode()
        windows.append(window)
        data = data[len(window) :]
    return windows


def identify(model: "PreTrainedModel", texts: list[str]) -> list[tuple[str, float]]:
    """Language of each text and its probability; `("und", 0.0)`, undetermined, where there is no letter."""
    found = []
    for text, logits in zip(texts, byte_logits(model, texts)):
        if not any(map(str.isalpha, text)):
            found.append(("und", 0.0))
            continue
        probability, label = logits.mean(0).softmax(-1).max(-1)
        found.append((model.config.id2label[int(label)], float(probability)))
    return found


def spans(model: "PreTrainedModel", texts: list[str]) -> list[list[tuple[str, str]]]:
    """Each text as pieces `(language, piece)`: the most probable path that changes between words, or between characters of
    three or more bytes (scripts without spaces). None where there is no letter."""
    found = []
    for text, logits in zip(texts, byte_logits(model, texts)):
        words = WORDS.findall(text) or [text]
        sizes = [len(word.encode(errors="replace")) for word in words]
        path = best_path([scores.sum(0) for scores in logits.log_softmax(-1).split(sizes)])
        pieces: list[tuple[str, str]] = []
        for word, label in zip(words, path):
            language = model.config.id2label[label]
            if pieces and pieces[-1][0] == language:
                word = pieces.pop()[1] + word
            pieces.append((language, word))
        found.append(pieces if any(map(str.isalpha, text)) else [])
    return found


def best_path(scores: list["torch.Tensor"]) -> list[int]:
    """Labels with the largest sum of `scores` (L,) when each change costs `SWITCH_NATS` (Viterbi)."""
    import torch

    total, origins = scores[0], []
    for score in scores[1:]:
        best, label = total.max(-1)
        stays = total >= best - SWITCH_NATS
        origins.append(torch.where(stays, torch.arange(len(total)), label))
        total = torch.where(stays, total, best - SWITCH_NATS) + score
    path = [int(total.argmax())]
    for origin in reversed(origins):
        path.append(int(origin[path[-1]]))
    return path[::-1]


# Train


def read_sentences(paths: Iterable[Path]) -> dict[str, list[str]]:
    """Sentences by language; what is wrong with a file ends the program."""
    found = defaultdict(list)
    for path in paths:
        for number, row in enumerate(read_json_lines(path), 1):
            text, language = row.get("text"), row.get("lang")
            if not isinstance(text, str) or not isinstance(language, str):
                message = f'{path}, row {number}: expected strings such as {{"text": "Guten Tag", "lang": "deu"}}'
                raise SystemExit(f"{message}, got {json.dumps(row)[:80]}")
            if text := " ".join(text.split()):
                found[language].append(text)
    return dict(found)


class Lines:
    """Lines to train on: cut, mixed, mistyped and re-cased sentences. Item i is a function of the seed and of i, so that
    a resumed run goes on as if it had not stopped. The lines of a batch have about the same number of bytes."""

    def __init__(self, sentences: dict[str, list[str]], label2id: dict[str, int], batch_size: int, seed: int):
        self.sentences, self.label2id, self.batch_size, self.seed = sentences, label2id, batch_size, seed
        self.languages = sorted(sentences)
        # Between equal shares of languages and of sentences.
        self.weights = [len(sentences[language]) ** 0.3 for language in self.languages]

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        shortest, longest = map(math.log, LINE_BYTES)
        size = round(math.exp(random.Random(f"{self.seed} {i // self.batch_size}").uniform(shortest, longest)))
        rng = random.Random(f"{self.seed} line {i}")
        language, is_mixed = self.language(rng), rng.random() < MIXED
        ids, labels = [], []
        while len(ids) < size:
            text = disturbed(rng.choice(self.sentences[language]), rng)
            piece = text.encode(errors="ignore")[: size - len(ids)].decode(errors="ignore").encode()
            if not piece:
                break
            ids += piece
            labels += [self.label2id[language]] * len(piece)
            if is_mixed:
                language = self.language(rng)
        return {"input_ids": ids, "labels": labels}

    def language(self, rng: random.Random) -> str:
        return rng.choices(self.languages, self.weights)[0]


def disturbed(text: str, rng: random.Random) -> str:
    """A sentence as people write it: from some word on, in other case, with typing errors; and a space."""
    if rng.random() < CUT:
        start = rng.randrange(len(text))
        text = text[text.find(" ", start) + 1 :] if " " in text[start:-1] else text[start:]
    if rng.random() < CASED:
        text = rng.choice((str.upper, str.lower, str.lower, str.title))(text)
    if rng.random() < MISTYPED:
        rate, characters = rng.uniform(0, 0.2), list(text)
        for i, character in enumerate(characters):
            if character.isalpha() and rng.random() < rate:
                kind = rng.randrange(4)
                if kind == 1 and i:
                    characters[i - 1], characters[i] = character, characters[i - 1]
                else:
                    characters[i] = ("", character, 2 * character, rng.choice(text))[kind]
        text = "".join(characters)
    return text + " "


def loss_of_bytes_and_lines(outputs, labels: "torch.Tensor", num_items_in_batch=None) -> "torch.Tensor":
    """Cross entropy of the bytes, and of the lines in one language: their logits are the means over their bytes.

    `labels` (B, T) are -100 at padding.
    """
    from torch.nn.functional import cross_entropy

    logits, is_byte = outputs.logits.float(), labels != -100
    of_bytes = cross_entropy(logits.transpose(1, 2), labels)
    languages = labels.amax(1)
    is_one = ((labels == languages[:, None]) == is_byte).all(1) & is_byte.any(1)
    means = (logits * is_byte[..., None]).sum(1) / is_byte.sum(1, keepdim=True).clamp(min=1)
    return of_bytes + cross_entropy(means[is_one], languages[is_one], reduction="sum") / is_one.sum().clamp(min=1)


def train(args: argparse.Namespace) -> None:
    sentences, tests = read_sentences(args.train), read_sentences(args.validation)
    label2id = {language: i for i, language in enumerate(sorted(sentences))}
    if len(label2id) < 2:
        raise SystemExit(f"--train has the languages {list(label2id)}, expected at least two")
    if unknown := sorted(set(tests) - set(label2id)):
        raise SystemExit(f"--validation has languages that --train lacks: {unknown}")

    import torch
    from run_folder import (
        EndOnDivergence,
        ResumeLine,
        begin,
        is_spent,
        last_checkpoint,
        names_and_sizes,
        per_device,
        run_info,
    )
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments, set_seed

    from modeling_stlm import STLMConfig, STLMForTokenClassification, STLMTokenizer
    from modeling_stlm.training.long_runs import SaveByTime, StopOnSignal
    from modeling_stlm.training.optimizer import MuonRecipe
    from modeling_stlm.training.time_budget import TimeBudget

    choose_precision(args)
    checkpoint = last_checkpoint(args.output)
    settings = {name: str(getattr(args, name)) for name in COMPARED}
    settings["train"] = names_and_sizes(args.train)
    begin(args.output / "begun.json", settings, goes_on=checkpoint is not None)
    set_seed(args.seed)
    tokenizer = STLMTokenizer(padding_side="right")  # the library's pipelines cannot pad an empty text on the left
    model = STLMForTokenClassification(
        STLMConfig(**CONFIG, label2id=label2id, id2label={i: language for language, i in label2id.items()})
    )
    model.score.bias.requires_grad_(False)  # stays zero, as in the head for sequences, which has none
    num_sentences = sum(map(len, sentences.values()))
    print(f"{model.num_parameters():,} parameters, {len(label2id)} languages, {num_sentences:,} sentences")
    stop, budget = StopOnSignal(), TimeBudget(args.max_minutes, clock="cpu")
    resume = ResumeLine(lambda state: f"{budget.elapsed_seconds / 60:.1f} of {args.max_minutes:g} min")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(args.output),
            max_steps=10**9,  # until the budget is spent
            per_device_train_batch_size=per_device(args.batch_size),
            train_sampling_strategy="sequential",
            lr_scheduler_type="constant",
            logging_steps=100,
            save_strategy="no",
            save_total_limit=1,
            disable_tqdm=True,
            bf16=args.bf16,
            report_to="none",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Lines(sentences, label2id, args.batch_size, args.seed),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_loss_func=loss_of_bytes_and_lines,
        optimizer_cls_and_kwargs=(MuonRecipe, rates_of(args)),
        callbacks=[budget, resume, stop, SaveByTime(minutes=5)],
    )
    trainer.add_callback(EndOnDivergence("--muon_lr or --adamw_lr, with a new --output"))
    if not is_spent(trainer, checkpoint, args.max_minutes, ["validation"] if tests else []):
        trainer.train(resume_from_checkpoint=checkpoint)
    if stop.received is not None:
        print(f"{stop.received.name}: saved after {budget.elapsed_seconds / 60:.1f} min; the same command goes on")
        raise SystemExit(128 + stop.received)
    trainer.save_model()
    model.eval()
    scores = {name: accuracy(model, tests, length) for name, length in LENGTHS.items()} if tests else {}
    # Results are published: names of files, no folders of this machine, nothing of what only identifies.
    names = {name: " ".join(path.name for path in getattr(args, name)) for name in ("train", "validation")}
    arguments = {name: value for name, value in vars(args).items() if name not in ("lines", "spans", "checkpoint")} | {
        name: files for name, files in names.items() if files
    }
    results = {
        "base_model": {},  # none: from random weights
        "languages": len(label2id),
        "sentences": num_sentences,
        "stored_parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "cpu_minutes": budget.elapsed_seconds / 60,
        "scores": {f"validation, {name}": {"accuracy": score} for name, score in scores.items()},
        "scoring": "Mean over languages of the share of sentences that are identified",
        "arguments": {name: str(value) for name, value in (arguments | {"output": args.output.name}).items()},
    } | run_info(model.device)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, score in scores.items():
        print(f"{name}: {score:.4f}")
    print(f"next: python examples/identify.py --checkpoint {args.output} 'Guten Tag'")


def accuracy(model: "PreTrainedModel", sentences: dict[str, list[str]], length: int | None = None) -> float:
    """Mean over languages of the share of sentences, cut to so many characters, that are identified."""
    lines = [(text[:length], language) for language, texts in sentences.items() for text in texts]
    hits = defaultdict(list)
    for start in range(0, len(lines), CHUNK_LINES):  # the logits of all lines may be gigabytes
        texts, languages = zip(*lines[start : start + CHUNK_LINES])
        for language, (found, _) in zip(languages, identify(model, list(texts))):
            hits[language].append(found == language)
    return sum(sum(hit) / len(hit) for hit in hits.values()) / len(hits)


def main(args: argparse.Namespace):
    if args.train:
        return train(args)
    for line in args.lines:
        if len(line) < 256 and Path(line).is_file():
            raise SystemExit(f"{line} is a file, expected a text: its lines are read with `identify.py < {line}`")
    lines = iter(args.lines or (line.decode(errors="replace").rstrip("\r\n") for line in sys.stdin.buffer))
    model = load(args.checkpoint)
    while chunk := list(islice(lines, CHUNK_LINES)):
        if args.spans:
            rows = [
                " | ".join(f"{language}: {piece.strip()}" for language, piece in row) for row in spans(model, chunk)
            ]
        else:
            found = identify(model, chunk)
            rows = [f"{language}\t{chance:.3f}\t{line}" for line, (language, chance) in zip(chunk, found)]
        print(*rows, sep="\n", flush=True)


if __name__ == "__main__":
    args = parse_arguments()
    if args.train:
        require("train", "accelerate", "matplotlib")
    with quiet_exit():
        main(args)
