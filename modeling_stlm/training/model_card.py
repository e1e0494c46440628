# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint folder, written from what lies there: `config.json` and `results.json`.

`results.json` is that of `examples/pretrain.py`, `distill.py` or `research/export.py`, or says what was fine-tuned:

```python
{
    "base_model": describe_base("examples/checkpoints/stlm-3m"),  # {}: trained from random weights
    # All others are optional.
    "scores": {"test": {"accuracy": 0.88}},  # any metrics of any splits
    "baselines": {"test, TF-IDF": {"accuracy": 0.85}},  # more rows of the table, which are no scores of this model
    "scoring": "Shares of 200 rows",  # above the table
    "arguments": {"train": "rows.csv", "epochs": 3},  # names of files, no folders
    "rows": {"train": 1000},  # of the files among the arguments
}
```

Without one the card has no results and says nothing about training. Without a description of the texts it says that there is
none. A `README.md` that somebody wrote or edited is never replaced.
"""

import ast
import json
import re
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from packaging.requirements import Requirement
from transformers import AutoConfig

import modeling_stlm
from modeling_stlm import STLMConfig, STLMPreTrainedModel


class Task(NamedTuple):
    tag: str  # as the Hub spells it
    kind: str  # of model
    texts: str  # arguments of the tokenizer
    use: str  # expression to print


TASKS = {
    "STLMModel": Task("feature-extraction", "encoder", '"A text."', "model(**inputs).last_hidden_state"),
    "STLMForCausalLM": Task(
        "text-generation",
        "language model",
        '"The history of"',
        "tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0])",
    ),
    "STLMForMaskedLM": Task(
        "fill-mask",
        "masked language model",
        '"The hist<mask>ry of"',
        "tokenizer.decode(model(**inputs).logits[0].argmax(-1))",
    ),
    "STLMForSequenceClassification": Task(
        "text-classification", "classifier", '"A text."', "model(**inputs).logits.softmax(-1), model.config.id2label"
    ),
    "STLMForTokenClassification": Task(
        "token-classification", "tagger", '"A text."', "model(**inputs).logits.argmax(-1), model.config.id2label"
    ),
    "STLMForQuestionAnswering": Task(
        "question-answering", "model that finds answers", '"What? A text."', "model(**inputs).start_logits"
    ),
    "STLMForMultipleChoice": Task(
        "multiple-choice",
        "model that chooses between texts",
        '["What? A text.", "What? Another."], padding=True',
        "model(**{name: rows[None] for name, rows in inputs.items()}).logits.softmax(-1)",
    ),
}

SNIPPET = """\
from transformers import {auto_class}, AutoTokenizer

checkpoint = {checkpoint}
tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
model = {auto_class}.from_pretrained(checkpoint, trust_remote_code=True, dtype="float32")
inputs = tokenizer({texts}, return_tensors="pt")
print({use})
"""

CARD = """\
# {name}

{description}

```python
{snippet}```

{requirements}{sections}"""

SPANS = """\
Spans of whole words, with a class of the package that is not among the files here:

```python
from transformers import pipeline
from modeling_stlm.inference.spans import SpanPipeline

tagger = pipeline("token-classification", checkpoint, pipeline_class=SpanPipeline, aggregation_strategy="first")
tagger("A text.")
```

"""

MADE_WITH = {"commit", "device", "torch", "transformers"}
NEEDED = MADE_WITH | {"arguments", "budget", "bytes_seen", "steps"}
MAX_LABELS = 20  # named in a card

# Weights under one of these may be offered under another licence, too. All others hold for what is made of the weights.
PERMISSIVE = {"apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "mit", "unlicense"}

LIMITS = """\
A model of this size knows little and makes things up. It continues text; unless its training data say otherwise it
follows no instructions, knows only the language of these data, and was not filtered for safety."""
LIMITS_OF_ENCODERS = """\
A model of this size knows little, and only the language of its training data, which were not filtered for bias."""


def describe_base(checkpoint: str | Path) -> dict:
    """What a model that is fine-tuned from `checkpoint` inherits, for `"base_model"` in its `results.json`.

    Of a folder: its name, and `license`, `language`, `datasets`, `base_model` (ids on the Hub) and `data` (Markdown) as its
    card says; where it says nothing, what the folder inherited itself, and `data` as a generated card would say. Of an id
    on the Hub: that; its card is read when the model is published.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return {"base_model": str(checkpoint)}
    card, results = folder / "README.md", _read_results(folder)
    base = results.get("base_model", {})
    base = base | {"data": _data(_undescribed(results), base)}
    if card.is_file():
        base |= _inherited(ModelCard.load(card))
    return base | {"name": folder.resolve().name}


def _read_results(folder: Path) -> dict:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _inherited(card: ModelCard) -> dict:
    metadata = card.data.to_dict()
    base = {name: metadata[name] for name in ("license", "language", "datasets", "base_model") if metadata.get(name)}
    data = re.search(r"^## Data\n\n(.*?)\s*(?=^## |\Z)", card.text, re.DOTALL | re.MULTILINE)
    return base | ({"data": data[1]} if data else {})


def build_model_card(
    folder: str | Path,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    base_model: str | Path | None = None,
    licence: str | None = None,
    language: str | None = None,
    data: str | None = None,
) -> ModelCard:
    """
    Args:
        folder: the checkpoint.
        name: title; by default that of `repo_id`, of `results.json`, or of the folder.
        repo_id: id on the Hub, for the snippet; by default the snippet loads the folder it is run in.
        base_model: folder or id on the Hub of the checkpoint that was fine-tuned; by default that of `results.json`.
        licence: of the weights, as the Hub spells it (`"cc-by-sa-4.0"`); by default that of the base model.
        language: of the training texts, as the Hub spells it (`"en"`); by default that of the base model.
        data: Markdown about the training texts; by default the card says that they are not described. What is known of
            those of the base model follows.

    Raises:
        ValueError: if the folder holds anything but a model of this package, if its `results.json` is neither one of
            `examples/pretrain.py` nor names a base model, or if the licence of the base model forbids `licence`.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    (class_name,) = config.architectures or [None]
    if not isinstance(config, STLMConfig) or class_name not in TASKS:
        raise ValueError(
            f"{folder} holds {config.architectures} of type {config.model_type!r}: "
            f"a card is written for {', '.join(TASKS)} only"
        )
    task, results = _task(class_name, config), _read_results(folder)
    base = describe_base(base_model) if base_model else results.get("base_model", {})
    if results and not base and "base_model" not in results and (missing := sorted(NEEDED - set(results))):
        raise ValueError(
            f"{folder / 'results.json'} lacks {missing}: expected the file that examples/pretrain.py writes, or one that "
            "says what was fine-tuned (base_model)"
        )
    if isinstance(hub_id := base.get("base_model"), str) and "license" not in base:
        original = {"name": hub_id} | _inherited(ModelCard.load(hub_id))
        base = original | base | ({"data": _data(base["data"], original)} if "data" in base else {})
    licence = _licence(licence, base)
    name = name or (repo_id.split("/")[-1] if repo_id else results.get("model", folder.resolve().name))
    with torch.device("meta"):
        model = getattr(modeling_stlm, class_name)(config)
    scores = results.get("exported", {}).get("scores") or results.get("scores") or {}
    scores = scores or {split: {"bits_per_byte": bits} for split, bits in results.get("bits_per_byte", {}).items()}
    metrics = sorted({metric for score in scores.values() for metric in score} - {"bytes"})
    metadata = ModelCardData(
        license=licence,
        language=language or base.get("language"),
        library_name="transformers",
        pipeline_tag=task.tag,
        tags=["stlm", "byte-level", "tiny"],
        base_model=base.get("base_model"),
        datasets=base.get("datasets"),
        metrics=metrics or None,
        model_name=name,
        eval_results=_eval_results(task, scores, results) if scores else None,
    )
    budget = model.parameter_budget()
    tied = " with a weight-tied trunk and" if _is_shared(config) else " with"
    description = (
        f"A pooled byte-level {task.kind}{tied} {budget['stored']['total']:,} stored "
        f"({budget['effective']['total']:,} effective) parameters:\n"
        "[Super Tiny Language Models](https://arxiv.org/abs/2405.14159) as a transformers model. It reads "
        f"{'and writes ' if model.can_generate() else ''}bytes; the\ntrunk runs once per patch."
    )
    training = _training(results, base) if set(results) >= NEEDED else _fine_tuning(base, results)
    curve = "![Bits per byte by step](loss.png)" if (folder / "loss.png").is_file() else ""
    sections = {
        "Results": _results(scores, metrics, results),
        "Architecture": _architecture(config, task),
        "Budget": _budget(model, budget),
        "Training": "\n\n".join(part for part in (training, curve) if part),
        "Data": _data(data or _undescribed(results), base),
        "Limits": LIMITS if model.can_generate() else LIMITS_OF_ENCODERS,
        "Licence": f"The weights are under `{licence}`, the code files beside them under `apache-2.0`."
        if licence
        else "",
    }
    has_code = (folder / "modeling_stlm.py").is_file()
    here = '"."  # this folder' + ("" if has_code else " (after `import modeling_stlm`)") + ", or its id on the Hub"
    snippet = SNIPPET.format(
        auto_class="AutoModel" + class_name.removeprefix("STLM").removeprefix("Model"),
        checkpoint=f'"{repo_id}"' if repo_id else here,
        texts=task.texts,
        use=task.use,
    )
    body = CARD.format(
        name=name,
        description=description,
        snippet=snippet,
        requirements=_requirements(task),
        sections="\n".join(f"## {title}\n\n{text}\n" for title, text in sections.items() if text),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}")


def _task(class_name: str, config: STLMConfig) -> Task:
    """That of the class, as this configuration has it."""
    task, numbers = TASKS[class_name], "model(**inputs).logits"
    if class_name == "STLMModel" and config.is_causal:
        return task._replace(kind="causal model without a head")
    if class_name == "STLMForSequenceClassification" and _are_values(config):
        return task._replace(kind="regressor", use=numbers)
    if class_name == "STLMForSequenceClassification" and config.problem_type == "multi_label_classification":
        return task._replace(kind="multi-label classifier", use=f"{numbers}.sigmoid(), model.config.id2label")
    return task


def _are_values(config: STLMConfig) -> bool:
    """Whether a classifier of texts has learned values, by the rule of the library's loss."""
    return config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1)


def _is_shared(config: STLMConfig) -> bool:
    """Whether passes of the trunk share weights."""
    return config.num_unique_trunk_layers < config.num_trunk_layers


def _requirements(task: Task) -> str:
    """What the installed package requires: `setup.py` says it once; nothing where it is not installed but on the path."""
    try:
        found = [requirement for line in requires("stlm") or [] if (requirement := Requirement(line)).marker is None]
    except PackageNotFoundError:
        found = []
    names = ", ".join(f"`{r.name}{','.join(sorted(map(str, r.specifier), reverse=True))}`" for r in found)
    return (f"It needs {names}.\n\n" if names else "") + (SPANS if task.tag == "token-classification" else "")


def _licence(licence: str | None, base: dict) -> str | None:
    inherited = base.get("license")
    if licence and inherited and licence != inherited and inherited not in PERMISSIVE:
        raise ValueError(
            f"{base['name']} is under {inherited}, and so is what was fine-tuned from it: it cannot be offered as {licence}"
        )
    return licence or inherited


def write_model_card(folder: str | Path, card: ModelCard) -> bool:
    """Save as `README.md`, and tell whether: only a card written by this function and not edited since is replaced."""
    path = Path(folder) / "README.md"
    if path.is_file():
        present, last_line = re.fullmatch(r"(.*?)([^\n]*\n?)", path.read_text(encoding="utf-8"), re.DOTALL).groups()
        if last_line != _mark(present):
            return False
    text = f"{card}\n"
    partial = path.with_suffix(".partial")  # a card that is cut would no longer match its mark, and stay so
    partial.write_text(text + _mark(text), encoding="utf-8")
    partial.replace(path)
    return True


def _mark(text: str) -> str:
    """Last line of a generated card, by which it is known to be as it was written."""
    return f"<!-- Generated. Once edited, it is not generated again: {sha256(text.encode()).hexdigest()[:16]} -->\n"


def _eval_results(task: Task, scores: dict[str, dict], results: dict) -> list[EvalResult]:
    """One for each score; `results["tasks"]` names the task of a split that is not that of the head."""
    tags = {split: results.get("tasks", {}).get(split, task.tag) for split in scores}
    return [
        EvalResult(
            task_type=tags[split],
            task_name=tags[split].replace("-", " ").capitalize(),
            dataset_type="text",
            dataset_name=results.get("arguments", {}).get(split, split),
            dataset_split=split,
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=round(value, 4),
        )
        for split, score in scores.items()
        for metric, value in score.items()
        if metric != "bytes"
    ]


def _results(scores: dict[str, dict], metrics: list[str], results: dict) -> str:
    if not scores:
        return ""
    introduction = f"{results.get('scoring', 'By split')}:"
    if metrics == ["bits_per_byte"] and "block_bytes" in results.get("arguments", {}):
        dtype = results.get("exported", {}).get("dtype")
        rounded = f", of these {dtype} weights computed in float32" if dtype else ""
        introduction = (
            f"Bits per byte, windows of {results['arguments']['block_bytes']} bytes without overlap, special tokens "
            f"left out{rounded}:"
        )
    has_bytes = any("bytes" in score for score in scores.values())
    rows = scores | results.get("baselines", {})
    columns = [*(metric.replace("_", " ") for metric in metrics), *["bytes"] * has_bytes]
    lines = [f"| split | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for split, score in rows.items():
        values = [f"{score[metric]:.4f}" if metric in score else "" for metric in metrics]
        values += [f"{score['bytes']:,}" if "bytes" in score else ""] * has_bytes
        lines.append(f"| {split} | {' | '.join(values)} |")
    return "\n".join([introduction, "", *lines])


def _architecture(config: STLMConfig, task: Task) -> str:
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
    attention, feed_forward = (len(set(blocks)) for blocks in zip(*config.trunk_schedule))
    stored = f"{attention} stored layers"
    if attention != feed_forward:
        stored = f"{attention} stored attention and {feed_forward} stored feed-forward blocks"
    sharing = f"shared by the rule `{config.layer_sharing}`" if _is_shared(config) else "each with its own weights"
    if _is_shared(config) and config.sharing_lora_rank:
        sharing += f", each pass with matrices of rank {config.sharing_lora_rank} of its own"
    tied = "tied to" if config.tie_word_embeddings else "apart from"
    heads = {
        "feature-extraction": "none",
        "text-classification": _numbers_of_a_text(config),
        "token-classification": f"{config.num_labels} classes of a byte: {_labels(config)}",
        "question-answering": "the first and the last byte of the answer",
        "multiple-choice": "a score of each text",
    }
    head = heads.get(task.tag, f"{tied} the byte embedding; {config.vocab_size} ids: bytes and special tokens")
    grams = [f"{order} bytes" for order in config.ngram_orders]
    if config.ngram_word_bytes:
        grams.append(f"the word so far (at most {config.ngram_word_bytes} bytes)")
    ngrams = "none"
    if grams:
        size = config.ngram_embedding_size or config.hidden_size
        ngrams = f"{', '.join(grams)}; {config.ngram_rows:,} rows of {size} for each"
    matches = "none"
    if config.match_bytes:
        lengths = (config.match_bytes << doubling for doubling in range(config.match_doublings + 1))
        matches = f"the byte that followed the same {' or '.join(map(str, lengths))} bytes"
    recent = ""
    if config.context_ngram_orders:
        lengths, places = " or ".join(map(str, config.context_ngram_orders)), config.context_ngram_places
        where = f"the last {places} places" if places > 1 else "the last place"
        recent = f"; in-context n-grams: the bytes that followed {where} of the same {lengths} bytes"
    way = "causal: a byte sees nothing after it" if config.is_causal else "bidirectional: a byte sees the whole text"
    window = ""
    if config.trunk_window_patches is not None:
        side = "last" if config.is_causal else "nearest"
        window = f"; attention over the {side} {config.trunk_window_patches:,} patches"
        way = way.replace("the whole text", "text on both sides")
    return "\n".join(
        [
            f"- {way}",
            f"- bytes: {config.num_local_encoder_layers} + {config.num_local_decoder_layers} layers of width "
            f"{config.hidden_size} before and after the trunk ({', '.join(sorted(set(config.byte_mixers)))}); hashed n-grams: {ngrams}; "
            f"match embedding: {matches}{recent}",
            f"- patches (`{config.patching}`): they end {patches}; the trunk reads mean and last byte",
            f"- trunk, once per patch: {config.num_trunk_layers} passes over {stored} of width "
            f"{config.trunk_hidden_size}, {sharing}{window}",
            f"- head: {head}",
        ]
    )


def _numbers_of_a_text(config: STLMConfig) -> str:
    if not _are_values(config):
        each = ", each there or not" if config.problem_type == "multi_label_classification" else ""
        return f"{config.num_labels} {'labels' if each else 'classes'} of a text{each}: {_labels(config)}"
    return (
        "a value of a text" if config.num_labels == 1 else f"{config.num_labels} values of a text: {_labels(config)}"
    )


def _labels(config: STLMConfig) -> str:
    names = [f"`{name}`" for _, name in sorted(config.id2label.items())]
    more = [f"and {len(names) - MAX_LABELS} more"] if len(names) > MAX_LABELS else []
    return ", ".join(names[:MAX_LABELS] + more)


def _budget(model: STLMPreTrainedModel, budget: dict[str, dict[str, int]]) -> str:
    config = model.config
    lengths = [config.patch_bytes] if config.patching == "fixed" else [4, 6]
    flops = ", ".join(f"{model.flops_per_byte(n) / 1e6:.2f} MFLOP at {n} bytes per patch" for n in lengths)
    counted = ["a shared layer once per pass"] if _is_shared(config) else []
    if model.get_output_embeddings() is not None and config.tie_word_embeddings:
        counted.append("a tied head in addition to the embedding")
    effective = f"Effective parameters count {' and '.join(counted)}. " if counted else ""
    groups = {group: (count, budget["effective"][group]) for group, count in budget["stored"].items()}
    rows = [f"| {group} | {stored:,} | {effective:,} |" for group, (stored, effective) in groups.items() if effective]
    return "\n".join(
        [
            "| parameters | stored | effective |",
            "|---|---|---|",
            *rows,
            "",
            f"{effective}Forward pass,\nper byte of 1024: {flops}.",
        ]
    )


def _training(results: dict, base: dict) -> str:
    arguments = results["arguments"]
    budget = ", ".join(f"{name} {value}" for name, value in results["budget"].items())
    corpus = results.get("corpus_bytes")
    passes = f", {results['bytes_seen'] / corpus:.1f} passes over {corpus:,}" if corpus else ""
    return "\n".join(
        [
            *([f"- starts from the weights of `{base['name']}`"] if base else []),
            f"- {results['bytes_seen']:,} bytes seen{passes} in {results['steps']:,} steps of {arguments['batch_size']} "
            f"windows of {arguments['block_bytes']} bytes; budget: {budget}",
            f"- optimizer: {_matrix_optimizer(arguments)} {float(arguments['muon_lr']):g} on matrices, AdamW "
            f"{float(arguments['adamw_lr']):g} on the rest, warm-up 2%, linear decay over the last {float(arguments.get('decay', 0.6)):.0%}",
            f"- texts: {arguments['train']}",
            *_teacher(arguments),
            *_special(arguments),
            _made_with(results),
            *_afterwards(results),
            *_fields_set(results),
            "- all settings: `results.json`",
        ]
    )


def _matrix_optimizer(arguments: dict) -> str:
    return arguments.get("matrix_optimizer", "Muon")  # of runs before there was another one


def _made_with(results: dict) -> str:
    versions = f"- {results['device']}; torch {results['torch']}, transformers {results['transformers']}"
    return versions + (f", commit {results['commit']}" if results["commit"] else "")  # none outside of a repository


def _afterwards(results: dict) -> list[str]:
    """Of the runs that went on from these weights (`research/export.py --after` and `--plus`)."""
    lines = []
    for after in results.get("afterwards", []):
        arguments, share = after["arguments"], after.get("share_of_weights", 1)
        start = "then" if share == 1 else f"from the weights of then, for {100 * share:g}% of a mean with them,"
        if after.get("added"):
            mean = "" if share == 1 else f" (in a mean, of which it is {100 * share:g}%)"
            start = f"added to these, what a training of earlier weights had changed{mean}:"
        lines += [
            f"- {start} {after['bytes_seen']:,} bytes in {after['steps']:,} steps of {arguments['batch_size']} windows "
            f"of {arguments['block_bytes']} bytes; texts: {arguments['train']}",
            f"- their rates: {_matrix_optimizer(arguments)} {float(arguments['muon_lr']):g}, AdamW "
            f"{float(arguments['adamw_lr']):g}, linear decay over the last {float(arguments['decay']):.0%}",
            *_special(arguments),
            _made_with(after),
        ]
    return lines


def _fields_set(results: dict) -> list[str]:
    """What `research/export.py --set` changed."""
    return [f"- fields changed after training: {', '.join(changed)}"] if (changed := results.get("fields_set")) else []


def _special(arguments: dict[str, str]) -> list[str]:
    """What `--set`, `--only`, `--objective` and the alterations of `examples/pretrain.py` changed, where they were given."""
    lines = (
        [f"- fields changed: {', '.join(changed)}"]
        if (changed := ast.literal_eval(arguments.get("set", "[]")))
        else []
    )
    lines += [
        f"- objective beside the next byte: {' '.join(words[:-1])}, weight {words[-1]}"
        for words in ast.literal_eval(arguments.get("objective", "[]"))
    ]
    if (only := arguments.get("only", "None")) != "None":
        lines.append(f"- only {only} was trained")
    alterations = {
        "repeat": "a passage repeated in {} of the documents",
        "noise": "errors of letters in {} of the documents",
        "sentences": "{} of the documents replaced by documents of one of their sentences",
    }
    for name, what in alterations.items():
        if share := float(arguments.get(name, 0)):
            lines.append(f"- {what.format(f'{100 * share:g}%')}")
    return lines


def _teacher(arguments: dict[str, str]) -> list[str]:
    if "teacher" not in arguments:
        return []
    return [f"- distilled from `{arguments['teacher']}`, weight {arguments['teacher_weight']} of the loss"]


def _fine_tuning(base: dict, results: dict) -> str:
    if not base and "base_model" not in results:
        return ""
    lines = [f"- fine-tuned from `{base['name']}`" if base else "- from random weights"]
    if "steps" in results:
        lines.append(f"- {results['steps']:,} steps")
    lines += [f"- {name}: {_with_rows(name, results)}" for name in results.get("arguments", {})]
    if set(results) >= MADE_WITH:
        lines.append(_made_with(results))
    return "\n".join(lines)


def _with_rows(name: str, results: dict) -> str:
    value, rows = results["arguments"][name], results.get("rows", {})
    return f"{value}, {rows[name]:,} rows" if name in rows else f"{value}"


def _data(texts: str, base: dict) -> str:
    """`texts`, then those of the base model under a heading of their own: one for each training that came before."""
    heading = f"### Before that: the texts of `{base.get('name')}`"
    if "data" not in base or heading in texts:
        return texts.strip()
    return f"{texts.strip()}\n\n{heading}\n\n{base['data']}"


def _undescribed(results: dict) -> str:
    files = [_with_rows(name, results) for name in ("train", "text") if name in results.get("arguments", {})]
    return (
        f"The texts of this training{f' ({files[0]})' if files else ''} are not described here. "
        "`examples/push_to_hub.py --data about.md` adds what they are and their licences."
    )
