# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint folder, written from what lies there: `config.json` and `results.json`.

`results.json` is that of `examples/pretrain.py` or `examples/export.py`; without one the card has no results and says
nothing about training. A `README.md` that somebody wrote or edited is never replaced.
"""

import json
import re
from hashlib import sha256
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from modeling_stlm import STLMConfig, STLMForCausalLM


SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

checkpoint = {checkpoint}
tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="float32")
inputs = tokenizer("The history of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
"""

CARD = """\
# {name}

{description}

```python
{snippet}```

{sections}"""

NEEDED = {"arguments", "budget", "bytes_seen", "commit", "device", "steps", "torch", "transformers"}

LIMITS = """\
A model of this size knows little and makes things up. It continues text; unless its training data say otherwise it
follows no instructions, knows only the language of these data, and was not filtered for safety."""


def build_model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    licence: str | None = None,
    language: str | None = None,
    data: str | None = None,
) -> ModelCard:
    """
    Args:
        folder: the checkpoint.
        name: title; by default that of `repo_id`, of `results.json`, or of the folder.
        repo_id: id on the Hub, for the snippet; by default the snippet loads the folder it is run in.
        licence: of the weights, as the Hub spells it (`"cc-by-sa-4.0"`).
        language: of the training texts, as the Hub spells it (`"en"`).
        data: Markdown about the training texts.

    Raises:
        ValueError: if the folder holds anything but a language model of this package, or if its `results.json` is not one
            of `examples/pretrain.py`.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, STLMConfig) or config.architectures != [STLMForCausalLM.__name__]:
        raise ValueError(
            f"{folder} holds {config.architectures} of type {config.model_type!r}: "
            f"a card is written for {STLMForCausalLM.__name__} only"
        )
    path = folder / "results.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if results and (missing := sorted(NEEDED - set(results))):
        raise ValueError(f"{path} lacks {missing}: expected the file that examples/pretrain.py writes")
    name = name or (repo_id.split("/")[-1] if repo_id else results.get("model", folder.resolve().name))
    with torch.device("meta"):
        model = STLMForCausalLM(config)
    scores = results.get("exported", {}).get("scores") or {
        split: {"bits_per_byte": bits} for split, bits in results.get("bits_per_byte", {}).items()
    }
    metadata = ModelCardData(
        license=licence,
        language=language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["stlm", "byte-level", "tiny"],
        metrics=["bits_per_byte"] if scores else None,
        model_name=name,
        eval_results=_eval_results(scores, results.get("arguments", {})) if scores else None,
    )
    budget = model.parameter_budget()
    description = (
        f"A pooled byte-level, weight-tied language model with {budget['stored']['total']:,} stored "
        f"({budget['effective']['total']:,} effective) parameters:\n"
        "[Super Tiny Language Models](https://arxiv.org/abs/2405.14159) as a transformers model. It reads and writes "
        "bytes; the\ntrunk runs once per patch."
    )
    sections = {
        "Results": _results(scores, results),
        "Architecture": _architecture(config),
        "Budget": _budget(model, budget),
        "Training": _training(results),
        "Data": (data or "").strip(),
        "Limits": LIMITS,
        "Licence": f"The weights are under `{licence}`, the code files beside them under `apache-2.0`."
        if licence
        else "",
    }
    body = CARD.format(
        name=name,
        description=description,
        snippet=SNIPPET.format(checkpoint=f'"{repo_id}"' if repo_id else '"."  # this folder, or its id on the Hub'),
        sections="\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items() if text),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def write_model_card(folder: str | Path, card: ModelCard) -> bool:
    """Save as `README.md`, and tell whether: only a card written by this function and not edited since is replaced."""
    path = Path(folder) / "README.md"
    if path.is_file():
        present, last_line = re.fullmatch(r"(.*?)([^\n]*\n?)", path.read_text(encoding="utf-8"), re.DOTALL).groups()
        if last_line != _mark(present):
            return False
    text = f"{card}\n"
    path.write_text(text + _mark(text), encoding="utf-8")
    return True


def _mark(text: str) -> str:
    """Last line of a generated card, by which it is known to be as it was written."""
    return f"<!-- Generated. Once edited, it is not generated again: {sha256(text.encode()).hexdigest()[:16]} -->\n"


def _eval_results(scores: dict[str, dict], arguments: dict[str, str]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="text",
            dataset_name=arguments.get(split, split),
            dataset_split=split,
            metric_type="bits_per_byte",
            metric_name="bits per byte",
            metric_value=round(score["bits_per_byte"], 4),
        )
        for split, score in scores.items()
    ]


def _results(scores: dict[str, dict], results: dict) -> str:
    if not scores:
        return ""
    dtype = results.get("exported", {}).get("dtype")
    rounded = f", of these {dtype} weights computed in float32" if dtype else ""
    rows = [
        f"| {split} | {score['bits_per_byte']:.4f} | {format(score['bytes'], ',') if 'bytes' in score else ''} |"
        for split, score in scores.items()
    ]
    return "\n".join(
        [
            f"Bits per byte, windows of {results['arguments']['block_bytes']} bytes without overlap, special tokens "
            f"left out{rounded}:",
            "",
            "| split | bits per byte | bytes |",
            "|---|---|---|",
            *rows,
        ]
    )


def _architecture(config: STLMConfig) -> str:
    patches = {
        "spacelike": "at the end of words",
        "fixed": f"every {config.patch_bytes} bytes",
        "vocabulary": f"with the byte that proves the end of one of {len((config.patch_vocabulary or '').split()):,} pieces",
        "learned": f"where a router decides, trained for an average of {config.patch_bytes} bytes",
    }[config.patching]
    if config.patching != "fixed":
        patches += f", after at most {config.max_patch_bytes} bytes"
    if config.patching == "spacelike":
        patches += f" or {config.max_patch_characters} characters of three or more bytes"
    stored, passes = config.num_unique_trunk_layers, config.num_trunk_layers
    sharing = f"shared by the rule `{config.layer_sharing}`" if stored < passes else "each with its own weights"
    head = "tied to" if config.tie_word_embeddings else "apart from"
    grams = [f"{order} bytes" for order in config.ngram_orders]
    if config.ngram_word_bytes:
        grams.append(f"the word so far (at most {config.ngram_word_bytes} bytes)")
    ngrams = "none"
    if grams:
        size = config.ngram_embedding_size or config.hidden_size
        ngrams = f"{', '.join(grams)}; {config.ngram_rows:,} rows of {size} for each"
    return "\n".join(
        [
            f"- bytes: {config.num_local_encoder_layers} + {config.num_local_decoder_layers} layers of width "
            f"{config.hidden_size} before and after the trunk ({', '.join(sorted(set(config.byte_mixers)))}); hashed n-grams: {ngrams}",
            f"- patches (`{config.patching}`): they end {patches}; the trunk reads mean and last byte",
            f"- trunk, once per patch: {passes} passes over {stored} stored layers of width {config.trunk_hidden_size}, "
            f"{sharing}",
            f"- head: {head} the byte embedding; {config.vocab_size} ids: bytes and special tokens",
        ]
    )


def _budget(model: STLMForCausalLM, budget: dict[str, dict[str, int]]) -> str:
    config = model.config
    lengths = [config.patch_bytes] if config.patching == "fixed" else [4, 6]
    flops = ", ".join(f"{model.flops_per_byte(n) / 1e6:.2f} MFLOP at {n} bytes per patch" for n in lengths)
    groups = {group: (count, budget["effective"][group]) for group, count in budget["stored"].items()}
    rows = [f"| {group} | {stored:,} | {effective:,} |" for group, (stored, effective) in groups.items() if effective]
    return "\n".join(
        [
            "| parameters | stored | effective |",
            "|---|---|---|",
            *rows,
            "",
            "Effective parameters count a shared layer once per pass and a tied head in addition to the embedding. Forward "
            f"pass,\nper byte of 1024: {flops}.",
        ]
    )


def _training(results: dict) -> str:
    if not results:
        return ""
    arguments = results["arguments"]
    budget = ", ".join(f"{name} {value}" for name, value in results["budget"].items())
    return "\n".join(
        [
            f"- {results['bytes_seen']:,} bytes seen in {results['steps']:,} steps of {arguments['batch_size']} windows "
            f"of {arguments['block_bytes']} bytes; budget: {budget}",
            f"- optimizer: Muon {arguments['muon_lr']} on matrices, AdamW {arguments['adamw_lr']} on the rest, warm-up "
            "2%, linear decay over the last 60%",
            f"- texts: {arguments['train']}",
            f"- {results['device']}; torch {results['torch']}, transformers {results['transformers']}, commit "
            f"{results['commit']}",
            "- curve: `loss.png`; all settings: `results.json`",
        ]
    )
