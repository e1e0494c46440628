# SPDX-License-Identifier: Apache-2.0
"""Speed of the shipped `stlm-10m` beside llama.cpp on a Llama of the same size over an 8k BPE, on one core.

    pip install llama-cpp-python gguf    # built from source, so with the instructions of this CPU; about 10 minutes
    OMP_NUM_THREADS=1 taskset -c 0 python examples/research/llamacpp.py --repeats 3

Every figure is text bytes per CPU second, median (lowest-highest) over the repeats; each run has its own process, and
the models take turns. The prompt is 1,024 bytes of the text, then 256 bytes are generated: tokens of the argmax in
llama.cpp, which has random weights (speed does not depend on them), and the bytes of the text in STLM, through `generate`
or through `Rows` of the engine. Both C libraries are called from Python for each token or byte. The BPE is trained on the text that is measured. The last line is one JSON document.

If llama.cpp crashes on a CPU with AMX (version 0.3.36 of the bindings did in a virtual machine), build it without:
`CMAKE_ARGS="-DCMAKE_C_FLAGS=-mno-amx-tile\\ -mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-tile\\ -mno-amx-int8"`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from controls import train_bpe
from provenance import run_info
from tables import markdown_table


HERE = Path(__file__).parent
VOCABULARY, WIDTH, LAYERS, FEED_FORWARD, HEAD = 8192, 320, 6, 864, 64  # 10,061,120 parameters, tied
PROMPT_BYTES, NEW_BYTES = 1024, 256
LLAMAS = {f"llama.cpp {kind}": kind for kind in ("f32", "f16", "q8_0", "q4_0")}
STLMS = {"STLM, generate": "", **{f"STLM, engine, {kind}": kind for kind in ("f32", "bf16", "q8", "q4_0")}}


def write_gguf(path: Path, kind: str, tokenizer) -> None:
    """A Llama of random weights, quantized as `kind`."""
    import gguf

    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    quantization = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in ("q8_0", "q4_0")}.get(kind)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(WIDTH // HEAD)
    writer.add_head_count_kv(WIDTH // HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCABULARY)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])

    def add(name: str, *shape: int) -> None:
        tensor = (0.05 * random.standard_normal(shape)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        elif quantization is not None:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, tensor.astype(np.float16) if kind == "f16" else tensor)

    add("token_embd.weight", VOCABULARY, WIDTH)
    add("output_norm.weight", WIDTH)
    for block in (f"blk.{layer}" for layer in range(LAYERS)):
        add(f"{block}.attn_norm.weight", WIDTH)
        add(f"{block}.ffn_norm.weight", WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}.weight", WIDTH, WIDTH)
        for name in ("ffn_gate", "ffn_up"):
            add(f"{block}.{name}.weight", FEED_FORWARD, WIDTH)
        add(f"{block}.ffn_down.weight", WIDTH, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama(path: str, prompt: list[int], num_new: int) -> dict[str, float]:
    """CPU seconds for the tokens `prompt` and for `num_new` tokens after them."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *message: None)
    llama_cpp.llama_log_set(silent, None)
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(prompt) + num_new + 8
    settings.n_threads = settings.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, settings)
    tokens, token = (llama_cpp.llama_token * len(prompt))(*prompt), (llama_cpp.llama_token * 1)()
    started = time.process_time()
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(prompt))) == 0
    after_prompt = time.process_time()
    for _ in range(num_new):
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(VOCABULARY,))
        token[0] = int(logits.argmax())
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(token, 1)) == 0
    llama_cpp.llama_synchronize(context)
    return {"prompt": after_prompt - started, "new": time.process_time() - after_prompt}


def run_engine(path: str, text: bytes) -> dict[str, float]:
    from modeling_stlm.inference.engine import Engine, Rows

    rows = Rows(Engine(path), 1)
    started = time.process_time()
    rows.read([text[:PROMPT_BYTES]])
    after_prompt = time.process_time()
    for byte in text[PROMPT_BYTES : PROMPT_BYTES + NEW_BYTES]:
        rows.logits()[0].argmax()
        rows.read([bytes([byte])])
    return {"prompt": after_prompt - started, "new": time.process_time() - after_prompt}


def run_generate(checkpoint: str, text: bytes) -> dict[str, float]:
    import torch
    from benchmark import Peer, generate
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    peer = Peer(model, AutoTokenizer.from_pretrained(checkpoint))
    ids = torch.tensor([list(text[: PROMPT_BYTES + NEW_BYTES + 1])])
    generate(peer, ids[:, :64], ids[:, 64:96], time.process_time)  # warms up
    started = time.process_time()
    times = generate(peer, ids[:, :PROMPT_BYTES], ids[:, PROMPT_BYTES:], time.process_time)
    return {"prompt": times[0] - started, "new": times[-1] - times[0]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(HERE.parent / "checkpoints" / "stlm-10m"))
    parser.add_argument("--text", type=Path, default=HERE.parent / "data" / "shakespeare.txt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    text = args.text.read_bytes()
    if args.child:
        name, path = args.child
        if name in STLMS:
            print(json.dumps(run_engine(path, text) if path else run_generate(args.checkpoint, text)))
        else:
            print(json.dumps(run_llama(path, *json.loads(Path(path).with_suffix(".json").read_text()))))
        return
    info = run_info() | {name: version(name) for name in ("llama-cpp-python", "gguf")}  # of the code that runs
    results = {name: [] for name in (*LLAMAS, *STLMS)}
    with TemporaryDirectory() as folder:
        tokenizer = train_bpe([text], VOCABULARY)
        prompt, new = (
            tokenizer(part.decode())["input_ids"]
            for part in (text[:PROMPT_BYTES], text[PROMPT_BYTES : PROMPT_BYTES + NEW_BYTES])
        )
        files = {name: Path(folder) / f"{kind}.gguf" for name, kind in LLAMAS.items()}
        for name, file in files.items():
            write_gguf(file, LLAMAS[name], tokenizer)
            file.with_suffix(".json").write_text(json.dumps([prompt, len(new)]))
        for name, kind in STLMS.items():
            if kind:
                files[name] = Path(folder) / f"stlm-{kind}.gguf"
                export_command = [sys.executable, "-m", "modeling_stlm.inference.export", args.checkpoint]
                subprocess.run([*export_command, str(files[name]), "--type", kind], check=True)
        for _ in range(args.repeats):
            for name, runs in results.items():
                command = [
                    sys.executable,
                    __file__,
                    "--child",
                    name,
                    str(files.get(name, "")),
                    "--text",
                    str(args.text),
                ]
                command += ["--checkpoint", args.checkpoint]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                seconds = json.loads(output.splitlines()[-1])
                runs.append({"generated": NEW_BYTES / seconds["new"], "prompt": PROMPT_BYTES / seconds["prompt"]})
    print(", ".join(f"{name} {value}" for name, value in info.items()))
    rows = []
    for name, runs in results.items():
        columns = [sorted(run[measure] for run in runs) for measure in ("generated", "prompt")]
        rows.append([name, *(f"{statistics.median(c):,.0f} ({c[0]:,.0f}-{c[-1]:,.0f})" for c in columns)])
    print(markdown_table(["", "generated bytes per CPU second", "prompt bytes per CPU second"], rows))
    print(json.dumps({"results": results, "tokens": [len(prompt), len(new)]} | info))


if __name__ == "__main__":
    main()
