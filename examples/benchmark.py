# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of STLM against Llama over bytes and over an 8k BPE, at equal stored parameters, in one run.

    OMP_NUM_THREADS=1 python examples/benchmark.py --preset stlm-10m --repeats 5

Models take turns, so that a noisy machine is noisy for all; every figure is the median over the repeats with the lowest
and the highest. Time is CPU time of this process (`--clock wall` for wall-clock). Peak memory comes from a process of
its own for each model. All models are untrained: speed does not depend on it, except that the patch length of generated
text would; so STLM generates the given text (`forced`), byte by byte, through the unchanged `generate`.
The last line is one JSON document.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from controls import bpe_llama, flat_byte_llama
from costs import bytes_per_patch, effective_parameters, flops_per_byte
from provenance import run_info
from tables import markdown_table
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from modeling_stlm import STLMConfig, STLMTokenizer


HERE = Path(__file__).parent
MODELS = ("stlm", "llama-bytes", "llama-bpe")
PROMPT_BYTES, NEW_BYTES = 512, 512


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="stlm-10m")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "shakespeare.txt")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("train", "generate"), help="leave the rest out, and memory")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--memory_of", choices=MODELS, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(name: str, args: argparse.Namespace):
    """Model and tokenizer."""
    torch.manual_seed(0)
    preset = STLMConfig.from_preset(args.preset)
    with torch.device("meta"):
        stored = AutoModelForCausalLM.from_config(preset).num_parameters()
    if name == "stlm":
        config, tokenizer = preset, STLMTokenizer()
    elif name == "llama-bytes":
        config, tokenizer = flat_byte_llama(stored)
    else:
        config, tokenizer = bpe_llama(stored, args.vocab_size, [args.text.read_text(encoding="utf-8")])
    return AutoModelForCausalLM.from_config(config), tokenizer


class Forced(LogitsProcessor):
    """Makes `generate` write given ids (B, N) whatever the logits are."""

    def __init__(self, ids: torch.Tensor, num_prompt: int):
        self.ids, self.num_prompt = ids, num_prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
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


def train_bytes_per_second(model, tokenizer, text: bytes, now) -> float:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    texts = rows_of(text, 8, 1024)
    ids = ids_of(tokenizer, texts)
    # Packed windows, as `pretrain.py` feeds them: here one of eight rows holds two documents.
    positions = torch.arange(ids.shape[1]).repeat(len(ids), 1)
    positions[0, ids.shape[1] // 2 :] -= ids.shape[1] // 2
    started = now()
    for _ in range(2):
        model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return 2 * sum(len(tokenizer.decode(row).encode()) for row in ids) / (now() - started)


def generated_bytes_per_second(model, tokenizer, text: bytes, num_rows: int, now) -> float:
    model.eval()
    # Single-byte characters only, so that any cut is a text.
    prompts = rows_of(text, num_rows, PROMPT_BYTES + NEW_BYTES)
    ids = ids_of(tokenizer, [prompt[:PROMPT_BYTES] for prompt in prompts])
    new = ids_of(tokenizer, [prompt[PROMPT_BYTES:] for prompt in prompts])
    num_bytes = sum(len(tokenizer.decode(row).encode()) for row in new)
    started = now()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new.shape[1],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([Forced(new, ids.shape[1])]),
    )
    return num_bytes / (now() - started)


def peak_memory_mb(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory of generating at batch 16 and of training, over that of the interpreter with its libraries."""
    command = [sys.executable, __file__, "--memory_of", name, "--preset", args.preset, "--text", str(args.text)]
    command += ["--vocab_size", str(args.vocab_size)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def measure_memory(name: str, args: argparse.Namespace) -> dict[str, float]:
    def resident_mb(field: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    def reset_peak() -> None:
        Path("/proc/self/clear_refs").write_text("5")

    text = args.text.read_bytes()
    before_model = resident_mb("VmRSS")
    model, tokenizer = build(name, args)
    reset_peak()
    generated_bytes_per_second(model, tokenizer, text, 16, time.process_time)
    generating = resident_mb("VmHWM") - before_model
    reset_peak()
    train_bytes_per_second(model, tokenizer, text, time.process_time)
    return {"generate_mb": generating, "train_mb": resident_mb("VmHWM") - before_model}


def main():
    args = parse_arguments()
    if args.memory_of:
        print(json.dumps(measure_memory(args.memory_of, args)))
        return
    now = time.process_time if args.clock == "cpu" else time.perf_counter
    text = args.text.read_bytes()
    models = {name: build(name, args) for name in MODELS}
    info = run_info()
    print(f"{args.preset}, {info['device']}, commit {info['commit']}, {args.repeats} repeats, {args.clock} clock")

    measures = {
        "train bytes/s": lambda model, tokenizer: train_bytes_per_second(model, tokenizer, text, now),
        "generate bytes/s, batch 1": lambda model, tokenizer: generated_bytes_per_second(
            model, tokenizer, text, 1, now
        ),
        "generate bytes/s, batch 16": lambda model, tokenizer: generated_bytes_per_second(
            model, tokenizer, text, 16, now
        ),
    }
    measures = {name: run for name, run in measures.items() if not args.only or name.startswith(args.only)}
    results = {name: {measure: [] for measure in measures} for name in MODELS}
    for repeat in range(args.repeats + 1):
        for measure, run in measures.items():
            for name, (model, tokenizer) in models.items():
                value = run(model, tokenizer)
                if repeat:  # the first round warms up
                    results[name][measure].append(value)

    table = {}
    for name, (model, tokenizer) in models.items():
        sample = text[:100_000].decode()
        row = {"stored": model.num_parameters(), "effective": effective_parameters(model)}
        if name == "stlm":
            unit, length = "patch", bytes_per_patch(model, ids_of(tokenizer, rows_of(text, 8, 1024)))
        else:
            unit, length = "token", len(sample) / len(tokenizer(sample)["input_ids"])
        row |= {f"bytes per {unit}": round(length, 2), "MFLOP/byte": flops_per_byte(model, length) / 1e6}
        table[name] = row | {measure: summary(values) for measure, values in results[name].items()}
        if not args.only:
            table[name] |= peak_memory_mb(name, args)

    columns = ["stored", "effective", "MFLOP/byte", *measures, *([] if args.only else ["generate_mb", "train_mb"])]
    rows = [[name, *(cell(row[column]) for column in columns)] for name, row in table.items()]
    print(markdown_table(["model", *columns], rows))
    for name in MODELS[1:]:
        ratios = (f"{m} {table['stlm'][m]['median'] / table[name][m]['median']:.2f}x" for m in measures)
        print(f"stlm / {name}: " + ", ".join(ratios))
    print(json.dumps({"table": table, "arguments": {k: str(v) for k, v in vars(args).items()}} | info))


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def cell(value) -> str:
    if isinstance(value, dict):
        return f"{value['median']:,.0f} ({value['low']:,.0f}-{value['high']:,.0f})"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


if __name__ == "__main__":
    main()
