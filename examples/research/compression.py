# SPDX-License-Identifier: Apache-2.0
"""`stlm zip` beside xz, zstd, brotli and ppmd: bits per byte, and bytes per CPU second.

    pip install zstandard brotli pyppmd
    python -m modeling_stlm.inference.export examples/checkpoints/stlm-10m-wide stlm.gguf --type q8
    taskset -c 0 python examples/research/compression.py stlm.gguf prose=test.jsonl.gz code=code.jsonl.gz

A text is a file, or the field `text` of all lines of a `.jsonl.gz`; the first `--limit` bytes of it are packed as one file, and
the first 40 pieces of 1,000 bytes each alone, as messages are. Random bytes come last. Everything that is packed is unpacked
and compared. The last line is one JSON document.
"""

import argparse
import gzip
import io
import json
import lzma
import random
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from provenance import run_info
from tables import markdown_table

from modeling_stlm.inference.archive import pack, unpack
from modeling_stlm.inference.engine import Engine


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one


PIECES, PIECE = 40, 1000


def methods(engine: Engine) -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """How to pack and to unpack, by name."""
    import brotli
    import pyppmd
    import zstandard

    def stlm(content: bytes) -> bytes:
        archive = io.BytesIO()
        pack(engine, io.BytesIO(content), archive)
        return archive.getvalue()

    def from_stlm(archive: bytes) -> bytes:
        content = io.BytesIO()
        unpack(engine, archive, content)
        return content.getvalue()

    return {
        "stlm zip": (stlm, from_stlm),
        "xz -9e": (lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
        "zstd -19": (zstandard.ZstdCompressor(level=19).compress, zstandard.ZstdDecompressor().decompress),
        "brotli -11": (lambda content: brotli.compress(content, quality=11, lgwin=24), brotli.decompress),
        "ppmd": (pyppmd.compress, pyppmd.decompress),  # PPMd var. I, order 6
    }


def read(path: Path, limit: int) -> bytes:
    if path.suffixes[-2:] == [".jsonl", ".gz"]:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return "\n".join(json.loads(line)["text"] for line in lines).encode()[:limit]
    return path.read_bytes()[:limit]


def measure(method: tuple[Callable, Callable], contents: list[bytes]) -> dict[str, float]:
    """Bits per byte of `contents`, each packed alone, and bytes per CPU second."""
    started = time.process_time()
    archives = [method[0](content) for content in contents]
    packed = time.process_time()
    assert [method[1](archive) for archive in archives] == contents
    seconds, size = (packed - started, time.process_time() - packed), sum(map(len, contents))
    return {"bits": 8 * sum(map(len, archives)) / size, "pack": size / seconds[0], "unpack": size / seconds[1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="file of modeling_stlm.inference.export")
    parser.add_argument("texts", nargs="+", help="name=path")
    parser.add_argument("--limit", type=at_least_one, default=500_000, help="bytes of each text")
    args = parser.parse_args()
    texts = {name: read(Path(path), args.limit) for name, path in (text.split("=", 1) for text in args.texts)}
    contents = {}
    for name, text in texts.items():
        contents[f"{name}, {len(text):,} bytes"] = [text]
        contents[f"{name}, pieces of {PIECE:,} bytes"] = [text[i * PIECE : (i + 1) * PIECE] for i in range(PIECES)]
    contents["random, 50,000 bytes"] = [random.Random(0).randbytes(50_000)]
    engine = Engine(args.model)
    info = run_info() | {name: version(name) for name in ("zstandard", "brotli", "pyppmd")}
    results = {
        method: {name: measure(functions, pieces) for name, pieces in contents.items()}
        for method, functions in methods(engine).items()
    }
    print(", ".join(f"{name} {value}" for name, value in info.items()))
    speeds = [next(iter(found.values())) for found in results.values()]
    head = ["bits per byte", *results]
    rows = [[name, *(f"{found[name]['bits']:.3f}" for found in results.values())] for name in contents]
    for speed in ("pack", "unpack"):
        rows.append([f"bytes per CPU second, {speed}", *(f"{found[speed]:,.0f}" for found in speeds)])
    print(markdown_table(head, rows))
    print(json.dumps({"results": results} | info))


if __name__ == "__main__":
    main()
