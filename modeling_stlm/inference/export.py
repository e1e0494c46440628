# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to one file for the engine (`engine.py`, `stlm.c`), and back.

    python -m modeling_stlm.inference.export examples/checkpoints/stlm-3m stlm-3m.gguf --type q8

| type | matrices and embeddings | else |
|---|---|---|
| `f32` | float32: the logits of `forward` within rounding | float32 |
| `bf16` | bfloat16: half the size, exact for checkpoints that store bfloat16 | float32 |
| `q8` (or `q8_0`) | 8 bits with a scale per row | float32 |
| `q4_0` | trunk, patching and tables of n-grams in 4 bits with a scale per 32 inputs, the rest as in `q8` | float32 |

The file is GGUF, version 3, of architecture `stlm`: tensors under their names in the checkpoint (an int8 `x.weight` has its
scales in `x.scale`), the fields of the configuration under `stlm.`, and the whole configuration as JSON in `stlm.config`.
`stlm.checksum` is the Adler-32 sum of the file with the four bytes of the sum itself as zero.
"""

import argparse
import copy
import hashlib
import json
import os
import re
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard

from modeling_stlm.configuration_stlm import STLMConfig
from modeling_stlm.modeling_stlm import STLMForCausalLM
from modeling_stlm.patching_stlm import VocabularyRule

from .archive import output
from .cli import writable


FORMAT_VERSION = 4  # files say the first whose engines know all that they use
TYPES = ("f32", "bf16", "q8", "q4_0")
SYNONYMS = {"q8_0": "q8"}  # what llama.cpp calls its 8 bits, which have a scale per 32 inputs
# Nine tenths of the weights. The byte layers and the head are small, and lose most where they are rounded to four bits.
FOUR_BITS = ("model.trunk.", "model.patcher.", "model.ngram_embedding.ngram_tables.")
ACTIVATIONS = ("relu2", "relu", "silu")
# What `stlm.c` takes, lowest and highest. The number of key and value heads has those of the heads.
SIZES = {
    "vocab_size": (1, 65535),
    "hidden_size": (1, 8192),
    "intermediate_size": (1, 32768),
    "num_local_encoder_layers": (1, 1024),
    "num_local_decoder_layers": (1, 1024),
    "conv_kernel_size": (1, 64),
    "attention_window_bytes": (1, 4096),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 1024),
    "ngram_word_bytes": (0, 64),
    "ngram_rows": (1, 1 << 26),
    "ngram_embedding_size": (0, 2048),
    "match_bytes": (0, 6),
    "match_doublings": (0, 4),
    "patch_bytes": (1, 1 << 20),
    "max_patch_bytes": (1, 1 << 20),
    "max_patch_characters": (1, 1 << 20),
    "trunk_hidden_size": (1, 8192),
    "trunk_intermediate_size": (1, 32768),
    "trunk_num_attention_heads": (1, 1024),
    "trunk_num_key_value_heads": (1, 1024),
    "trunk_head_dim": (2, 1024),
    "trunk_window_patches": (0, 1 << 27),
    "bos_token_id": (0, 65534),
}
MAX_PASSES, MAX_INPUTS, MAX_ORDERS, MAX_ORDER, MAX_PLACES, MAX_ENDS = 1024, 32768, 15, 64, 1024, 64
CHECKSUM = b"stlm.checksum"
MERGE = "merge adapters first (merge_and_unload), and take objectives off (plain)"


def fingerprint(model: STLMForCausalLM, rounded: dict[str, np.ndarray] | None = None) -> str:
    """The same for two models with the same configuration and weights, in any precision that holds them.

    Args:
        rounded (`dict[str, np.ndarray]`, *optional*): weights in place of those of `model`.
    """
    names = (
        *SIZES,
        "byte_mixers",
        "patching",
        "patch_vocabulary",
        "rope_theta",
        "norm_eps",
        "hidden_act",
        "ngram_orders",
    )
    config = model.config
    window, lookups = config.trunk_window_patches, config.context_ngram_orders
    settings = [
        config.trunk_schedule,
        *(getattr(config, name) for name in names if name != "trunk_window_patches"),
        *([window] if window else []),  # left out without one, as in files of before
        *([[lookups, config.context_ngram_places]] if lookups else []),
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        array = tensor.detach().float().cpu().numpy() if rounded is None else rounded[name]
        digest.update(array.tobytes())
    return digest.hexdigest()


def check(model: STLMForCausalLM) -> None:
    """Raise a `ValueError` unless the engine can run `model`."""
    if not isinstance(model, STLMForCausalLM):
        raise ValueError(f"the engine runs a STLMForCausalLM, got a {type(model).__name__}: {MERGE}")
    config = model.config
    if not config.tie_word_embeddings:
        raise ValueError("the engine needs the head to be tied to the embedding: tie_word_embeddings=True")
    if config.bos_token_id is None:
        raise ValueError("the engine needs a token that begins documents: bos_token_id")
    if config.sharing_lora_rank:
        raise ValueError(
            f"the engine needs passes that are equal: sharing_lora_rank=0, got {config.sharing_lora_rank}. Such a model runs "
            "with `generate` only; for the engine, train one without, because a block that passes share cannot hold the "
            "matrices of each"
        )
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"the engine knows hidden_act of {', '.join(ACTIVATIONS)}, got {config.hidden_act!r}")
    sizes = {name: (getattr(config, name) or 0, *bounds) for name, bounds in SIZES.items()}
    sizes["layers of the trunk"] = (len(config.trunk_schedule), 1, MAX_PASSES)
    sizes["lengths of n-grams"] = (len(config.ngram_orders), 0, MAX_ORDERS)
    sizes["the longest of ngram_orders"] = (max(config.ngram_orders, default=0), 0, MAX_ORDER)
    if config.context_ngram_orders:
        sizes["context_ngram_places"] = (config.context_ngram_places, 1, MAX_PLACES)
    sizes["tokens that end a text"] = (len(ends_of(model)), 0, MAX_ENDS)
    inputs = [module.in_features for module in model.modules() if isinstance(module, torch.nn.Linear)]
    sizes["inputs of a matrix"] = (max(inputs), 1, MAX_INPUTS)
    for name, (size, lowest, highest) in sizes.items():
        if not lowest <= size <= highest:
            raise ValueError(f"the engine takes {name} from {lowest} to {highest}, got {size}")


def check_weights(model: STLMForCausalLM) -> None:
    """Raise a `ValueError` unless the weights of `model` are those that its configuration says, by name, and finite."""
    with torch.device("meta"):
        expected = STLMForCausalLM(copy.deepcopy(model.config)).state_dict().keys()
    if others := sorted(model.state_dict().keys() ^ expected):
        more = f", and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(f"the model has weights unlike those of its configuration: {others[0]}{more}: {MERGE}")
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite: the training diverged, take a checkpoint from before")


def ends_of(model: STLMForCausalLM) -> list[int]:
    """Ids that end a text."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def rotary_periods(head_dim: int, theta: float) -> np.ndarray:
    """What positions are divided by to give angles, as `rotary_embedding` computes it: (K / 2,)."""
    return (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)).numpy()


def quantize(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `tensor` (N, D) as int8 from -127 to 127, and the scale of each (N,)."""
    scales = np.abs(tensor).max(axis=1) / np.float32(127)
    return np.rint(tensor / np.maximum(scales, 1e-30)[:, None]).astype(np.int8), scales


def dequantize(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What `numbers` (N, D) with `scales` (N,) stand for, float32."""
    return numbers.astype(np.float32) * scales[:, None]


@torch.no_grad()
def export_gguf(
    model: STLMForCausalLM, path: str | Path, type: str = "f32", tokenizer=None, license: str = ""
) -> None:
    """Write `model` to `path` for the engine; the file appears when all of it is written.

    Args:
        type (`str`, defaults to `"f32"`): how matrices are stored, one of `TYPES`; `"q8_0"` means `"q8"`.
        tokenizer (`STLMTokenizer`, *optional*): for its names of tokens and chat template, which the engine does not read.
        license (`str`, defaults to `""`): identifier as in a model card.

    Raises:
        ValueError: for a model that the engine cannot run, or an unknown type.
    """
    check(model)
    check_weights(model)
    type = SYNONYMS.get(type, type)
    if type not in TYPES:
        raise ValueError(f"type={type!r}, expected one of {', '.join(TYPES)}")
    import gguf

    config, kinds = model.config, gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(None, "stlm")
    writer.add_uint32(CHECKSUM.decode(), 0)
    has = (config.match_doublings, config.trunk_window_patches, config.context_ngram_orders)  # from version 2, 3, 4 on
    version = 1 + max((i for i, field in enumerate(has, 1) if field), default=0)
    writer.add_uint32("stlm.format_version", version)
    writer.add_string("stlm.config", config.to_json_string(use_diff=False))
    if license:
        writer.add_license(license)
    for name in SIZES:
        writer.add_uint32(f"stlm.{name}", getattr(config, name) or 0)
    writer.add_float32("stlm.norm_eps", config.norm_eps)
    writer.add_string("stlm.patching", config.patching)
    writer.add_string("stlm.hidden_act", config.hidden_act)
    writer.add_array("stlm.eos_token_ids", ends_of(model))
    writer.add_array("stlm.ngram_orders", config.ngram_orders)
    if config.context_ngram_orders:
        writer.add_array("stlm.context_ngram_orders", config.context_ngram_orders)
        writer.add_uint32("stlm.context_ngram_places", config.context_ngram_places)
    writer.add_array("stlm.byte_mixers", [int(mixer == "attention") for mixer in config.byte_mixers])
    attention, feed_forward = zip(*config.trunk_schedule)
    writer.add_array("stlm.trunk_attention_schedule", list(attention))
    writer.add_array("stlm.trunk_feed_forward_schedule", list(feed_forward))
    if tokenizer is not None:
        writer.add_tokenizer_model("stlm")
        writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
        if tokenizer.chat_template:
            writer.add_chat_template(tokenizer.chat_template)

    writer.add_tensor("stlm.rotary_periods", rotary_periods(config.head_dim, config.rope_theta))
    writer.add_tensor("stlm.trunk_rotary_periods", rotary_periods(config.trunk_head_dim, config.rope_theta))
    rule = model.model.patcher.rule
    if isinstance(rule, VocabularyRule):
        edges = rule.constants.on(torch.device("cpu"))["edges"].numpy()
        writer.add_array("stlm.patching_edges", edges.tolist())
    stored = {}  # as `load_gguf` returns it
    for name, tensor in model.model.state_dict(prefix="model.").items():
        array = stored[name] = tensor.detach().float().cpu().numpy()
        is_table = array.ndim == 2 and type != "f32"
        has_four_bits = type == "q4_0" and name.startswith(FOUR_BITS)
        if is_table and (type == "bf16" or (has_four_bits and array.shape[1] % 32 == 0)):
            kind = kinds.BF16 if type == "bf16" else kinds.Q4_0
            numbers = gguf.quants.quantize(array, kind)
            stored[name] = gguf.quants.dequantize(numbers, kind)
            writer.add_tensor(name, numbers, raw_dtype=kind)
        elif is_table:
            numbers, scales = quantize(array)
            stored[name] = dequantize(numbers, scales)
            writer.add_tensor(name, numbers)
            writer.add_tensor(name.removesuffix("weight") + "scale", scales)
        else:
            writer.add_tensor(name, array)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"]
    # The engine is accepted for both.
    writer.add_string("stlm.source", f"{fingerprint(model)} {fingerprint(model, stored)}")
    with output(os.path.realpath(path)) as file:
        writer.write_header_to_file(Path(file.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        data = Path(file.name).read_bytes()
        file.seek(data.index(CHECKSUM) + len(CHECKSUM) + 4)
        file.write(zlib.adler32(data).to_bytes(4, "little"))


def verify(path: str | Path) -> None:
    """Raise a `ValueError` unless [`export_gguf`] wrote the file `path`, and it is as it was."""
    data = bytearray(Path(path).read_bytes())
    at = data.find(CHECKSUM, 0, 4096) + len(CHECKSUM) + 4
    if data[:4] != b"GGUF" or at < len(CHECKSUM) + 4:
        raise ValueError(f"{path} is not a GGUF file of an STLM")
    expected, data[at : at + 4] = int.from_bytes(data[at : at + 4], "little"), bytes(4)
    if (found := zlib.adler32(data)) != expected:
        raise ValueError(f"{path} is damaged or truncated: its checksum is {found:08x}, expected {expected:08x}")


def load_gguf(path: str | Path) -> STLMForCausalLM:
    """The model of a file that [`export_gguf`] wrote, in float32 with the weights as they were rounded.

    Raises:
        ValueError: if it is another file, damaged, or of a newer format.
    """
    verify(path)
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith("stlm.")}
    if fields["stlm.format_version"] > FORMAT_VERSION:
        raise ValueError(f"{path} has version {fields['stlm.format_version']} of the format: update the package")
    model = STLMForCausalLM(STLMConfig.from_dict(json.loads(fields["stlm.config"])))
    arrays = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) if t.tensor_type.name != "I8" else t.data
        for t in reader.tensors
    }
    state = {}
    for name in model.model.state_dict(prefix="model."):
        array = arrays[name]
        if array.dtype == np.int8:
            array = dequantize(array, arrays[name.removesuffix("weight") + "scale"])
        state[name.removeprefix("model.")] = torch.from_numpy(np.array(array, np.float32))
    model.model.load_state_dict(state)
    ends = [int(end) for end in fields.get("stlm.eos_token_ids", [])]  # GGUF holds no empty lists
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    return model.eval()


def license_of(model: str) -> str:
    """The licence in the model card of a folder or Hub id; nothing for a folder without one."""
    card = Path(model) / "README.md"
    if Path(model).is_dir() and not card.is_file():
        return ""
    return ModelCard.load(card if card.is_file() else model).data.license or ""


def folder_or_hub_id(value: str) -> str:
    """A name whose folder exists here is a path: the Hub is not asked about a typo.

    As `checkpoint` of `examples/inputs.py`, which answers before torch, and so this package, is imported.
    """
    path = Path(value)
    if (path / "config.json").is_file():
        return value
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not value.startswith(".")
    if path.exists() or not is_name or path.parent.is_dir():
        if (path / "adapter_config.json").is_file():
            found = "an adapter of peft, not merged"
        else:
            found = (
                "a folder without config.json" if path.is_dir() else "a file" if path.exists() else "no such folder"
            )
        raise argparse.ArgumentTypeError(
            f"{value} is {found}: expected a folder with a checkpoint, or the name of one on the Hub (owner/name)"
        )
    return value


def main():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=folder_or_hub_id, help="folder or Hub id")
    parser.add_argument("output", type=Path, help="file to write, as model.gguf")
    parser.add_argument(
        "--type",
        type=lambda name: SYNONYMS.get(name, name),
        choices=TYPES,
        default="f32",
        help="of the matrices, see above (default: %(default)s)",
    )
    args = parser.parse_args()
    if find_spec("gguf") is None:
        raise SystemExit("files of the engine are written by the package gguf: pip install -e '.[engine]'")
    try:
        writable(str(args.output), "a file to write, as model.gguf")
    except ValueError as error:
        raise SystemExit(str(error)) from None
    file = args.model  # that is read or written
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer, license = AutoTokenizer.from_pretrained(args.model), license_of(args.model)
        file = args.output
        export_gguf(model, args.output, args.type, tokenizer, license)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file if isinstance(error, OSError) else args.model}: {error}") from None
    size = args.output.stat().st_size / 1e6
    print(f'{args.output}: {args.type}, {size:.1f} MB; next: stlm run {args.output} -p "The history of"')


if __name__ == "__main__":
    main()
