# SPDX-License-Identifier: Apache-2.0
"""Learning curves of long runs: bits per byte against bytes read, minutes and operations.

    python examples/research/curves.py stlm-10m=runs/gpu/stlm-10m llama=runs/equal/llama  # adds runs, and draws all
    python examples/research/curves.py                                                    # draws

A run is a folder of `train.py` with its history and results, of the plain objective. What is drawn is kept in
`results/curves/`. A point is the mean loss of the steps since the one before, on text that the model reads for the first time
(or once more, where the run has passes). Minutes are shares of the whole by steps, which all take as long.
"""

import argparse
import json
import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter


HERE = Path(__file__).parent
AXES = {"bytes_seen": (1e6, "MB read"), "minutes": (1, "minutes of the device"), "training_flops": (1e15, "PFLOP")}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=FOLDER", help="runs to add")
    parser.add_argument("--record", type=Path, default=HERE / "results" / "curves" / "curves.json")
    return parser.parse_args()


def curve(folder: Path) -> dict:
    """Totals of a run, and the bits per byte of its training text by step."""
    history, results = (json.loads((folder / name).read_text()) for name in ("history.json", "results.json"))
    is_of_bytes = results["config"]["model_type"] == "stlm"  # runs before commit 61e9444 lack the bytes of an id
    if "bytes_per_training_id" not in results and not is_of_bytes:
        raise SystemExit(f"{folder}: results.json lacks bytes_per_training_id, expected a run of a later train.py")
    nats_to_bits = 1 / math.log(2) / results.get("bytes_per_training_id", 1)  # the loss is that of an id
    kept = ("steps", "bytes_seen", "training_flops", "device", "commit", "torch", "bits_per_byte")
    is_wall = results["budget"].get("clock") == "wall" or "threads" not in results["device"]  # of a GPU
    seconds = results["wall_seconds" if is_wall else "cpu_seconds"]
    return {name: results[name] for name in kept} | {
        "minutes": seconds / 60,
        "curve": [[log["step"], log["loss"] * nats_to_bits] for log in history if "loss" in log and log["step"] > 1],
    }


def plot(runs: dict[str, dict], path: Path) -> None:
    figure = Figure(figsize=(12, 4))
    for (field, (unit, label)), axes in zip(AXES.items(), figure.subplots(1, 3, sharey=True)):
        for name, run in runs.items():
            points = [(step / run["steps"] * run[field] / unit, bits) for step, bits in run["curve"]]
            axes.plot(*zip(*points), label=f"{name}, {run['device']}", linewidth=1)
        axes.set(xlabel=label, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel="bits per byte of the training text", ylim=(None, 2.6))
    figure.axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    args = parse_arguments()
    runs = json.loads(args.record.read_text()) if args.record.is_file() else {}
    for pair in args.runs:
        name, _, folder = pair.partition("=")
        runs[name] = curve(Path(folder))
    args.record.write_text(json.dumps(runs) + "\n")
    plot(runs, args.record.with_suffix(".png"))


if __name__ == "__main__":
    main()
