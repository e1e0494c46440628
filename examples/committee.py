# SPDX-License-Identifier: Apache-2.0
r"""Does pre-training help a tiny classifier, and can a committee of shallow ones replace a deep one? (arXiv:2507.14871)

    python examples/committee.py --text 'wiki*.jsonl.gz' --train agnews/train.csv.gz --test agnews/test.csv.gz \
        --articles 1000 4000 16000 --pretraining_epochs 5 --finetuning_epochs 5 --seeds 3 --output runs/agnews

Masked bytes of the first articles of `--text` are predicted by a deep encoder and by shallow ones of other seeds; each is
then fine-tuned on the labelled rows, as are the same models without pre-training. `--train` and `--test` are read by
`datasets` as csv or json with columns `text` (or `--column`) and `label`. Prints accuracies (mean over seeds and standard
deviation) and latencies; writes `results.json` and `accuracy.png`. The same command goes on after an interruption; what was
pretrained stays in `--encoders`, for other labelled rows, too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from glob import escape
from itertools import islice
from pathlib import Path

from inputs import (
    MATRIX_OPTIMIZER,
    HelpFormatter,
    add_bf16,
    as_text,
    at_least_one,
    choose_precision,
    file_pattern,
    kind_of,
    output_folder,
    output_of,
    positive,
    preset,
    quiet_exit,
    require,
    text_file,
    whole,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--text", type=file_pattern, nargs="+", required=True, help="files or patterns of encyclopaedic articles"
    )
    parser.add_argument("--train", type=text_file, required=True, help="labelled rows, csv or json")
    parser.add_argument("--test", type=text_file, required=True, help="labelled rows, csv or json")
    parser.add_argument("--column", default="text", help="of the labelled files; FewRel: marked")
    parser.add_argument("--output", type=output_of(own=("begun.json",)), required=True, help="folder")
    parser.add_argument(
        "--encoders", type=output_folder, help="folder of what was pretrained; by default in the output folder"
    )
    parser.add_argument("--preset", type=preset, default="stlm-3m", help="all sizes but the depth of the trunk")
    parser.add_argument("--deep", type=at_least_one, default=6, help="layers of the deep trunk")
    parser.add_argument("--shallow", type=at_least_one, default=1, help="layers of the shallow trunks")
    parser.add_argument("--members", type=at_least_one, default=4, help="shallow models in a committee")
    parser.add_argument("--articles", type=whole, nargs="+", default=[100, 300, 1000], help="sizes of the corpus")
    parser.add_argument(
        "--rows", type=at_least_one, help="labelled rows to train on, the first ones of a shuffle; default: all"
    )
    parser.add_argument("--test_rows", type=at_least_one, help="labelled rows to test on, likewise; default: all")
    parser.add_argument("--max_bytes", type=at_least_one, default=512, help="bytes read of each article and row")
    parser.add_argument("--pretraining_epochs", type=positive, default=1, help="over the articles")
    parser.add_argument("--finetuning_epochs", type=positive, default=1, help="over the labelled rows")
    parser.add_argument("--batch_size", type=at_least_one, default=32, help="rows")
    add_bf16(parser)
    parser.add_argument("--seeds", type=at_least_one, default=1, help="repetitions")
    parser.set_defaults(matrix_optimizer=MATRIX_OPTIMIZER)
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets", "matplotlib")

import torch
from datasets import Dataset, load_dataset
from matplotlib.figure import Figure
from run_folder import EndOnDivergence, begin, check_same, names_and_sizes, per_device, run_info
from score import documents
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

from modeling_stlm import STLMCommittee, STLMConfig, STLMForMaskedLM, STLMTokenizer
from modeling_stlm.training.optimizer import MuonRecipe


TOKENIZER = STLMTokenizer()
ARMS = ("deep", "shallow", "committee")
PRETRAINED_WITH = ("preset", "max_bytes", "pretraining_epochs", "batch_size", "matrix_optimizer", "bf16", "text")


def encode(texts: list[str], max_bytes: int) -> list[list[int]]:
    return TOKENIZER(texts, truncation=True, max_length=max_bytes)["input_ids"]


def labelled(file: Path, args: argparse.Namespace) -> Dataset:
    kind = kind_of(file) or "json"
    rows = load_dataset(kind, data_files=escape(str(file)), split="train")
    if not {args.column, "label"} <= set(rows.column_names):
        raise SystemExit(f"{file} has the columns {rows.column_names}, expected {args.column} (--column) and label")
    for number, text in enumerate(rows[args.column], start=1):
        if not isinstance(text, str):
            raise SystemExit(f"row {number} of {file} has the {args.column} {text!r}, expected a text")
    return Dataset.from_dict({"input_ids": encode(list(rows[args.column]), args.max_bytes), "labels": rows["label"]})


def number_labels(sets: dict[str, Dataset]) -> list:
    """Replace the labels, words or numbers, by their places among those of the rows to train on, which are returned."""
    if any(None in rows["labels"] for rows in sets.values()):
        raise SystemExit("--train and --test have rows without a label: leave them out")
    labels = sorted(set(sets["train"]["labels"]))
    if len(labels) < 2:
        raise SystemExit(f"--train has the labels {labels}, expected at least two")
    if unknown := sorted(set(sets["test"]["labels"]) - set(labels)):
        raise SystemExit(f"--test has the labels {unknown}, which --train lacks: expected some of {labels}")
    for split, rows in sets.items():
        numbers = [labels.index(label) for label in rows["labels"]]
        sets[split] = rows.remove_columns("labels").add_column("labels", numbers)
    return labels


def trainer_of(model, data, args: argparse.Namespace, epochs: float, seed: int, **options) -> Trainer:
    training = TrainingArguments(
        str(args.output / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=per_device(args.batch_size),
        per_device_eval_batch_size=args.batch_size,
        warmup_steps=0.05,
        train_sampling_strategy="group_by_length",
        seed=seed,
        bf16=args.bf16,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    recipe = (MuonRecipe, {"muon_lr": 0.01, "adamw_lr": 2e-3})
    trainer = Trainer(
        model, training, train_dataset=data, processing_class=TOKENIZER, optimizer_cls_and_kwargs=recipe, **options
    )
    trainer.add_callback(EndOnDivergence("the rates in this script"))
    return trainer


def settings_of(args: argparse.Namespace, names: Iterable[str]) -> dict[str, str]:
    """For a record."""
    files = {"train": [args.train], "test": [args.test], "text": args.text}
    return {name: names_and_sizes(files[name]) if name in files else str(getattr(args, name)) for name in names}


def encoder_config(layers: int, args: argparse.Namespace, **fields) -> STLMConfig:
    sizes = {"num_trunk_layers": layers, "num_unique_trunk_layers": layers, "layer_sharing": "none"}
    return STLMConfig.from_preset(args.preset, is_causal=False, **sizes, **fields)


def pretrained(layers: int, articles: list[str], args: argparse.Namespace, seed: int) -> Path:
    """Folder of a masked language model of `articles`; without any, of random weights. One that is there is kept."""
    folder = (args.encoders or args.output / "encoders") / f"{layers}-layers-{len(articles)}-articles-seed-{seed}"
    settings = settings_of(args, PRETRAINED_WITH)
    record = folder / "pretraining.json"  # written last
    if record.is_file():
        check_same(record, settings)
        return folder
    set_seed(seed)
    model = STLMForMaskedLM(encoder_config(layers, args))
    if articles:
        data = [{"input_ids": ids} for ids in encode(articles, args.max_bytes)]
        collator = DataCollatorForLanguageModeling(TOKENIZER, mlm_probability=0.15)
        trainer_of(model, data, args, args.pretraining_epochs, seed, data_collator=collator).train()
    model.save_pretrained(folder)
    record.write_text(json.dumps(settings, indent=1) + "\n")
    return folder


def finetuned(folder: Path, sets: dict[str, Dataset], labels: list, args: argparse.Namespace, seed: int):
    """A classifier that starts from `folder`."""
    set_seed(seed)
    names = dict(enumerate(map(str, labels)))
    label2id = {name: number for number, name in names.items()}
    model = AutoModelForSequenceClassification.from_pretrained(folder, id2label=names, label2id=label2id)
    trainer_of(model, sets["train"], args, args.finetuning_epochs, seed).train()
    return model.eval()


def accuracy(model, sets: dict[str, Dataset], args: argparse.Namespace) -> float:
    predicted = trainer_of(model, None, args, 1, 0).predict(sets["test"])
    return float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())


@torch.no_grad()
def latency(model, sets: dict[str, Dataset], batch_size: int, repeats: int = 15) -> float:
    """Median milliseconds of a call on rows of the test set."""
    rows = {"input_ids": sets["test"]["input_ids"][:batch_size]}
    batch = TOKENIZER.pad(rows, return_tensors="pt").to(model.device)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(**batch).logits.cpu()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])  # the first call warms up


def spread(values: list[float]) -> str:
    deviation = f" +- {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def compare(
    articles: list[str], sets: dict[str, Dataset], labels: list, args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """Accuracy of each arm after pre-training on `articles`; keeps the committee of most articles in the output folder."""

    def classifier(layers: int, number: int):
        return finetuned(pretrained(layers, articles, args, number), sets, labels, args, number)

    members = [classifier(args.shallow, seed * args.members + i) for i in range(args.members)]
    models = {"deep": classifier(args.deep, seed), "shallow": members[0]}
    models["committee"] = STLMCommittee.from_members(members)
    if len(articles) == max(args.articles):
        models["committee"].save_pretrained(args.output / "committee")
        TOKENIZER.save_pretrained(args.output / "committee")
    return {arm: accuracy(models[arm], sets, args) for arm in ARMS}


def untrained(args: argparse.Namespace, num_labels: int, device: torch.device) -> dict[str, torch.nn.Module]:
    """Models of the sizes of all arms, to take the time of."""

    def classifier(layers: int):
        config = encoder_config(layers, args, num_labels=num_labels)
        return AutoModelForSequenceClassification.from_config(config).to(device).eval()

    members = [classifier(args.shallow) for _ in range(args.members)]
    committee = STLMCommittee.from_members(members).eval()
    return {"deep": classifier(args.deep), "shallow": members[0], "committee": committee}


def main(args: argparse.Namespace):
    logging.set_verbosity_error()  # every classifier starts with a fresh head: not worth a report each time
    choose_precision(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    info = run_info(device)
    articles = list(islice((as_text(text) for text in documents(args.text) if text), max(args.articles)))
    if len(articles) < max(args.articles):
        raise SystemExit(f"{args.text} hold {len(articles)} articles, expected at least {max(args.articles)}")
    sets = {"train": labelled(args.train, args), "test": labelled(args.test, args)}
    labels = number_labels(sets)
    for split, rows in (("train", args.rows), ("test", args.test_rows)):
        shuffled = sets[split].shuffle(seed=0)
        if rows and rows > len(shuffled):
            raise SystemExit(f"{getattr(args, split)} has {len(shuffled):,} rows, expected at least {rows:,}")
        sets[split] = shuffled.select(range(rows or len(shuffled)))
    path = args.output / "cells.json"  # accuracies, by seed and number of articles
    settings = settings_of(args, sorted(set(vars(args)) - {"articles", "encoders", "output", "seeds"}))
    begun = args.output / "begun.json"
    encoder_config(args.deep, args)  # a mistake in the sizes is told before anything is written
    begin(begun, settings, goes_on=begun.is_file() or path.is_file())
    cells = json.loads(path.read_text()) if path.is_file() else {}
    for seed in range(args.seeds):
        for size in (0, *args.articles):
            key = f"seed {seed}, {size} articles"
            if key not in cells:
                cells[key] = compare(articles[:size], sets, labels, args, seed)
                written = path.with_suffix(".part")
                written.write_text(json.dumps(cells, indent=1) + "\n")
                written.replace(path)  # nothing is lost where a run is stopped while it writes
            print(f"{key}:", cells[key], flush=True)
    accuracies = {
        arm: {
            size: [cells[f"seed {n}, {size} articles"][arm] for n in range(args.seeds)] for size in (0, *args.articles)
        }
        for arm in ARMS
    }
    models = untrained(args, len(labels), device)
    speed = {arm: {size: latency(model, sets, size) for size in (1, 32)} for arm, model in models.items()}
    parameters = {arm: model.num_parameters() for arm, model in models.items()}
    print(f"\n{'accuracy in %':<16}" + "".join(f"{f'{size} articles':>18}" for size in (0, *args.articles)))
    for arm in ARMS:
        print(f"{arm:<16}" + "".join(f"{spread(values):>18}" for values in accuracies[arm].values()))
    print(f"\n{'':<16}{'parameters':>18}{'ms at batch 1':>18}{'ms at batch 32':>18}")
    for arm in ARMS:
        print(f"{arm:<16}{parameters[arm]:>18,}{speed[arm][1]:>18.1f}{speed[arm][32]:>18.1f}")
    results = {
        "arguments": settings | {"articles": args.articles, "seeds": args.seeds},
        "accuracy": accuracies,
        "latency_ms": speed,
        "parameters": parameters,
        "threads": torch.get_num_threads(),
    } | info
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for arm in ARMS:
        means = [statistics.mean(values) for values in accuracies[arm].values()]
        errors = [statistics.stdev(values) if len(values) > 1 else 0 for values in accuracies[arm].values()]
        axes.errorbar(range(len(means)), means, errors, marker="o", capsize=3, label=arm)
    axes.set_xticks(range(len(means)), (0, *args.articles))
    axes.set(xlabel="articles of pre-training", ylabel="accuracy")
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.output / "accuracy.png", dpi=120)


if __name__ == "__main__":
    with quiet_exit():
        main(args)
