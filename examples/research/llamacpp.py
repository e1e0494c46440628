# SPDX-License-Identifier: Apache-2.0
r"""Speed of the shipped `stlm-10m-wide` beside llama.cpp on a Llama of the same size over an 8k BPE, on one core.

    pip install llama-cpp-python gguf    # built from source, so with the instructions of this CPU; about 10 minutes
    OMP_NUM_THREADS=1 taskset -c 0 python examples/research/llamacpp.py --repeats 3
    OMP_NUM_THREADS=1 taskset -c 0 python examples/research/llamacpp.py --repeats 1 --sweep --plot examples/research/speed_llamacpp.png

Every figure is text bytes per CPU second, median (lowest-highest) over the repeats; each run has its own process, and
the models take turns. The prompt is 1,024 bytes of the text, then 256 bytes are generated: tokens of the argmax in
llama.cpp, which has random weights (speed does not depend on them), and the bytes of the text in STLM, through `generate`
or through `Rows` of the engine. Both C libraries are called from Python for each token or byte. The BPE is trained on the text that
is measured. With `--sweep`, bytes generated after prompts of several lengths, and of several rows at once: 128 of each row,
as sequences of one batch in llama.cpp. The last line is one JSON document.

If llama.cpp crashes on a CPU with AMX (version 0.3.36 of the bindings did in a virtual machine), build it without:
`CMAKE_ARGS="-DCMAKE_C_FLAGS=-mno-amx-tile\ -mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-tile\ -mno-amx-int8"`.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from benchmark import Peer, cell, draw, generate, summary
from controls import train_bpe
from provenance import run_info
from tables import markdown_table
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one


HERE = Path(__file__).parent
VOCABULARY, WIDTH, LAYERS, FEED_FORWARD, HEAD = 8192, 320, 6, 864, 64  # 10,061,120 parameters, tied
PROMPT_BYTES, NEW_BYTES, SWEEP_BYTES = 1024, 256, 128
LLAMAS = {f"llama.cpp {kind}": kind for kind in ("f32", "f16", "q8_0", "q4_0")}
STLMS = {"STLM, generate": "", **{f"STLM, engine, {kind}": kind for kind in ("f32", "bf16", "q8", "q4_0")}}
SWEPT = tuple(f"llama.cpp {kind}" for kind in ("f32", "q8_0", "q4_0")) + tuple(
    f"STLM, engine, {kind}" for kind in ("f32", "q8", "q4_0")
)
CONTEXTS, BATCHES = (1024, 2048, 4096, 8192, 16384 - SWEEP_BYTES), (1, 4, 16, 64)


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same weights in every type of file
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // HEAD,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def write_gguf(path: Path, kind: str, model: LlamaForCausalLM, tokenizer) -> None:
    """`model`, whose embeddings are tied, quantized as `kind`. Where a row is not whole blocks of 32, zeros fill it up, which
    changes nothing: they are features of the feed-forward layers that nothing sets or reads.
    """
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    quantization = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in ("q8_0", "q4_0")}.get(kind)
    feed_forward = -(-config.intermediate_size // 32) * 32
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(feed_forward)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])

    def add(name: str, weight: torch.Tensor) -> None:
        tensor = weight.detach().float().numpy()
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        elif quantization is not None:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
        else:
            writer.add_tensor(name, tensor.astype(np.float16) if kind == "f16" else tensor)

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        """Rotary embeddings turn features 2 i and 2 i + 1 together in llama.cpp, i and i + d / 2 in transformers."""
        return weight.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for i, layer in enumerate(model.model.layers):
        attention, mlp, more = layer.self_attn, layer.mlp, feed_forward - config.intermediate_size
        add(f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        add(f"blk.{i}.attn_q.weight", interleaved(attention.q_proj.weight))
        add(f"blk.{i}.attn_k.weight", interleaved(attention.k_proj.weight))
        add(f"blk.{i}.attn_v.weight", attention.v_proj.weight)
        add(f"blk.{i}.attn_output.weight", attention.o_proj.weight)
        add(f"blk.{i}.ffn_gate.weight", F.pad(mlp.gate_proj.weight, (0, 0, 0, more)))
        add(f"blk.{i}.ffn_up.weight", F.pad(mlp.up_proj.weight, (0, 0, 0, more)))
        add(f"blk.{i}.ffn_down.weight", F.pad(mlp.down_proj.weight, (0, more)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama(path: str, prompts: list[list[int]], num_new: int) -> dict[str, float]:
    """CPU seconds for the tokens of `prompts`, each a sequence of its own, and for `num_new` tokens after each."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *message: None)
    llama_cpp.llama_log_set(silent, None)
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    longest = max(map(len, prompts)) + num_new + 8
    settings.n_ctx = len(prompts) * -(-longest // 256) * 256  # rounded up by the library, too
    settings.n_batch = settings.n_ubatch = longest
    settings.n_seq_max = len(prompts)
    settings.n_threads = settings.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(longest, 0, 1)

    def decode(tokens: list[tuple[int, int, int]], first_output: int) -> list[int]:
        """The likeliest tokens after those, given with position and sequence, from `first_output` on."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = i >= first_output
        assert llama_cpp.llama_decode(context, batch) == 0
        pointers = (llama_cpp.llama_get_logits_ith(context, i) for i in range(first_output, len(tokens)))
        return [int(np.ctypeslib.as_array(pointer, shape=(VOCABULARY,)).argmax()) for pointer in pointers]

    started, likeliest = time.process_time(), []
    for row, prompt in enumerate(prompts):
        likeliest += decode([(token, i, row) for i, token in enumerate(prompt)], len(prompt) - 1)
    after_prompt = time.process_time()
    for i in range(num_new):
        tokens = [(token, len(prompts[row]) + i, row) for row, token in enumerate(likeliest)]
        likeliest = decode(tokens, 0)
    seconds = {"prompt": after_prompt - started, "new": time.process_time() - after_prompt}
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return seconds


def run_engine(path: str, texts: list[bytes], num_new: int = NEW_BYTES) -> dict[str, float]:
    """CPU seconds for `texts` without their last `num_new` bytes, and for those."""
    from modeling_stlm.inference.engine import Engine, Rows

    rows, context = Rows(Engine(path), len(texts)), len(texts[0]) - num_new
    started = time.process_time()
    rows.read([text[:context] for text in texts])
    after_prompt = time.process_time()
    for at in range(context, context + num_new):
        rows.logits().argmax(axis=1)
        rows.read([text[at : at + 1] for text in texts])
    return {"prompt": after_prompt - started, "new": time.process_time() - after_prompt}


def run_generate(checkpoint: str, text: bytes) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    peer = Peer(model, AutoTokenizer.from_pretrained(checkpoint))
    ids = torch.tensor([list(text[: PROMPT_BYTES + NEW_BYTES + 1])])
    generate(peer, ids[:, :64], ids[:, 64:96], time.process_time)  # warms up
    started = time.process_time()
    times = generate(peer, ids[:, :PROMPT_BYTES], ids[:, PROMPT_BYTES:], time.process_time)
    return {"prompt": times[0] - started, "new": times[-1] - times[0]}


def cut(text: bytes, num_rows: int, num_bytes: int) -> list[bytes]:
    step = len(text) // num_rows
    return [text[i * step : i * step + num_bytes] for i in range(num_rows)]


class Case(NamedTuple):
    """So many texts at once, `num_new` bytes of each after the rest of it."""

    texts: list[bytes]
    num_new: int
    prompts: list[list[int]]  # the same as tokens
    num_new_tokens: int
    num_new_token_bytes: int  # of all rows, all of which get as many tokens

    @classmethod
    def of(cls, texts: list[bytes], num_new: int, tokenizer) -> "Case":
        prompts, new = (
            [tokenizer(part.decode("ascii", "ignore"))["input_ids"] for part in parts]
            for parts in ([text[:-num_new] for text in texts], [text[-num_new:] for text in texts])
        )
        count = min(map(len, new))
        num_bytes = sum(len(tokenizer.decode(row[:count]).encode()) for row in new)
        return cls(texts, num_new, prompts, count, num_bytes)


def child(name: str, path: str, cases: dict[str, Case], checkpoint: str) -> dict[str, dict[str, float]]:
    """Bytes per CPU second, of all rows of a case together."""
    found = {}
    for measure, case in cases.items():
        num_new = len(case.texts) * case.num_new
        if name in LLAMAS:
            seconds, num_new = run_llama(path, case.prompts, case.num_new_tokens), case.num_new_token_bytes
        elif STLMS[name]:
            seconds = run_engine(path, case.texts, case.num_new)
        else:
            seconds = run_generate(checkpoint, case.texts[0])
        num_prompt = sum(len(text) - case.num_new for text in case.texts)
        found[measure] = {"generated": num_new / seconds["new"], "prompt": num_prompt / seconds["prompt"]}
    return found


def make_files(names: Iterable[str], checkpoint: str, tokenizer, folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name}.gguf" for name in names}
    for name, file in files.items():
        if name in LLAMAS:
            write_gguf(file, LLAMAS[name], random_llama(), tokenizer)
        elif STLMS[name]:
            export = [sys.executable, "-m", "modeling_stlm.inference.export", checkpoint, file]
            subprocess.run([*export, "--type", STLMS[name]], check=True)
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(HERE.parent / "checkpoints" / "stlm-10m-wide"))
    parser.add_argument("--text", type=Path, default=HERE.parent / "data" / "shakespeare.txt")
    parser.add_argument("--repeats", type=at_least_one, default=3)
    parser.add_argument("--sweep", action="store_true", help="generation by context length and number of rows instead")
    parser.add_argument("--plot", type=Path, help="with --sweep: file for the plot")
    args = parser.parse_args()
    if args.plot and not args.sweep:
        parser.error("--plot draws what --sweep measures")
    text = args.text.read_bytes()
    info = run_info() | {name: version(name) for name in ("llama-cpp-python", "gguf")}  # of the code that runs
    tokenizer = train_bpe([text], VOCABULARY)
    if args.sweep:
        sizes = {f"context {size}": (1, size) for size in CONTEXTS}
        sizes |= {f"batch {num_rows}": (num_rows, PROMPT_BYTES) for num_rows in BATCHES}
        cases = {
            measure: Case.of(cut(text, num_rows, size + SWEEP_BYTES), SWEEP_BYTES, tokenizer)
            for measure, (num_rows, size) in sizes.items()
        }
    else:
        cases = {"": Case.of(cut(text, 1, PROMPT_BYTES + NEW_BYTES), NEW_BYTES, tokenizer)}
    names = SWEPT if args.sweep else (*LLAMAS, *STLMS)
    results = {name: {measure: [] for measure in cases} for name in names}
    with TemporaryDirectory() as folder:
        files = make_files(names, args.checkpoint, tokenizer, Path(folder))
        for _ in range(args.repeats):
            for name in names:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    found = pool.submit(child, name, str(files[name]), cases, args.checkpoint).result()
                for measure, speeds in found.items():
                    results[name][measure].append(speeds)
    print(", ".join(f"{name} {value}" for name, value in info.items()))
    table = {
        name: {
            f"{measure} {kind}".strip(): summary([run[kind] for run in runs])
            for measure, runs in row.items()
            for kind in (("generated",) if args.sweep else ("generated", "prompt"))
        }
        for name, row in results.items()
    }
    columns = list(table[names[0]])
    print(
        markdown_table(
            ["bytes per CPU second", *columns], [[n, *(cell(row[c]) for c in columns)] for n, row in table.items()]
        )
    )
    tokens = {measure: [sum(map(len, case.prompts)), case.num_new_tokens] for measure, case in cases.items()}
    print(json.dumps({"results": results, "tokens": tokens} | info))
    if args.plot:
        table = {name: {c.removesuffix(" generated"): row[c] for c in columns} for name, row in table.items()}
        draw(
            table,
            args.plot,
            f"10M parameters, one core of {info['device'].split(',')[0]}, commit {info['commit']}",
            "cpu",
        )


if __name__ == "__main__":
    main()
