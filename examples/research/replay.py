# SPDX-License-Identifier: Apache-2.0
r"""Does it help to replay the hardest half of the windows (PanGu-pi Pro, arXiv:2402.02791)? At equal compute.

    python examples/research/replay.py                 # 32 kB of the shipped Shakespeare: shows that it runs
    python examples/research/replay.py --train 'corpus/train/*.jsonl.gz' --validation corpus/validation.jsonl.gz \
        --seeds 1 2 3 --output runs/replay

For every seed, `train.py` trains twice with the same steps, those of one and a half passes over the corpus: in random
order, and with a second round that replays the windows drawn by their losses. Finished runs are not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import train as script
from tables import markdown_table

from modeling_stlm.training.corpus import PackedWindows


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one, whole
from run_folder import begin, names_and_sizes


HERE = Path(__file__).parent
TEXT = HERE.parent / "data" / "shakespeare.txt"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", help="files or patterns")
    parser.add_argument("--validation", nargs="+", help="files or patterns")
    parser.add_argument("--output", type=Path, default=Path("runs/replay"))
    parser.add_argument("--model", default="stlm-3m", help="a preset or a folder with a config.json")
    parser.add_argument("--seeds", nargs="+", type=whole, default=[1, 2])
    parser.add_argument("--one_in", type=at_least_one, default=2, help="windows replayed: one in so many")
    parser.add_argument("--block_bytes", type=at_least_one, default=1024, help="bytes per window")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="windows per step")
    args = parser.parse_args()
    if bool(args.train) != bool(args.validation):
        parser.error("give --train and --validation, or neither for the shipped text")
    return args


def shipped_texts(folder: Path) -> dict[str, list[str]]:
    """Files for training and validation from the shipped text."""
    folder.mkdir(parents=True, exist_ok=True)
    text, files = TEXT.read_bytes(), {}
    for split, part in {"train": text[:32_000], "validation": text[-16_000:]}.items():
        path = folder / f"{split}.txt"
        path.write_bytes(part)
        files[split] = [str(path)]
    return files


def command(args: argparse.Namespace, files: dict[str, list[str]], output: Path, seed: int, steps: int) -> list[str]:
    words = [
        "--output",
        str(output),
        "--data",
        str(args.output / "data"),
        "--seed",
        str(seed),
        "--max_steps",
        str(steps),
    ]
    words += [word for split, names in files.items() for word in (f"--{split}", *names)]
    words += ["--model", args.model, "--block_bytes", str(args.block_bytes), "--batch_size", str(args.batch_size)]
    return [*words, "--eval_at_end", *(["--replay", str(args.one_in)] if output.name.startswith("replay") else [])]


def count_steps(args: argparse.Namespace, files: dict[str, list[str]]) -> int:
    """Steps of one pass over the corpus and one round of replay."""
    tokenizer, corpora = script.prepare(script.parse_arguments(command(args, files, args.output, 1, 1)))
    windows = len(PackedWindows(corpora["train"], tokenizer, args.block_bytes)) // args.one_in
    return (args.one_in + 1) * -(-windows // args.batch_size)


def main():
    args = parse_arguments()
    files = (
        {"train": args.train, "validation": args.validation} if args.train else shipped_texts(args.output / "texts")
    )
    settings = {name: getattr(args, name) for name in ("model", "one_in", "block_bytes", "batch_size")}
    settings |= {split: names_and_sizes(patterns) for split, patterns in files.items()}
    begin(args.output / "begun.json", settings, goes_on=any(args.output.glob("*-s[0-9]*")))
    steps, bits = count_steps(args, files), {"random": [], "replay": []}
    for seed in args.seeds:
        for name, scores in bits.items():
            output = args.output / f"{name}-s{seed}"
            if not (output / "results.json").is_file():
                words = [sys.executable, str(HERE / "train.py"), *command(args, files, output, seed, steps)]
                subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
            scores.append(json.loads((output / "results.json").read_text())["bits_per_byte"]["validation"])

    rows = [[str(seed), *(f"{score:.4f}" for score in pair)] for seed, *pair in zip(args.seeds, *bits.values())]
    print(f"{steps} steps each, bits per byte on the validation text\n")
    print(markdown_table(["seed", "random order", f"one window in {args.one_in} replayed"], rows))
    gains = [replay - random for random, replay in zip(*bits.values())]
    spread = f", standard deviation {statistics.stdev(gains):.4f}" if len(gains) > 1 else ""
    print(f"\nreplay minus random order: {statistics.mean(gains):+.4f} on average{spread}")


if __name__ == "__main__":
    main()
