# SPDX-License-Identifier: Apache-2.0
r"""Compare designs: train a list of configurations under the same budget, with the same data order and seeds.

    python examples/research/ablate.py examples/research/ablations/3m.json --output runs/ablations \
        --train 'corpus/train/*.jsonl.gz' --validation corpus/validation.jsonl.gz

The list is a JSON file: `arguments` of `train.py` that all runs share, and `runs` by name with what differs
(`set` holds config fields; `seeds` repeats a run). Each run is a process with one thread, `--jobs` of them at a time.
Finished runs are not repeated, interrupted ones resume, and every finished run leaves one JSON in the folder named like
the list. `--report` only writes the table and the plots from these.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from alterations import ALTERATIONS
from inputs import at_least_one


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from tables import markdown_table


HERE = Path(__file__).parent
PLOTS = {  # field of the results: its unit in the plot, and the label
    "stored_parameters": (1e6, "stored parameters, millions"),
    "training_flops": (1e15, "training, PFLOP"),
    "bytes_seen": (1e6, "bytes seen, MB"),
    "cpu_seconds": (60, "CPU minutes"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", type=Path, help="JSON file")
    parser.add_argument("--train", nargs="+", help="files or patterns")
    parser.add_argument("--validation", nargs="+", help="files or patterns")
    parser.add_argument("--output", type=Path, help="folder of the runs")
    parser.add_argument("--only", nargs="*", help="names of runs")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="runs at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.report and not (args.train and args.validation and args.output):
        parser.error("give --train, --validation and --output, or --report")
    return args


def expand(path: Path, only: list[str] | None = None) -> dict[str, dict]:
    """Arguments of every run, by name; the seed is part of the name."""
    listed = json.loads(path.read_text(encoding="utf-8"))
    if only and (unknown := sorted(set(only) - set(listed["runs"]))):
        raise SystemExit(f"{path} has no runs {unknown}, but {sorted(listed['runs'])}")
    runs = {}
    for name, changes in listed["runs"].items():
        if not only or name in only:
            for seed in changes.get("seeds", [1]):
                own = {key: value for key, value in changes.items() if key != "seeds"}
                runs[f"{name}-s{seed}"] = listed["arguments"] | own | {"seed": seed}
    return runs


def data_folder(arguments: dict, args: argparse.Namespace) -> Path:
    """Of the corpora of a run, which all runs share that read the same texts altered in the same way."""
    alterations = [f"{name}-{arguments[name]}" for name in ALTERATIONS if arguments.get(name)]
    return args.output / "-".join(["data", *alterations])


def command(arguments: dict, args: argparse.Namespace, output: Path) -> list[str]:
    words = [sys.executable, str(HERE / "train.py"), "--eval_at_end"]
    words += ["--train", *args.train, "--validation", *args.validation]
    words += ["--output", str(output), "--data", str(data_folder(arguments, args))]
    for name, value in arguments.items():
        if name == "set":
            words += ["--set", *(f"{field}={json.dumps(change)}" for field, change in value.items())]
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def train(name: str, arguments: dict, args: argparse.Namespace, results: Path) -> str:
    """One run in its own process; returns a line about it."""
    folder = args.output / name
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "arguments.json"
    if note.is_file() and json.loads(note.read_text()) != arguments:
        raise SystemExit(f"{folder} holds a run with other arguments: {note.read_text()}. Rename the run or remove it")
    note.write_text(json.dumps(arguments))
    with (folder / "log.txt").open("a") as log:
        words = command(arguments, args, folder)
        code = subprocess.run(words, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise SystemExit(f"{name} failed with status {code}: see {folder / 'log.txt'}")
    found = json.loads((folder / "results.json").read_text())
    (results / f"{name}.json").write_text(json.dumps({"listed": arguments} | found, indent=1) + "\n")
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return f"{name}: {found['bits_per_byte']['validation']:.4f} bits per byte"


def is_done(path: Path, arguments: dict) -> bool:
    """Whether `path` has the results of a run with these arguments."""
    if not path.is_file():
        return False
    listed = json.loads(path.read_text())["listed"]
    if listed != arguments:
        raise SystemExit(f"{path} holds a run with other arguments, {listed}: rename the run or remove the file")
    return True


def prepare(arguments: dict, args: argparse.Namespace) -> None:
    """Tokenizers and corpora, once for all parallel runs."""
    import train as script

    words = command(arguments, args, args.output / "none")[2:]
    script.prepare(script.parse_arguments(words))


def progress(log: Path) -> str:
    """The newest line of `train.py` that says how far it is."""
    lines = re.findall(r"^.*: loss .*$", log.read_text(errors="replace") if log.is_file() else "", re.MULTILINE)
    return lines[-1] if lines else "no step yet"


def watch(folder: Path, running: set[str], stop: threading.Event) -> None:
    """Prints the progress of every active run once a minute."""
    while not stop.wait(60):
        for name in sorted(running):
            print(f"  {name}: {progress(folder / name / 'log.txt')}", flush=True)


def table(results: dict[str, dict]) -> str:
    """Best first."""
    head = "run, bits per byte, stored, effective, MFLOP per byte, MB seen, training PFLOP, CPU s, commit".split(", ")
    rows = [
        [
            name,
            f"{run['bits_per_byte']['validation']:.4f}",
            f"{run['stored_parameters']:,}",
            f"{run['effective_parameters']:,}",
            f"{run['flops_per_byte'] / 1e6:.2f}",
            f"{run['bytes_seen'] / 1e6:.2f}",
            f"{run['training_flops'] / 1e15:.4f}",
            str(run["cpu_seconds"]),
            run["commit"],
        ]
        for name, run in sorted(results.items(), key=lambda item: item[1]["bits_per_byte"]["validation"])
    ]
    return markdown_table(head, rows)


def plot(results: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), sharey=True)
    for (field, (unit, label)), axis in zip(PLOTS.items(), axes.flat):
        for name, run in results.items():
            style = {"marker": "s", "color": "tab:orange"} if name.startswith("llama") else {"color": "tab:blue"}
            point = (run[field] / unit, run["bits_per_byte"]["validation"])
            axis.scatter(*point, s=14, **style)
            axis.annotate(name, point, fontsize=6, xytext=(3, 2), textcoords="offset points")
        axis.set(xlabel=label, xlim=(0, 1.25 * max(run[field] for run in results.values()) / unit))
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("bits per byte (validation)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder: Path) -> None:
    """Of all results in the folder: also of runs whose fields the config no longer has."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if results:
        (folder / "README.md").write_text(f"# {folder.name}\n\n{table(results)}\n\n![bits per byte](plots.png)\n")
        plot(results, folder / "plots.png")
        print(table(results))


def train_missing(args: argparse.Namespace, results: Path) -> list[str]:
    """Train the runs of the list that have no results yet; a line about each that failed."""
    if note := json.loads(args.list.read_text(encoding="utf-8")).get("historical"):
        raise SystemExit(f"{args.list} is a record: {note}")
    runs = expand(args.list, args.only)
    left = {name: run for name, run in runs.items() if not is_done(results / f"{name}.json", run)}
    print(f"{len(runs)} runs, {len(left)} to do, {args.jobs} at a time", flush=True)
    corpora = {(data_folder(run, args), run.get("model"), run.get("vocab_size")): run for run in left.values()}
    for arguments in corpora.values():
        prepare(arguments, args)
    running, failed, stop, started = set(), [], threading.Event(), time.monotonic()

    def work(name: str) -> None:
        running.add(name)
        try:
            line = train(name, left[name], args, results)
        except SystemExit as error:
            line = str(error)
            failed.append(line)
        finally:
            running.discard(name)
        print(f"[{(time.monotonic() - started) / 60:.0f} min] {line}", flush=True)

    threading.Thread(target=watch, args=(args.output, running, stop), daemon=True).start()
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [pool.submit(work, name) for name in left]
    stop.set()
    for future in done:
        future.result()
    return failed


def main():
    args = parse_arguments()
    results = args.list.with_suffix("")
    results.mkdir(exist_ok=True)
    failed = [] if args.report else train_missing(args, results)
    report(results)
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
