# SPDX-License-Identifier: Apache-2.0
"""Export a checkpoint to ONNX with the exporters of transformers, and continue a prompt in ONNX Runtime.

    pip install -c constraints.txt -e '.[export]'
    python examples/export_onnx.py --output runs/onnx --prompt "The history of the"

The folder gets one graph for prompts and one for single bytes, both for any number of rows. They use a static cache of
`--max_length` bytes, because shapes in a graph must not depend on the text; so the trunk runs at every byte instead of
once per patch.
"""

import argparse
import time
from pathlib import Path

from inputs import HelpFormatter, at_least_one, causal_checkpoint, output_folder, quiet_exit, require


HERE = Path(__file__).parent


def graphs_folder(value: str) -> Path:
    """An [`output_folder`] without a checkpoint, whose config and tokenizer would be replaced."""
    folder = output_folder(value)
    if (folder / "model.safetensors").is_file():
        raise argparse.ArgumentTypeError(f"{value} holds the weights of a model: use another folder")
    return folder


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint", type=causal_checkpoint, default=str(HERE / "checkpoints" / "stlm-3m"), help="folder or Hub id"
    )
    parser.add_argument("--output", type=graphs_folder, required=True, help="folder for the graphs")
    parser.add_argument("--max_length", type=at_least_one, default=512, help="bytes of prompt and answer together")
    parser.add_argument("--prompt", default="The history of the", help="to continue")
    parser.add_argument("--num_bytes", type=at_least_one, default=100, help="to write")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_arguments()
    require("export", "onnx", "onnxruntime", "onnxscript")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StaticCache
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

import modeling_stlm  # noqa: F401  (registers the Auto classes)


def export(model, max_length: int) -> ExportedModel:
    """Graphs `prefill` and `decode` of `model` for any number of rows, padded on the left, of up to `max_length` bytes."""
    rows = {"input_ids": torch.full((2, 24), 97), "attention_mask": torch.ones(2, 24, dtype=torch.long)}
    rows["attention_mask"][1, :5] = 0
    settings = GenerationConfig(
        cache_implementation="static", max_cache_len=max_length, do_sample=False, pad_token_id=256
    )
    return OnnxExporter().export_for_generation(model, rows, OnnxConfig(dynamic=True), generation_config=settings)


def generate(exported: ExportedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_bytes: int):
    """The likeliest `num_bytes` bytes after the rows `input_ids (B, T)`, padded on the left: ids (B, num_bytes)."""
    cache = StaticCache(config=exported.config, max_cache_len=exported.generation_config.max_cache_len)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    prompt = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    outputs = exported.runners["prefill"](**prompt, cache=cache)
    written = [outputs.logits[:, -1:].argmax(-1)]
    while len(written) < num_bytes:
        positions = positions[:, -1:] + 1
        outputs = exported.runners["decode"](input_ids=written[-1], position_ids=positions, cache=outputs.cache)
        written.append(outputs.logits[:, -1:].argmax(-1))
    return torch.cat(written, 1)


def main(args: argparse.Namespace):
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, padding_side="left")
    inputs = tokenizer([args.prompt], return_tensors="pt")
    if inputs["input_ids"].shape[1] + args.num_bytes > args.max_length:
        raise SystemExit(f"the prompt and {args.num_bytes} bytes do not fit in --max_length {args.max_length}")
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32, use_cache=True)
    export(model, args.max_length).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"exported to {args.output}")
    exported = ExportedModel.from_pretrained(args.output)
    exported.to("cpu")
    start = time.perf_counter()
    written = generate(exported, inputs["input_ids"], inputs["attention_mask"], args.num_bytes)
    seconds = time.perf_counter() - start
    print(args.prompt + tokenizer.decode(written[0]))
    print(f"{args.num_bytes / seconds:.0f} bytes a second")


if __name__ == "__main__":
    with quiet_exit():
        main(args)
