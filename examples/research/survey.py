# SPDX-License-Identifier: Apache-2.0
"""Cost of a byte and quality: presets, shipped checkpoints, Llamas in PyTorch and in llama.cpp, on one core.

    pip install llama-cpp-python gguf    # as for llamacpp.py
    OMP_NUM_THREADS=1 taskset -c 0 python examples/research/survey.py --repeats 3 --plot examples/research/survey.png

A survey as that of "Small Language Models" (arXiv:2409.15790, section 5: latency and memory on a device): for each system
the size of its file, how much the process grows by loading and running it, time to the first byte of a prompt of 1,024 bytes, and bytes written per
CPU second after it (256 bytes). Each run has its own process, systems take turns; median (lowest-highest). Quality is bits per byte on
validation from `results/`, where the model was trained: a row of llama.cpp has that of `llama-bpe-8k`, whose layers and
vocabulary are the same, a row of the engine that of the checkpoint. Larger presets and Llamas have random weights here,
since speed does not depend on them. The last line is one JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import llamacpp
import torch
from benchmark import Peer, generate, ids_of
from controls import bpe_llama, flat_byte_llama, train_bpe
from llamacpp import NEW_BYTES, PROMPT_BYTES, VOCABULARY
from memory import resident_mb
from provenance import run_info
from tables import markdown_table
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_stlm import STLMConfig, STLMForCausalLM
from modeling_stlm.inference.export import export_gguf


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one


TEXT_BYTES = PROMPT_BYTES + NEW_BYTES
HERE = Path(__file__).parent
CHECKPOINTS = HERE.parent / "checkpoints"
# name: (what runs it, what it runs, trained model whose bits per byte it has)
SYSTEMS = {
    "stlm-3m, generate": ("pytorch", "stlm-3m", "stlm-3m"),
    "stlm-10m-wide, generate": ("pytorch", "stlm-10m-wide", "stlm-10m-wide"),
    "Llama over bytes, 10M, generate": ("pytorch", "llama-bytes", "llama-bytes"),
    "Llama over BPE, 10M, generate": ("pytorch", "llama-bpe", "llama-bpe-8k"),
    "Llama over BPE, 10M, llama.cpp f32": ("llama.cpp", "f32", "llama-bpe-8k"),
    "Llama over BPE, 10M, llama.cpp q8_0": ("llama.cpp", "q8_0", "llama-bpe-8k"),
    "stlm-3m, engine q8": ("engine", "stlm-3m", "stlm-3m"),
    "stlm-10m-wide, engine f32": ("engine", "stlm-10m-wide f32", "stlm-10m-wide"),
    "stlm-10m-wide, engine q8": ("engine", "stlm-10m-wide", "stlm-10m-wide"),
    "stlm-50m, engine q8": ("engine", "stlm-50m", None),
    "stlm-100m, engine q8": ("engine", "stlm-100m", None),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=HERE.parent / "data" / "shakespeare.txt")
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME")
    parser.add_argument("--plot", type=Path, help="file for the plot")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_file(runner: str, name: str, text: bytes, folder: Path) -> Path:
    """The model of a system: a folder for PyTorch, a GGUF file otherwise."""
    torch.manual_seed(0)
    path = folder / f"{runner} {name}.gguf"
    if runner == "llama.cpp":
        tokenizer = train_bpe([text], VOCABULARY)
        llamacpp.write_gguf(path, name, llamacpp.random_llama(), tokenizer)
        pieces = (text[:PROMPT_BYTES], text[PROMPT_BYTES : PROMPT_BYTES + NEW_BYTES])
        prompt, new = (tokenizer(piece.decode())["input_ids"] for piece in pieces)
        path.with_suffix(".json").write_text(json.dumps([[prompt], len(new)]))
        return path
    if runner == "engine":
        preset, _, kind = name.partition(" ")
        is_shipped = (CHECKPOINTS / preset).is_dir()
        model = (
            AutoModelForCausalLM.from_pretrained(CHECKPOINTS / preset)
            if is_shipped
            else STLMForCausalLM(STLMConfig.from_preset(preset))
        )
        export_gguf(model, path, kind or "q8")
        return path
    if name.startswith("stlm"):
        return CHECKPOINTS / name
    stored = STLMForCausalLM(STLMConfig.from_preset("stlm-10m")).num_parameters()
    config, tokenizer = (
        flat_byte_llama(stored) if name == "llama-bytes" else bpe_llama(stored, VOCABULARY, [text.decode()])
    )
    for thing in (AutoModelForCausalLM.from_config(config), tokenizer):
        thing.save_pretrained(folder / name)
    return folder / name


def run_pytorch(path: str, text: bytes) -> dict[str, float]:
    peer = Peer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)
    )
    # The first id after the prompt belongs to the prompt's time; one more is needed to time all of the new ones.
    prompt, new, rest = (
        ids_of(peer.tokenizer, [part.decode()])
        for part in (
            text[:PROMPT_BYTES],
            text[PROMPT_BYTES : PROMPT_BYTES + NEW_BYTES],
            text[PROMPT_BYTES + NEW_BYTES :][:1],
        )
    )
    generate(peer, prompt[:, :64], new[:, :16], time.process_time)  # warms up
    started = time.process_time()
    times = generate(peer, prompt, torch.cat([new, rest], dim=1), time.process_time)
    return {"prompt": times[0] - started, "new": times[-1] - times[0]}


def child(runner: str, path: str, text: bytes) -> dict[str, float]:
    before = resident_mb("VmRSS")
    if runner == "llama.cpp":
        seconds = llamacpp.run_llama(path, *json.loads(Path(path).with_suffix(".json").read_text()))
    else:
        seconds = run_pytorch(path, text) if runner == "pytorch" else llamacpp.run_engine(path, [text[:TEXT_BYTES]])
    return {
        "ms to the first byte": 1000 * seconds["prompt"],
        "bytes per second": NEW_BYTES / seconds["new"],
        "MB of memory": resident_mb("VmHWM") - before,
    }


def size_mb(path: Path) -> float:
    return (path / "model.safetensors" if path.is_dir() else path).stat().st_size / 1e6


def bits_per_byte(trained: str | None) -> float | None:
    if trained is None:
        return None
    results = json.loads((HERE / "results" / f"{trained}.json").read_text())
    return results["held_out"]["validation"]["all"]["bits_per_byte"]


def draw(rows: dict[str, dict], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot(xscale="log")
    colours = {"pytorch": "tab:grey", "llama.cpp": "tab:orange", "engine": "tab:blue"}
    trained = {name: row for name, row in rows.items() if row["bits per byte"] is not None}
    for runner, colour in colours.items():
        of_runner = [row for name, row in trained.items() if SYSTEMS[name][0] == runner]
        speeds = [row["bytes per second"]["median"] for row in of_runner]
        bits = [row["bits per byte"] for row in of_runner]
        label = {"pytorch": "PyTorch", "engine": "engine of this package"}.get(runner, runner)
        axis.scatter(speeds, bits, s=[12 * row["MB"] for row in of_runner], color=colour, alpha=0.5, label=label)
    for name, row in trained.items():
        model, _, how = name.rpartition(", ")
        size = f"{how.split()[-1]}, {row['MB']:.0f} MB" if " " in how else f"{row['MB']:.0f} MB"
        is_above = model != "stlm-3m"  # which is close below stlm-10m-wide
        axis.annotate(
            f"{model.removesuffix(', 10M')}\n{size}",
            (row["bytes per second"]["median"], row["bits per byte"]),
            (0, 14 if is_above else -14),
            textcoords="offset points",
            ha="center",
            va="bottom" if is_above else "top",
            fontsize=7,
        )
    axis.legend(loc="lower right", markerscale=0.5)
    axis.set(
        xlabel="bytes written per CPU second of one core (more is better)",
        ylabel="bits per byte on validation (less is better)",
        title=title,
    )
    axis.invert_yaxis()
    axis.margins(0.15)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main():
    args = parse_arguments()
    text = args.text.read_bytes()
    if args.child:
        print(json.dumps(child(*args.child, text)))
        return
    info = run_info(
        "gguf", *(["llama-cpp-python"] if "llama.cpp" in {SYSTEMS[name][0] for name in args.systems} else [])
    )
    runs: dict[str, list] = {name: [] for name in args.systems}
    with TemporaryDirectory() as folder:
        files = {name: make_file(*SYSTEMS[name][:2], text, Path(folder)) for name in args.systems}
        sizes = {name: size_mb(file) for name, file in files.items()}
        for repeat in range(args.repeats + 1):
            for name, file in files.items():
                command = [sys.executable, __file__, "--text", str(args.text), "--child", SYSTEMS[name][0], str(file)]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                if repeat:  # the first round fills the caches of the system
                    runs[name].append(json.loads(output.splitlines()[-1]))
    results = {}
    for name, measured in runs.items():
        columns = {measure: [run[measure] for run in measured] for measure in measured[0]}
        results[name] = {"MB": sizes[name], "bits per byte": bits_per_byte(SYSTEMS[name][2])} | {
            measure: {"median": statistics.median(values), "low": min(values), "high": max(values)}
            for measure, values in columns.items()
        }
    print(", ".join(f"{name} {value}" for name, value in info.items()))
    print(table(results))
    if args.plot:
        draw(results, args.plot, f"{info['device'].split(',')[0]}, commit {info['commit']}")
    print(json.dumps({"results": results} | info))


def table(results: dict[str, dict]) -> str:
    def cell(value: dict) -> str:
        return f"{value['median']:,.0f} ({value['low']:,.0f}-{value['high']:,.0f})"

    head = [
        "",
        "MB of file",
        "MB of memory",
        "ms to the first byte",
        "bytes per second",
        "CPU s per kB",
        "bits per byte",
    ]
    rows = [
        [
            name,
            f"{row['MB']:.1f}",
            *(cell(row[measure]) for measure in head[2:5]),
            f"{1000 / row['bytes per second']['median']:.3f}",
            "" if row["bits per byte"] is None else f"{row['bits per byte']:.3f}",
        ]
        for name, row in results.items()
    ]
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()
