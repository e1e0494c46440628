# SPDX-License-Identifier: Apache-2.0
"""Time to import and load STLM, and its memory while generating.

    OMP_NUM_THREADS=1 python examples/research/startup.py --preset stlm-10m --repeats 5

Importing and loading in turns with a Llama over bytes of equal stored parameters: CPU seconds, median (lowest-highest).
Memory is peak resident memory above that before loading (after another model of the same size has generated 64 bytes),
next to the size of the weights and of the cache at the end. The last line is one JSON document.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from memory import reset_peak, resident_mb
from provenance import run_info
from tables import markdown_table


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one


IMPORTS = {"stlm": "import modeling_stlm", "llama": "from transformers import LlamaForCausalLM"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="stlm-10m")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    parser.add_argument("--new_bytes", type=at_least_one, default=8192)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_checkpoints(preset: str, folder: Path) -> None:
    import torch
    from controls import flat_byte_llama
    from transformers import LlamaForCausalLM

    from modeling_stlm import STLMConfig, STLMForCausalLM

    torch.manual_seed(0)
    model = STLMForCausalLM(STLMConfig.from_preset(preset))
    model.save_pretrained(folder / "stlm")
    LlamaForCausalLM(flat_byte_llama(model.num_parameters())[0]).save_pretrained(folder / "llama")


def tensors_mb(things) -> float:
    import torch

    return sum(t.numel() * t.element_size() for t in things if isinstance(t, torch.Tensor)) / 2**20


def child(name: str, folder: str, new_bytes: int) -> dict[str, float]:
    """Import, load and generate in this process."""
    started = time.process_time()
    exec(IMPORTS[name])
    imported = time.process_time()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    prompt = torch.full((1, 8), 97)
    options = {"do_sample": True, "eos_token_id": None, "pad_token_id": 256, "return_dict_in_generate": True}
    AutoModelForCausalLM.from_config(config).generate(
        prompt, max_new_tokens=64, **options
    )  # loads the code, which takes memory, too
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory is reused and not counted
    before, ready = resident_mb("VmRSS"), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded = time.process_time()
    costs = {"import CPU s": imported - started, "load CPU s": loaded - ready}
    if name != "stlm":
        return costs
    torch.manual_seed(0)
    reset_peak()
    output = model.generate(prompt, max_new_tokens=new_bytes, **options)
    peak = resident_mb("VmHWM")
    held = [tensor for layer in output.cache.layers for tensor in vars(layer).values()]
    expected = tensors_mb([*model.parameters(), *held])
    return costs | {"peak MB": peak - before, "weights and cache MB": expected}


def cell(runs: list[dict], measure: str) -> str:
    values = [run[measure] for run in runs if measure in run]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else ""


def main():
    args = parse_arguments()
    if args.child:
        print(json.dumps(child(*args.child, args.new_bytes)))
        return
    results = {name: [] for name in IMPORTS}
    with TemporaryDirectory() as folder:
        make_checkpoints(args.preset, Path(folder))
        for repeat in range(args.repeats + 1):
            for name in IMPORTS:
                command = [sys.executable, __file__, "--child", name, str(Path(folder) / name)]
                command += ["--new_bytes", str(args.new_bytes)]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                if repeat:  # the first round fills the caches of the system
                    results[name].append(json.loads(output.splitlines()[-1]))
    info = run_info()
    print(f"{args.preset}, {info['device']}, commit {info['commit']}, {args.repeats} repeats")
    measures = list(results["stlm"][0])
    print(markdown_table(["", *IMPORTS], [[m, *(cell(results[name], m) for name in IMPORTS)] for m in measures]))
    print(json.dumps({"results": results} | info))


if __name__ == "__main__":
    main()
