# SPDX-License-Identifier: Apache-2.0
"""What files of the engine cost: quality, start, memory, and how near the floor is that reading the weights sets.

    python -m modeling_stlm.inference.export examples/checkpoints/stlm-10m-wide stlm-q8.gguf --type q8
    OMP_NUM_THREADS=1 taskset -c 0 python examples/research/file_types.py stlm-*.gguf --validation validation.jsonl.gz

- Bits per byte of the first 4,096 bytes of every document, each after the token that begins documents.
- Milliseconds (wall clock) from the start of `stlm run` to the first byte after a prompt of 1,024 bytes, median of `--repeats`.
- Memory beside the weights: how much the process grows at most while one row reads 8,192 bytes, in one piece and one by one;
  the greater of both.
- Writing: bytes per CPU second after a prompt of 1,024 bytes, 1,024 of them, sampled, written by C alone (`Rows.write`).
- The floor: bytes that must be read for each byte that is written (matrices of the byte layers, their head; those of the trunk
  and the keys and values so far, divided by the bytes of a patch; rows of the tables), as they lie in memory, and bytes per CPU
  second of a loop in C that does nothing but read as much memory in the same order.

The last line is one JSON document.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np
from keystrokes import documents_of
from provenance import run_info
from tables import markdown_table

from modeling_stlm.inference.engine import Engine, Rows


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one


HERE = Path(__file__).parent
PROMPT_BYTES, NEW_BYTES, LONG_BYTES, DOCUMENT_BYTES = 1024, 1024, 8192, 4096
READER = r"""
#include <stddef.h>
typedef long long Line __attribute__((vector_size(64)));
static Line fold(const Line *from, size_t lines) {
  Line found[8] = {{0}};
  for (size_t i = 0; i + 8 <= lines; i += 8)
    for (int j = 0; j < 8; j++) found[j] ^= from[i + j];
  return found[0] ^ found[1] ^ found[2] ^ found[3] ^ found[4] ^ found[5] ^ found[6] ^ found[7];
}
long long read_lines(const Line *often, size_t often_lines, const Line *seldom, size_t seldom_lines, long count, double share) {
  Line found = {0};
  double open = 0;
  for (long i = 0; i < count; i++) {
    found ^= fold(often, often_lines);
    __asm__ volatile("" ::: "memory");  // or what does not change is read once
    if ((open += share) >= 1) open -= 1, found ^= fold(seldom, seldom_lines);
  }
  return found[0];
}
"""
# In a process without torch, as that of the command.
MEMORY = """
import sys
import stlm_command
stlm_command.register()
sys.path.insert(0, sys.argv[1])
from _stlm_inference.engine import Engine, Rows
from memory import reset_peak, resident_mb
engine = Engine(sys.argv[2])
text, size = open(sys.argv[3], "rb").read(int(sys.argv[4])), int(sys.argv[5])
before = resident_mb("VmRSS")
reset_peak()
rows = Rows(engine, 1)
for start in range(0, len(text), size):
    rows.read([text[start : start + size]])
print(resident_mb("VmHWM") - before)
"""


def bits_per_byte(engine: Engine, documents: list[bytes]) -> float:
    return -sum(float(engine.score(text).sum()) for text in documents) / math.log(2) / sum(map(len, documents))


def first_byte_ms(path: Path, prompt: bytes) -> float:
    command = [Path(sys.executable).with_name("stlm"), "run", path, "-n", "16", "-p", os.fsdecode(prompt)]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert len(process.stdout.read(1)) == 1
        return 1000 * (time.perf_counter() - started)


def memory_mb(path: Path, text: Path) -> float:
    command = [sys.executable, "-c", MEMORY, str(HERE), str(path), str(text), str(LONG_BYTES)]
    sizes = (LONG_BYTES, 1)
    return max(float(subprocess.run([*command, str(n)], capture_output=True, check=True).stdout) for n in sizes)


def traffic(path: Path) -> dict[str, int]:
    """Bytes that are read for each byte, for each patch, and for each patch before that."""
    reader = gguf.GGUFReader(path)
    entry = {name.removeprefix("stlm."): field.contents() for name, field in reader.fields.items()}
    found, is_float = {"byte": 0, "patch": 0}, True
    num_rows = {  # of each table that are looked up for a byte
        "ngram_embedding.ngram_tables": len(entry["ngram_orders"]) + 1,
        "match_embedding": 1,
        "context_ngram_embedding": len(entry.get("context_ngram_orders", [])) * entry.get("context_ngram_places", 0),
    }
    for tensor in reader.tensors:
        name, size, kind = tensor.name.removeprefix("model."), int(tensor.n_bytes), tensor.tensor_type.name
        is_float &= kind in ("F32", "BF16")
        if kind == "Q4_0":
            size = size // 18 * 20  # scales are float32 in memory
        elif kind == "I8":
            size += 4 * int(tensor.shape[1])  # sums of the rows
        if table := next((table for table in num_rows if name.startswith(table)), None):
            found["byte"] += size // int(tensor.shape[-1]) * num_rows[table]
        elif name.startswith("trunk."):
            _, blocks, index, *_ = name.split(".")
            schedule = entry.get(f"trunk_{blocks.removesuffix('_blocks')}_schedule", [])
            found["patch"] += size * (schedule.count(int(index)) if index.isdigit() else 1)
        elif name.startswith(("patcher.patch_proj", "patcher.byte_proj")):
            found["patch"] += size
        else:
            found["byte"] += size
    width, groups = entry["trunk_head_dim"], entry["trunk_num_key_value_heads"]
    passes, item = len(entry["trunk_attention_schedule"]), 4 if is_float else 2
    return found | {"patch before": passes * groups * item * (width + (width + 15) // 16 * 16)}


def written(engine: Engine, prompt: bytes) -> tuple[float, float, float]:
    """Bytes per CPU second, bytes of a patch, and patches in the middle of what is written."""
    sampling, rows = engine.sampling(do_sample=True), Rows(engine, 1)
    sampling.num_ends = 0  # a text of full length
    rows.read([prompt])
    before = len(rows.patch_ends(0))
    started = time.process_time()
    rows.write([sampling], [0], bytearray(b"\1"), NEW_BYTES)
    seconds, patches = time.process_time() - started, len(rows.patch_ends(0)) - before
    return NEW_BYTES / seconds, NEW_BYTES / patches, before + patches / 2


def build_reader(folder: Path) -> ctypes.CDLL:
    (folder / "reader.c").write_text(READER)
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-o", folder / "reader.so"]
    subprocess.run(["cc", *flags, folder / "reader.c"], check=True)
    library = ctypes.CDLL(folder / "reader.so")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.read_lines.argtypes = [pointer, size, pointer, size, ctypes.c_long, ctypes.c_double]
    return library


def floor(library: ctypes.CDLL, often: float, seldom: float, bytes_per_patch: float) -> float:
    """Bytes per CPU second if `often` bytes are read for each, and `seldom` more for each patch."""
    memory = np.ones(int(often + seldom) + 256, np.uint8)
    start = -memory.ctypes.data % 64 + memory.ctypes.data
    lines = [int(size) // 64 for size in (often, seldom)]
    count = 4 * NEW_BYTES
    arguments = start, lines[0], start + 64 * lines[0], lines[1], count, 1 / bytes_per_patch
    library.read_lines(*arguments)
    started = time.process_time()
    library.read_lines(*arguments)
    return count / (time.process_time() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="files of modeling_stlm.inference.export")
    parser.add_argument("--validation", type=Path, help=".jsonl.gz with documents for bits per byte")
    parser.add_argument("--text", type=Path, default=HERE.parent / "data" / "shakespeare.txt")
    parser.add_argument("--repeats", type=at_least_one, default=3)
    args = parser.parse_args()
    prompt = args.text.read_bytes()[:PROMPT_BYTES]
    documents = [text.encode()[:DOCUMENT_BYTES] for text in documents_of([args.validation] if args.validation else [])]
    results, rows = {}, []
    with TemporaryDirectory() as folder:
        library = build_reader(Path(folder))
        for path in args.models:
            engine, read, found = Engine(path), traffic(path), {"MB": path.stat().st_size / 1e6}
            if documents:
                found["bits per byte"] = bits_per_byte(engine, documents)
            first_byte_ms(path, prompt)  # fills the caches of the system
            found["ms"] = statistics.median(first_byte_ms(path, prompt) for _ in range(args.repeats))
            found["memory MB"] = memory_mb(path, args.text)
            runs = [written(engine, prompt) for _ in range(args.repeats)]
            found["written"] = statistics.median(run[0] for run in runs)
            _, length, patches = runs[0]
            seldom = read["patch"] + patches * read["patch before"]
            found |= {"read": read, "bytes of a patch": length, "patches": patches}
            found["bytes read per byte"] = read["byte"] + seldom / length
            floors = [floor(library, read["byte"], seldom, length) for _ in range(args.repeats)]
            found["floor"] = statistics.median(floors)
            results[path.stem] = found
            rows.append(
                [
                    path.stem,
                    f"{found['MB']:.2f}",
                    f"{found['bits per byte']:.5f}" if documents else "",
                    f"{found['ms']:.0f}",
                    f"{found['memory MB']:.1f}",
                    f"{found['written']:,.0f}",
                    f"{found['bytes read per byte'] / 1000:,.0f}",
                    f"{found['floor']:,.0f} ({found['floor'] * found['bytes read per byte'] / 1e9:.0f} GB/s)",
                    f"{100 * found['written'] / found['floor']:.0f}%",
                ]
            )
    info = run_info("gguf") | {"documents": len(documents), "bytes": sum(map(len, documents))}
    print(", ".join(f"{name} {value}" for name, value in info.items()))
    head = ["file", "MB", "bits per byte", "ms to the first byte", "MB beside weights", "written bytes/s"]
    print(markdown_table([*head, "kB read per byte", "floor bytes/s", "of it"], rows))
    print(json.dumps({"results": results} | info))


if __name__ == "__main__":
    main()
