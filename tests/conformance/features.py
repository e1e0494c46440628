# SPDX-License-Identifier: Apache-2.0
"""What users of the library expect of a model, as checks that see it from outside only.

Each takes a `Kit` and raises if the model does not do it. Models are tiny, with random weights.
"""

import tempfile
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CompileConfig,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.exporters import DynamoConfig, DynamoExporter, OnnxConfig, OnnxExporter

from tests.tiny import TEXT, assert_equal

from .kits import NUM_NEW, Kit


FEATURES: dict[str, tuple[str, Callable[[Kit], None]]] = {}
PROMPTS = [TEXT[:60], "A short one. ", "x", "Ends mid wor"]


class NotApplicable(Exception):
    """The question makes no sense for this family."""


def feature(title: str):
    def register(check: Callable[[Kit], None]):
        FEATURES[check.__name__] = (title, check)
        return check

    return register


def rows_of(kit: Kit) -> list[list[int]]:
    return [kit.ids(text) for text in PROMPTS]


def assert_uncached(kit: Kit, **options) -> None:
    """With `options` and a cache, the ids are those without a cache."""
    model = kit.model()
    inputs = kit.batch(rows_of(kit)[:1])
    found = []
    for use_cache in (False, True):
        set_seed(0)
        found.append(kit.generate(model, inputs, use_cache=use_cache, **options))
    assert torch.equal(*found), "other ids with a cache than without"


@feature("Greedy generation: cached = uncached")
def greedy(kit: Kit) -> None:
    assert_uncached(kit)


@feature("Sampling: cached = uncached")
def sampling(kit: Kit) -> None:
    assert_uncached(kit, do_sample=True, top_k=0)


@feature("Beam search: cached = uncached")
def beams(kit: Kit) -> None:
    assert_uncached(kit, num_beams=3)


@feature("Generation of padded rows = of each alone")
def batches(kit: Kit) -> None:
    model, rows = kit.model(), rows_of(kit)
    found = kit.generate(model, kit.batch(rows), use_cache=True)
    alone = [kit.generate(model, kit.batch([row]), use_cache=False) for row in rows]
    assert torch.equal(found, torch.cat(alone)), "other ids in a padded batch than alone"


@feature("Static cache = dynamic cache")
def static_cache(kit: Kit) -> None:
    model, inputs = kit.model(), kit.batch(rows_of(kit))
    expected = kit.generate(model, inputs)
    found = kit.generate(model, inputs, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected), "other ids with a static cache"


@feature("A decoding step is one graph (`torch.compile`, `fullgraph=True`)")
def compiled_step(kit: Kit) -> None:
    model, inputs = kit.model(), kit.batch(rows_of(kit)[:1])
    expected = kit.generate(model, inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = CompileConfig(backend="eager", fullgraph=True, mode=None)
    settings._compile_all_devices = True
    found = kit.generate(model, inputs, cache_implementation="static", compile_config=settings)
    assert torch.equal(found, expected), "other ids from the compiled step"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"


@feature("Assisted generation = greedy")
def assisted(kit: Kit) -> None:
    model, inputs = kit.model(), kit.batch(rows_of(kit)[:1])
    expected = kit.generate(model, inputs, use_cache=False)
    assert torch.equal(kit.generate(model, inputs, assistant_model=kit.model()), expected), "other ids"


@feature("Prompt lookup = greedy")
def prompt_lookup(kit: Kit) -> None:
    lookup = {"prompt_lookup_num_tokens": 4}
    model, inputs = kit.model(), kit.batch(rows_of(kit)[:1])
    expected = kit.generate(model, inputs, use_cache=False)
    assert torch.equal(kit.generate(model, inputs, **lookup), expected), "other ids"


@feature("Generation from `inputs_embeds` = from ids")
def embeddings(kit: Kit) -> None:
    model, inputs = kit.model(), kit.batch(rows_of(kit)[:1])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    found = kit.generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(found, kit.generate(model, inputs)), "other ids from embeddings"


@feature("Generation goes on from a returned cache")
def returned_cache(kit: Kit) -> None:
    if kit.is_encoder_decoder:
        raise NotApplicable("the prompt is in the encoder")
    model, inputs = kit.model(), kit.batch(rows_of(kit)[:1])
    expected = kit.generate(model, inputs, use_cache=False)
    first = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    rest = {"max_new_tokens": NUM_NEW - 5, "min_new_tokens": NUM_NEW - 5}
    goes_on = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    found = kit.generate(model, goes_on, cache=first.cache, **rest)
    assert torch.equal(found, expected), "other ids from a returned cache"


@feature("`stop_strings`")
def stop_strings(kit: Kit) -> None:
    model, inputs, tokenizer = kit.model(), kit.batch(rows_of(kit)[:1]), kit.tokenizer()
    free = kit.generate(model, inputs)[0]
    stop = next((chr(i) for i in range(33, 127) if chr(i) in tokenizer.decode(free)), None)
    assert stop, "the text has no character to stop at"
    found = model.generate(
        **inputs, do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=None, stop_strings=[stop], tokenizer=tokenizer
    )
    start = 1 if kit.is_encoder_decoder else inputs["input_ids"].shape[1]
    text = tokenizer.decode(found[0, start:])
    assert stop in text and len(found[0]) - start <= len(free), "did not stop"
    assert stop not in tokenizer.decode(found[0, start:-1]), "stopped late"


@feature("Continuous batching (`generate_batch`)")
def continuous_batching(kit: Kit) -> None:
    model, rows = kit.model(), rows_of(kit)
    settings = model.generation_config
    settings.max_new_tokens, settings.do_sample, settings.eos_token_id = 8, False, None
    found = model.generate_batch(rows, generation_config=settings)
    written = sorted(tuple(output.generated_tokens) for output in found.values())
    expected = [kit.generate(model, kit.batch([row]), max_new_tokens=8, min_new_tokens=8) for row in rows]
    assert written == sorted(tuple(ids[0, -8:].tolist()) for ids in expected), "other ids"


@feature("Logits do not depend on padding, left or right")
def padding(kit: Kit) -> None:
    model, rows = kit.model(), rows_of(kit)
    for side in ("left", "right"):
        for row, logits in zip(rows, kit.logits(model, rows, side)):
            assert_equal(logits, kit.logits(model, [row])[0])


@feature("Packed documents (`position_ids`) = each alone")
def packing(kit: Kit) -> None:
    if kit.is_encoder_decoder:
        raise NotApplicable("no position_ids")
    model, rows = kit.model(), rows_of(kit)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    with torch.no_grad():
        found = model(
            torch.tensor([[i for row in rows for i in row]]), position_ids=positions, use_cache=False
        ).logits[0]
    assert_equal(found, torch.cat([kit.logits(model, [row])[0] for row in rows]))


@feature("Eager attention = SDPA")
def attention_backends(kit: Kit) -> None:
    model, rows = kit.model(), rows_of(kit)[:1]
    found = []
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        found.append(torch.cat(kit.logits(model, rows)))
    assert_equal(*found)


@feature("Resized embeddings survive saving and loading")
def resizing(kit: Kit) -> None:
    model = kit.model()
    model.resize_token_embeddings(400)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    assert_equal(kit.logits(loaded, rows_of(kit))[0], kit.logits(model, rows_of(kit))[0])
    assert loaded.get_output_embeddings().weight.shape[0] == 400, "the head was not resized"


@feature("bfloat16")
def bfloat16(kit: Kit) -> None:
    model, rows = kit.model(), rows_of(kit)
    expected = kit.logits(model, rows)[0].log_softmax(-1)
    found = kit.logits(model.to(torch.bfloat16), rows)[0].float().log_softmax(-1)
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean(), "far from float32"


def assert_head(kit: Kit, auto_class, labels: Callable[[torch.Tensor], dict], choices: int = 0, **overrides) -> None:
    """Padded logits are those of a row alone, and the loss has gradients everywhere but in heads of other tasks."""
    model, rows = kit.model(auto_class, **overrides), rows_of(kit)
    inputs = kit.batch(rows, "right")
    if choices:
        inputs = {name: value.view(-1, choices, value.shape[-1]) for name, value in inputs.items()}
    outputs = model(**inputs, **labels(inputs["input_ids"]))
    outputs.loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0, "no gradient"
    names = [name for name in ("logits", "start_logits") if getattr(outputs, name, None) is not None]
    with torch.no_grad():
        for number, row in enumerate(rows):
            alone = kit.batch([row], "right")
            if choices:
                alone = {name: value[:, None] for name, value in alone.items()}
            expected = getattr(model(**alone), names[0])
            found = getattr(outputs, names[0])
            found = found.flatten()[number] if choices else found[number]
            if not choices and found.ndim and found.shape[0] == inputs["input_ids"].shape[1]:
                found = found[: len(row)]
            torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-4, rtol=1e-4)


@feature("Masked language model")
def masked_lm(kit: Kit) -> None:
    overrides = {"is_causal": False, "mask_token_id": 300} if kit.name == "STLM" else {}
    assert_head(kit, AutoModelForMaskedLM, lambda ids: {"labels": ids}, **overrides)


@feature("Sequence classification")
def sequence_classification(kit: Kit) -> None:
    assert_head(
        kit, AutoModelForSequenceClassification, lambda ids: {"labels": torch.zeros(len(ids), dtype=torch.long)}
    )


@feature("Token classification")
def token_classification(kit: Kit) -> None:
    assert_head(kit, AutoModelForTokenClassification, lambda ids: {"labels": torch.zeros_like(ids)})


@feature("Question answering")
def question_answering(kit: Kit) -> None:
    def labels(ids):
        first = torch.zeros(len(ids), dtype=torch.long)
        return {"start_positions": first, "end_positions": first}

    assert_head(kit, AutoModelForQuestionAnswering, labels)


@feature("Multiple choice")
def multiple_choice(kit: Kit) -> None:
    def labels(ids):
        return {"labels": torch.zeros(len(ids), dtype=torch.long)}

    assert_head(kit, AutoModelForMultipleChoice, labels, choices=2)


class Rows(Dataset):
    def __init__(self, kit: Kit):
        ids = (kit.ids(TEXT) * 3)[:160]
        self.rows = [torch.tensor(ids[i : i + 40]) for i in range(0, 160, 10) if i + 40 <= 160]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i].clone()}


def trained(kit: Kit, folder: str, model=None, resume: str | None = None, **options) -> Trainer:
    set_seed(0)
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True} | options
    trainer = Trainer(
        model=model or kit.model(), args=TrainingArguments(output_dir=folder, **settings), train_dataset=Rows(kit)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module, atol: float) -> None:
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters()):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@feature("`Trainer` learns, and resumes bit for bit")
def trainer_resumes(kit: Kit) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = trained(kit, folder, save_strategy="steps", save_steps=3)
        assert losses(whole)[-1] < losses(whole)[0], "the loss did not fall"
        again = trained(kit, folder, resume=f"{folder}/checkpoint-3")
        assert_same_weights(again.model, whole.model, atol=0)


@feature("Gradient accumulation is exact")
def accumulation(kit: Kit) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = {"optim": "sgd", "max_steps": 3, "train_sampling_strategy": "sequential"}
        whole = trained(kit, folder, **plain)
        parts = trained(kit, folder, **plain, per_device_train_batch_size=1, gradient_accumulation_steps=4)
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-4), "other losses"
        assert_same_weights(parts.model, whole.model, atol=1e-4)


@feature("Gradient checkpointing: same training")
def checkpointing(kit: Kit) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plain = trained(kit, folder, max_steps=3)
        saving = trained(kit, folder, max_steps=3, activation_checkpointing=True)
        assert losses(saving) == pytest.approx(losses(plain), rel=1e-5), "other losses"


@feature("LoRA on all linear layers trains and merges")
def lora(kit: Kit) -> None:
    base = kit.model()
    task = "SEQ_2_SEQ_LM" if kit.is_encoder_decoder else "CAUSAL_LM"
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type=task))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trained(kit, folder, model, max_steps=20)
    assert losses(trainer)[-1] < losses(trainer)[0], "the loss did not fall"
    model.eval()
    rows = rows_of(kit)
    expected = kit.logits(model, rows)[0]
    assert_equal(kit.logits(model.merge_and_unload(), rows)[0], expected)


@feature('`pipeline("text-generation")`: a batch = each alone')
def text_generation(kit: Kit) -> None:
    task = "text2text-generation" if kit.is_encoder_decoder else "text-generation"
    generator = pipeline(task, model=kit.model(), tokenizer=kit.tokenizer(), device="cpu")
    options = {"do_sample": False, "max_new_tokens": 12}
    found = [each[0]["generated_text"] for each in generator(PROMPTS, batch_size=4, **options)]
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in PROMPTS]
    assert found == alone, "other texts in a batch"


@feature("Any bytes come back from the tokenizer")
def any_bytes(kit: Kit) -> None:
    tokenizer = kit.tokenizer()
    for text in (TEXT, "\x00\t\r\n \u2019“€𝄞", "".join(map(chr, range(1, 256)))):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text, "another text"


@feature("Offsets of characters from the tokenizer")
def offsets(kit: Kit) -> None:
    text = "Zoë 東京 😀"
    found = kit.tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert {i for start, end in found for i in range(start, end)} == set(range(len(text))), "characters are missing"


@feature("`torch.export` with dynamic shapes")
def dynamo_export(kit: Kit) -> None:
    assert_exports(kit, DynamoExporter(), DynamoConfig(dynamic=True))


@feature("ONNX Runtime with dynamic shapes")
def onnx_export(kit: Kit) -> None:
    assert_exports(kit, OnnxExporter(), OnnxConfig(dynamic=True))


def assert_exports(kit: Kit, exporter, settings) -> None:
    model, rows = kit.model(use_cache=False), rows_of(kit)

    def inputs_of(rows):
        inputs = kit.batch(rows, "right")
        if kit.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[0, 40, 50, 60]]).expand(len(rows), -1).contiguous()
        return inputs

    graph = exporter.export(model, inputs_of(rows[:2]), settings)
    inputs = inputs_of(rows[1:])
    with torch.no_grad():
        found, expected = graph(**inputs).logits, model(**inputs).logits
    if not kit.is_encoder_decoder:
        found, expected = (logits[inputs["attention_mask"] == 1] for logits in (found, expected))
    assert_equal(found, expected)


@feature("int8 weights (torchao) in generation")
def int8_weights(kit: Kit) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, rows = kit.model(), rows_of(kit)[:1]
    expected = kit.logits(model, rows)[0].log_softmax(-1)
    quantize_(model, Int8WeightOnlyConfig())
    found = kit.logits(model, rows)[0].log_softmax(-1)
    assert 0 < (found - expected).abs().mean() < 0.1 * expected.abs().mean(), "far from float32, or not quantized"
    assert kit.generate(model, kit.batch(rows)).shape == (1, NUM_NEW)
