# SPDX-License-Identifier: Apache-2.0
"""Compile the engine to WebAssembly, stlm/stlm.wasm. It is in the repository: run this only after a change of stlm.c.

    python examples/browser/build.py

Needs emscripten (`emcc`; Debian and Ubuntu: `apt install emscripten`). Takes 10 seconds.
"""

import hashlib
import json
import subprocess
from pathlib import Path


FOLDER = Path(__file__).parent
ENGINE = FOLDER.parents[1] / "modeling_stlm" / "inference"
EXPORTS = "load free describe open close length patches read logits write error take rewind drop".split()
# As in setup.py, sums are not fused with products: the same bits as on every other CPU.
FLAGS = [
    *"-std=c99 -O2 -ffp-contract=off -fno-math-errno -msimd128 -mbulk-memory --no-entry".split(),
    *"-sSTANDALONE_WASM -sALLOW_MEMORY_GROWTH -sMALLOC=emmalloc".split(),
    "-sEXPORTED_FUNCTIONS=_malloc,_free," + ",".join(f"_stlm_{name}" for name in EXPORTS),
]


def digest() -> str:
    """Of what stlm.wasm is made from: the sources and the flags."""
    sources = b"".join((ENGINE / name).read_bytes().replace(b"\r\n", b"\n") for name in ("stlm.c", "stlm.h"))
    return hashlib.sha256(sources + " ".join(FLAGS).encode()).hexdigest()


def build(folder: Path) -> None:
    """Write stlm.wasm and, in stlm.wasm.json, what it was made from to `folder`."""
    subprocess.run(["emcc", *FLAGS, ENGINE / "stlm.c", "-o", folder / "stlm.wasm"], check=True)
    (folder / "stlm.wasm").chmod(0o644)  # emcc takes it for a program
    version = subprocess.run(["emcc", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]
    made_from = {"sources": digest(), "compiler": version}
    (folder / "stlm.wasm.json").write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    build(FOLDER / "stlm")
    print(f"stlm.wasm: {(FOLDER / 'stlm' / 'stlm.wasm').stat().st_size:,} bytes")
