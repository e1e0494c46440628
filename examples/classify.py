# SPDX-License-Identifier: Apache-2.0
"""Classify texts: fine-tune an encoder on labelled rows, beside TF-IDF with logistic regression.

    python examples/classify.py                                        # who speaks? Shipped text, a minute
    python examples/classify.py --train rows.csv --test other_rows.csv
    python examples/classify.py --train rows.jsonl                     # a fifth of the rows is held out

Rows have the columns `text` and `label` (csv or JSON lines, also .gz). The head starts as a logistic regression on the mean
of the hidden states, then everything is trained (LP-FT, arXiv:2202.10054). A head that starts at random has to grow first, and
wants ten times the rate. Half of the loss is adversarial: that of embeddings perturbed along its gradient
(arXiv:1605.07725). The numbers are in `research/LOG.md`.
"""

import argparse
import time
from pathlib import Path

from inputs import HelpFormatter, add_label_training, choose_precision, positive, quiet_exit, require, text_file
from rows import read_labelled, speeches, split_rows, tell_of_known


HERE = Path(__file__).parent


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--train", type=text_file, help="labelled rows; without it, speeches of the shipped Shakespeare"
    )
    parser.add_argument("--test", type=text_file, help="labelled rows; without it, a fifth of --train")
    parser.add_argument("--epochs", type=positive, default=3, help="over the rows")
    add_label_training(parser, "runs/classifier", "STLMForSequenceClassification", 2e-3, 32)
    return parser.parse_args()


def read_sets(args: argparse.Namespace) -> tuple[tuple[list, list], tuple[list, list]]:
    """Texts and labels to train on and to test on."""
    rows = read_labelled(args.train) if args.train else speeches(HERE / "data" / "shakespeare.txt")
    train, test = (rows, read_labelled(args.test, fewest_labels=1)) if args.test else split_rows(rows)
    if unknown := set(test[1]) - set(train[1]):
        raise SystemExit(f"labels of the test rows that no row to train on has: {sorted(unknown)}")
    return train, test


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets", "matplotlib", "sklearn")
    with quiet_exit():
        train, test = read_sets(args)  # before the slow imports: a mistake is told at once

import numpy as np
import torch
from datasets import Dataset
from run_folder import per_device, train_runs, write_label_results
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_stlm.training.adversarial import AdversarialTrainer  # modeling_stlm registers the Auto classes


def tfidf(train: tuple[list, list]) -> Pipeline:
    """Words and pairs of words with a logistic regression: what to beat."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return make_pipeline(words, LogisticRegression(C=10, max_iter=1000)).fit(*train)


def start_head(model, features, labels) -> None:
    """Set the head to a logistic regression on `features (N, D)` and class indices `labels (N,)`."""
    scale = features.std(0)
    fitted = LogisticRegression(C=0.1, fit_intercept=False, max_iter=1000).fit(features / scale, labels)
    weight = fitted.coef_ / scale
    if len(weight) == 1:  # of two classes only the second has one
        weight = np.concatenate([-weight / 2, weight / 2])
    with torch.no_grad():
        model.score.weight.copy_(torch.from_numpy(weight))


def tokenized(rows: tuple[list, list], tokenizer: PreTrainedTokenizerBase, label2id: dict, max_bytes: int) -> Dataset:
    ids = tokenizer(rows[0], truncation=True, max_length=max_bytes)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [label2id[label] for label in rows[1]]})


def trainer_of(train: tuple[list, list], args: argparse.Namespace) -> Trainer:
    """A trainer of a classifier whose head is a logistic regression."""
    set_seed(args.seed)
    names = sorted(set(train[1]))
    label2id = {name: i for i, name in enumerate(names)}
    # The library's pipelines cannot pad an empty text on the left.
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(
        args.checkpoint, dtype=torch.float32, id2label=dict(enumerate(names)), label2id=label2id
    )
    data = tokenized(train, tokenizer, label2id, args.max_bytes)
    trainer = AdversarialTrainer(
        model,
        TrainingArguments(
            str(args.output),
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            warmup_steps=0.1,
            per_device_train_batch_size=per_device(args.batch_size),
            per_device_eval_batch_size=args.batch_size,
            logging_steps=50,
            save_strategy="no",
            bf16=args.bf16,
            seed=args.seed,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=data,
        processing_class=tokenizer,
        epsilon=args.adversarial_epsilon,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    head, model.score = model.score, torch.nn.Identity()
    features = trainer.predict(data.remove_columns("labels")).predictions
    model.score = head
    start_head(model, features, data["labels"])
    trainer.args.train_sampling_strategy = (
        "group_by_length"  # not before: predictions come in the order of the sampler
    )
    return trainer


def files_of(args: argparse.Namespace) -> dict[str, str]:
    """What the rows are called in the card: names of files, no folders."""
    name = args.train.name if args.train else "the speeches in shakespeare.txt"
    if args.test:
        return {"train": name, "test": args.test.name}
    return {"train": f"four fifths of {name}", "test": f"a fifth of {name}"}


def accuracy(trainer: Trainer, rows: tuple[list, list], max_bytes: int) -> tuple[float, float]:
    """Share of the rows that get their label, and milliseconds per row."""
    data = tokenized(rows, trainer.processing_class, trainer.model.config.label2id, max_bytes)
    start = time.perf_counter()
    share = trainer.evaluate(data)["eval_accuracy"]
    return share, 1000 * (time.perf_counter() - start) / len(data)


def main(args: argparse.Namespace, train: tuple[list, list], test: tuple[list, list]):
    choose_precision(args)
    trainer = trainer_of(train, args)
    model = trainer.model
    print(f"{args.checkpoint}: {model.num_parameters():,} parameters, {model.device}, {model.dtype}")
    print(f"{len(train[0]):,} rows to train on, {len(test[0]):,} to test on, {model.config.num_labels} labels")
    tell_of_known(train[0], test[0])
    head_alone, _ = accuracy(trainer, test, args.max_bytes)
    train_runs(trainer, args.runs)
    share, milliseconds = accuracy(trainer, test, args.max_bytes)
    model.config.use_cache = True  # Trainer turns it off, and would save it so
    trainer.processing_class.model_max_length = args.max_bytes
    trainer.save_model()
    baseline = tfidf(train).score(*test)
    write_label_results(
        trainer,
        args,
        files_of(args),
        rows={"train": len(train[0]), "test": len(test[0])},
        scores={"test": {"accuracy": share}},
        baselines={
            "test, head alone": {"accuracy": head_alone},
            "test, TF-IDF with logistic regression": {"accuracy": float(baseline)},
        },
    )
    print(f"\naccuracy on {len(test[0]):,} rows: {100 * share:.1f}%, {milliseconds:.1f} ms per row")
    if share < head_alone:
        print("training made it worse than the head alone: try a lower --learning_rate or more rows")
    print(f"head alone: {100 * head_alone:.1f}%    TF-IDF with logistic regression: {100 * baseline:.1f}%")
    print("next, in Python:\n\n    from transformers import pipeline\n    import modeling_stlm")
    print(f'    pipeline("text-classification", "{args.output}", truncation=True)({test[0][0][:60]!r})')


if __name__ == "__main__":
    with quiet_exit():
        main(args, train, test)
