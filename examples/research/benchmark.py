# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of STLM beside Llama over bytes, Llama over BPE and BLT, at equal stored parameters, in one run.

    OMP_NUM_THREADS=1 python examples/research/benchmark.py --preset stlm-10m --repeats 5
    OMP_NUM_THREADS=1 python examples/research/benchmark.py --preset stlm-10m --repeats 3 --sweep --plot examples/research/speed.png

The models take turns, so that noise of the machine hits all of them; every figure is the median over the repeats with
the lowest and the highest. Time is CPU time of this process (`--clock wall` for wall-clock time); peak memory is
measured in one process per model. All models are untrained. Speed does not depend on the weights, but on the patch
length of the generated text; so all are forced to write the given text through `generate` (`Forced`). `stlm-engine` is
`stlm` with the engine behind `generate(custom_generate=...)`, in float32; `stlm-engine-q8` has 8-bit weights there.
The entropy threshold of BLT is set so that its untrained patches have 4.5 bytes; it trains on whole rows, where the
others have one row with two documents, and it generates three bytes without its cache, which is wrong.
The last line is one JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from controls import blt, bpe_llama, flat_byte_llama
from costs import bytes_per_patch, effective_parameters, flops_per_byte
from memory import reset_peak, resident_mb
from provenance import run_info
from tables import markdown_table
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_stlm import STLMConfig, STLMTokenizer
from modeling_stlm.inference.engine import Engine
from modeling_stlm.inference.export import export_gguf


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one


HERE = Path(__file__).parent
MODELS = ("stlm", "stlm-engine", "stlm-engine-q8", "llama-bytes", "llama-bpe", "blt")
PROMPT_BYTES, NEW_BYTES, SWEEP_BYTES = 1024, 256, 128
PATCH_BYTES = 4.5  # of BLT
CONTEXTS, BATCHES = (1024, 2048, 4096, 8192, 16384 - SWEEP_BYTES), (1, 4, 16, 64)


class Peer(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: dict = {"use_cache": True}  # of `generate`
    is_complete: bool = True  # and not only the steps of `generate`

    @property
    def num_steps(self) -> int | None:
        """How many steps to time: without a cache each step runs the whole text, so a few suffice."""
        return None if self.options["use_cache"] else 3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="stlm-10m")
    parser.add_argument("--text", type=Path, default=HERE.parent / "data" / "shakespeare.txt")
    parser.add_argument("--vocab_size", type=at_least_one, default=8192)
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--prompts", type=at_least_one, nargs="+", default=[2048, 8192], help="bytes of the prompts of the first byte"
    )
    parser.add_argument("--only", nargs="+", help="measures whose names start so; memory is not measured")
    parser.add_argument("--sweep", action="store_true", help="generation by context length and number of rows instead")
    parser.add_argument("--plot", type=Path, help="with --sweep: file for the plot")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--memory_of", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot and not args.sweep:
        parser.error("--plot draws what --sweep measures")
    if max(args.prompts) > args.text.stat().st_size:
        parser.error(f"--prompts are longer than {args.text}, which has {args.text.stat().st_size:,} bytes")
    return args


def build(name: str, args: argparse.Namespace) -> Peer:
    torch.manual_seed(0)
    text = args.text.read_text(encoding="utf-8")
    preset = STLMConfig.from_preset(args.preset)
    with torch.device("meta"):
        stored = AutoModelForCausalLM.from_config(preset).num_parameters()
    if name.startswith("stlm"):
        config, tokenizer = preset, STLMTokenizer()
    elif name == "llama-bytes":
        config, tokenizer = flat_byte_llama(stored)
    elif name == "llama-bpe":
        config, tokenizer = bpe_llama(stored, args.vocab_size, [text])
    else:
        return Peer(*blt(stored, text, PATCH_BYTES), {"use_cache": False})
    peer = Peer(AutoModelForCausalLM.from_config(config), tokenizer)
    if "engine" not in name:
        return peer
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export_gguf(peer.model, path, "q8" if name.endswith("q8") else "f32")
        return peer._replace(options=peer.options | {"custom_generate": Engine(path)}, is_complete=False)


class Forced(LogitsProcessor):
    """Forces `generate` to write the given ids (B, N) and records the time of each."""

    def __init__(self, ids: torch.Tensor, num_prompt: int, now: Callable[[], float]):
        self.ids, self.num_prompt, self.now, self.times = ids, num_prompt, now, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(self.now())
        next_ids = self.ids[:, input_ids.shape[1] - self.num_prompt, None]
        return torch.full_like(scores, -torch.inf).scatter(1, next_ids, 0.0)


def rows_of(text: bytes, num_rows: int, num_bytes: int) -> list[str]:
    step = len(text) // num_rows
    return [text[i * step : i * step + num_bytes].decode("ascii", "ignore") for i in range(num_rows)]


def ids_of(tokenizer, texts: list[str]) -> torch.Tensor:
    """(B, T), cut to the shortest row."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    shortest = min(map(len, rows))
    return torch.tensor([row[:shortest] for row in rows])


def num_bytes_of(tokenizer, ids: torch.Tensor) -> int:
    return sum(len(tokenizer.decode(row).encode()) for row in ids)


def train_bytes_per_second(peer: Peer, text: bytes, now) -> float:
    model = peer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = ids_of(peer.tokenizer, rows_of(text, 8, 1024))
    inputs = {"input_ids": ids, "labels": ids}
    if peer.options["use_cache"]:
        # Packed windows, as the trainings of `pretrain.py` have them: here one of eight rows holds two documents.
        inputs["position_ids"] = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        inputs["position_ids"][0, ids.shape[1] // 2 :] -= ids.shape[1] // 2
    started = now()
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return 2 * num_bytes_of(peer.tokenizer, ids) / (now() - started)


def generate(peer: Peer, prompt: torch.Tensor, new: torch.Tensor, now: Callable[[], float]) -> list[float]:
    """Generates `new` (B, N) after `prompt`; the times of the N steps."""
    forced = Forced(new, prompt.shape[1], now)
    peer.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new.shape[1],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=peer.tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([forced]),
        **peer.options,
    )
    return forced.times


def generated_bytes_per_second(peer: Peer, text: bytes, num_rows: int, now) -> float:
    """Of `num_rows` rows, prompt included in the time but not in the bytes."""
    peer.model.eval()
    # Single-byte characters only, so that any cut is a text.
    rows = rows_of(text, num_rows, PROMPT_BYTES + NEW_BYTES)
    prompt = ids_of(peer.tokenizer, [row[:PROMPT_BYTES] for row in rows])
    new = ids_of(peer.tokenizer, [row[PROMPT_BYTES:] for row in rows])[:, : peer.num_steps]
    started = now()
    generate(peer, prompt, new, now)
    return num_bytes_of(peer.tokenizer, new) / (now() - started)


def decoded_bytes_per_second(peer: Peer, text: bytes, num_rows: int, context: int, now) -> float:
    """Without the prompt, which ends with the first byte."""
    peer.model.eval()
    rows = rows_of(text, num_rows, context + SWEEP_BYTES)
    prompt = ids_of(peer.tokenizer, [row[:context] for row in rows])
    new = ids_of(peer.tokenizer, [row[context:] for row in rows])[:, : peer.num_steps]
    times = generate(peer, prompt, new, now)
    return num_bytes_of(peer.tokenizer, new[:, 1:]) / (times[-1] - times[0])


def first_byte_ms(peer: Peer, text: bytes, prompt_bytes: int, now) -> float:
    """Time to the first byte: tokenizer and prompt."""
    peer.model.eval()
    prompt = rows_of(text, 1, prompt_bytes)
    started = now()
    ids = ids_of(peer.tokenizer, prompt)
    generate(peer, ids, torch.full((1, 1), 97), now)
    return 1000 * (now() - started)


def peak_memory_mb(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of generating 16 rows and of training, above that of the interpreter with its libraries."""
    command = [sys.executable, __file__, "--memory_of", name, "--preset", args.preset, "--text", str(args.text)]
    command += ["--vocab_size", str(args.vocab_size)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def measure_memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    text = args.text.read_bytes()
    before_model = resident_mb("VmRSS")
    peer = build(name, args)
    reset_peak()
    generated_bytes_per_second(peer, text, 16, time.process_time)
    generating = resident_mb("VmHWM") - before_model
    reset_peak()
    train_bytes_per_second(peer, text, time.process_time)
    return {"MB generating (16)": generating, "MB training": resident_mb("VmHWM") - before_model}


def measures_of(args: argparse.Namespace, text: bytes) -> dict[str, Callable[[Peer], float]]:
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    if args.sweep:
        runs = {
            f"context {context}": lambda peer, context=context: decoded_bytes_per_second(peer, text, 1, context, now)
            for context in CONTEXTS
        }
        runs |= {
            f"batch {rows}": lambda peer, rows=rows: decoded_bytes_per_second(peer, text, rows, PROMPT_BYTES, now)
            for rows in BATCHES
        }
    else:
        runs = {
            "train bytes/s": lambda peer: train_bytes_per_second(peer, text, now),
            "generate bytes/s, batch 1": lambda peer: generated_bytes_per_second(peer, text, 1, now),
            "generate bytes/s, batch 16": lambda peer: generated_bytes_per_second(peer, text, 16, now),
        } | {
            f"first byte ms, {size / 1024:g} kB": lambda peer, size=size: first_byte_ms(peer, text, size, now)
            for size in args.prompts
        }
    chosen = {name: run for name, run in runs.items() if not args.only or name.startswith(tuple(args.only))}
    if not chosen:
        raise SystemExit(
            f"--only {' '.join(args.only)} fits no measure: expected the start of one of {', '.join(runs)}"
        )
    return chosen


def about(name: str, peer: Peer, text: bytes) -> dict:
    row = {"stored": peer.model.num_parameters()}
    if name == "blt":
        return row | {"bytes a unit": PATCH_BYTES}
    row["effective"] = effective_parameters(peer.model)
    if name.startswith("stlm"):
        length = bytes_per_patch(peer.model, ids_of(peer.tokenizer, rows_of(text, 8, 1024)))
    else:
        sample = text[:100_000].decode()
        length = len(sample) / len(peer.tokenizer(sample)["input_ids"])
    return row | {"bytes a unit": round(length, 2), "MFLOP/byte": flops_per_byte(peer.model, length) / 1e6}


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cell(value) -> str:
    if isinstance(value, dict):
        digits = 0 if value["median"] >= 100 else 1
        return f"{value['median']:,.{digits}f} ({value['low']:,.{digits}f}-{value['high']:,.{digits}f})"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def ratios(ours: dict, theirs: dict, measures) -> str:
    """How many times faster `ours` is."""
    cells = []
    for measure in measures:
        if measure in ours and measure in theirs:
            quotient = ours[measure]["median"] / theirs[measure]["median"]
            cells.append(f"{measure} {1 / quotient if 'ms' in measure else quotient:.2f}x")
    return ", ".join(cells)


def draw(table: dict, path: Path, title: str, clock: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {"context": "bytes of context, batch 1", "batch": f"rows, {PROMPT_BYTES} bytes of context"}
    measured = [kind for kind in panels if any(m.startswith(f"{kind} ") for row in table.values() for m in row)]
    figure, axes = plt.subplots(
        1, len(measured), figsize=(5 * len(measured), 4), squeeze=False, constrained_layout=True
    )
    for axis, kind in zip(axes[0], measured):
        for name, row in table.items():
            cells = {int(m.removeprefix(f"{kind} ")): cell for m, cell in row.items() if m.startswith(f"{kind} ")}
            medians = [cell["median"] for cell in cells.values()]
            spread = [[abs(cell[end] - cell["median"]) for cell in cells.values()] for end in ("low", "high")]
            axis.errorbar(list(cells), medians, spread, marker="o", capsize=2, label=name)
        axis.set(xscale="log", yscale="log", xlabel=panels[kind], ylabel=f"bytes generated per second ({clock})")
        axis.set_xticks(list(cells), map(str, cells), minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def main():
    args = parse_arguments()
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, args)))
        return
    text = args.text.read_bytes()
    measures = measures_of(args, text)
    peers = {name: build(name, args) for name in args.models}
    info = run_info()
    title = f"{args.preset}, {info['device']}, commit {info['commit']}"
    print(f"{title}, {args.repeats} repeats, {args.clock} clock")
    results = {name: {measure: [] for measure in measures} for name in peers}
    if args.sweep:  # otherwise a whole round warms up
        for peer in peers.values():
            decoded_bytes_per_second(peer, text, 1, 256, time.process_time)
    for repeat in range(0 if args.sweep else -1, args.repeats):
        for measure, run in measures.items():
            for name, peer in peers.items():
                if measure.startswith(("train", "first byte")) and not peer.is_complete:
                    continue
                value = run(peer)
                if repeat >= 0:
                    results[name][measure].append(value)
    table = {
        name: about(name, peer, text)
        | {measure: summary(values) for measure, values in results[name].items() if values}
        for name, peer in peers.items()
    }
    if not args.only and not args.sweep:
        for name, peer in peers.items():
            if peer.is_complete:  # the process of another one holds the model twice
                table[name] |= peak_memory_mb(name, args)
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    print(
        markdown_table(
            ["model", *columns], [[name, *(cell(row.get(c)) for c in columns)] for name, row in table.items()]
        )
    )
    for ours in filter(lambda name: name.startswith("stlm"), args.models):
        for name in args.models:
            if not name.startswith("stlm"):
                print(f"{ours} / {name}: {ratios(table[ours], table[name], measures)}")
    print(json.dumps({"table": table, "arguments": {k: str(v) for k, v in vars(args).items()}} | info))
    if args.plot:
        draw(table, args.plot, title, args.clock)


if __name__ == "__main__":
    main()
