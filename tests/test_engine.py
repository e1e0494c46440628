# SPDX-License-Identifier: Apache-2.0
"""The engine against the model: logits, text, states, files."""

import argparse
import copy
import importlib
import platform
import shutil
import struct
import subprocess
import sys
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import (
    BaseStreamer,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from modeling_stlm import STLMTokenizer
from modeling_stlm.inference import engine as engine_module
from modeling_stlm.inference.engine import Engine, Rows
from modeling_stlm.inference.export import (
    CHECKSUM,
    SIZES,
    TYPES,
    dequantize,
    export_gguf,
    fingerprint,
    folder_or_hub_id,
    load_gguf,
    quantize,
)
from modeling_stlm.training.objectives import MultiByte, with_objectives

from .tiny import MIXERS, PATCHING, SHARING, TEXT, assert_equal, batch, ids_of, tiny_model


pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="the engine is compiled with cc"),
    pytest.mark.usefixtures("built"),
]

ROOT = Path(__file__).parents[1]
SHIPPED = [ROOT / "examples" / "checkpoints" / name for name in ("stlm-10m-wide", "stlm-3m")]
IDS = [*ids_of(TEXT), 258, 257, *ids_of(TEXT)[:70]]
ROWS = [IDS, ids_of("x"), ids_of("Zoë 東京 and more, "), IDS[5:70]]
PROMPTS = [bytes(ids_of(TEXT)[:40]), b"x", "Zoë 東京".encode(), b"aaaa bbbb aaaa"]
ON_X86 = platform.machine() in ("x86_64", "AMD64")
MODELS = {
    **{f"layers {name}": options for name, options in SHARING.items()},
    **{f"patches {name}": options for name, options in PATCHING.items() if options},
    **{f"mixers {name}": options for name, options in MIXERS.items() if options},
    "n-grams summed": {"ngram_embedding_size": None, "match_bytes": 3},
    "no tables": {"ngram_orders": [], "ngram_word_bytes": 0, "match_bytes": 0, "context_ngram_orders": []},
    "silu": {"hidden_act": "silu", "match_bytes": 6, "conv_kernel_size": 1},
    "relu": {"hidden_act": "relu", "match_bytes": 4, "trunk_head_dim": 18},
}


class Collector(BaseStreamer):
    def __init__(self):
        self.ids, self.has_ended = [], False

    def put(self, value):
        self.ids.append(value.flatten())

    def end(self):
        self.has_ended = True


def engine_of(model, tmp_path, type="f32", isa=None) -> Engine:
    export_gguf(model, tmp_path / "model.gguf", type)
    return Engine(tmp_path / "model.gguf", isa)


@pytest.fixture(scope="module")
def tiny(built, tmp_path_factory):
    model = tiny_model(use_cache=True)
    return model, engine_of(model, tmp_path_factory.mktemp("tiny"))


def isas() -> list[str]:
    """What this CPU has, the slowest first."""
    has_simd128 = platform.machine() in ("x86_64", "AMD64", "aarch64", "arm64")
    return ["scalar", "simd128", "avx2", "avx512"][: 1 + has_simd128 + ("avx2" in CPU) + ("avx512_vnni" in CPU)]


CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


# Logits


def step_logits(rows: Rows, ids: list[int]) -> np.ndarray:
    """Logits (T, V) after every id of a single row, one id a call."""
    logits = []
    for i in ids:
        rows.read([[i]])
        logits.append(rows.logits()[0])
    return np.stack(logits)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_forward_at_every_byte(name, tmp_path):
    model = tiny_model(**MODELS[name])
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    engine = engine_of(model, tmp_path)
    assert_equal(torch.from_numpy(step_logits(Rows(engine, 1), IDS)), expected)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_checkpoints_have_the_logits_of_forward(path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    text = (ROOT / "examples" / "data" / "shakespeare.txt").read_bytes()[:900]
    with torch.no_grad():
        expected = model(torch.tensor([list(text)])).logits[0]
    rows = Rows(engine_of(model, tmp_path), 1)
    exact = step_logits(rows, list(text))
    assert len(rows.patch_ends(0)) > 128  # more than one page of keys and values
    assert_equal(torch.from_numpy(exact), expected)
    # They were stored in bfloat16, so half the size loses nothing.
    assert np.array_equal(step_logits(Rows(engine_of(model, tmp_path, "bf16"), 1), list(text)), exact)
    # Rounding moves the distributions a little, and less the more bits there are.
    errors = {}
    for kind in ("q8", "q4_0"):
        rounded = torch.from_numpy(step_logits(Rows(engine_of(model, tmp_path, kind), 1), list(text)))
        errors[kind] = float((rounded - expected).norm() / expected.norm())
    assert 0 < errors["q8"] < 0.03 and errors["q8"] < errors["q4_0"] < 0.2, errors


@pytest.mark.parametrize("type", TYPES)
def test_rows_are_the_same_bits_alone_in_a_batch_in_pieces_and_on_every_cpu(type, tmp_path):
    model = tiny_model(
        **MIXERS["both"], **SHARING["middle"], trunk_hidden_size=64, ngram_embedding_size=32, hidden_size=96
    )
    export_gguf(model, tmp_path / "model.gguf", type)
    alone = step_logits(Rows(Engine(tmp_path / "model.gguf", "scalar"), 1), IDS)
    assert len(isas()) > 2 or not ON_X86, "an x86 CPU without AVX2"
    for isa in isas():
        engine = Engine(tmp_path / "model.gguf", isa)
        assert engine.isa == isa
        rows, random, at = Rows(engine, 7), np.random.default_rng(0), np.zeros(7, int)
        while (at < len(IDS)).any():
            counts = np.minimum(random.integers(0, 60, 7) * random.integers(0, 2, 7), len(IDS) - at)
            rows.read([IDS[a : a + c] for a, c in zip(at, counts)])
            at += counts
            if at.min() > 0:
                assert np.array_equal(rows.logits(), alone[at - 1])
    # More rows than are computed at once.
    rows = Rows(engine, 150)
    rows.read([IDS[: 1 + i] for i in range(150)])
    assert np.array_equal(rows.logits(), alone[:150])


@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-gcc") or not shutil.which("qemu-aarch64"),
    reason="no aarch64-linux-gnu-gcc and qemu-aarch64",
)
@pytest.mark.parametrize("isa", ["scalar", "simd128"])
def test_logits_on_arm64_are_the_same_bits(isa, tmp_path):
    source, program, path = ROOT / "modeling_stlm" / "inference", tmp_path / "logits", tmp_path / "model.gguf"
    command = ["aarch64-linux-gnu-gcc", "-std=c99", "-O3", "-ffp-contract=off", "-Wno-psabi", "-static", f"-I{source}"]
    command += [ROOT / "tests" / "logits_engine.c", source / "stlm.c", "-lm", "-o", program]
    subprocess.run(command, check=True)
    model = tiny_model(**MIXERS["both"], trunk_hidden_size=64, ngram_embedding_size=32, hidden_size=96)
    text = bytes(ids_of(TEXT))
    for type in TYPES:
        expected = step_logits(Rows(engine_of(model, tmp_path, type), 1), list(text))
        run = subprocess.run(["qemu-aarch64", program, path, isa], input=text, capture_output=True, check=True)
        assert np.array_equal(np.frombuffer(run.stdout, np.float32).reshape(expected.shape), expected), type


@pytest.mark.parametrize("name", PATCHING)
def test_patches_end_where_they_end_in_the_model(name, tmp_path):
    model = tiny_model(**PATCHING[name])
    with torch.no_grad():
        boundaries = model(torch.tensor([IDS]), output_boundaries=True).boundaries[0]
    rows = Rows(engine_of(model, tmp_path), 2)
    assert rows.patch_ends(0) == []
    rows.read([[], IDS[:30]])
    snapshot = rows.take(1)
    rows.read([IDS[:1], b"other text"])
    rows.rewind(snapshot, 1)
    rows.read([[], IDS[30:]])
    assert rows.patch_ends(1) == (boundaries.nonzero()[:, 0] + 1).tolist() and rows.patch_ends(1)


def test_an_instruction_set_that_is_not_there_is_refused_in_words(tiny):
    with pytest.raises(ValueError, match="no 'sparc'"):
        Engine(tiny[1].path, "sparc")


def test_scores_are_the_log_probabilities_of_forward(tiny):
    model, engine = tiny
    text = TEXT.encode()
    with torch.no_grad():
        expected = model(torch.tensor([[257, *text]])).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(1, torch.tensor(list(text))[:, None])[:, 0]
    assert_equal(torch.from_numpy(engine.score(text)), expected)
    rest = engine.score(text[50:], bytes([]) + text[:50])
    with torch.no_grad():
        logits = model(torch.tensor([list(text)])).logits[0].log_softmax(-1)
    assert_equal(torch.from_numpy(rest), logits[49:-1].gather(1, torch.tensor(list(text[50:]))[:, None])[:, 0])
    assert engine.score(b"").shape == (0,)
    with pytest.raises(ValueError, match="row 1 is empty"):
        Rows(engine, 2).score([[], [1]])


@pytest.mark.parametrize("letters", [b"ab", b"abcdefgh"])
def test_text_of_few_letters_is_matched_as_in_the_model(tiny, letters):
    model, engine = tiny
    # More grams than the first table has room for.
    text = bytes(np.random.default_rng(0).choice(list(letters), 2000).tolist())
    with torch.no_grad():
        expected = model(torch.tensor([list(text)])).logits[0]
    rows = Rows(engine, 1)
    for start in range(0, len(text), 50):
        snapshot = rows.take()
        rows.read([text[::-1][start : start + 70]])
        rows.rewind(snapshot)
        rows.read([text[start : start + 50]])
        assert_equal(torch.from_numpy(rows.logits()[0]), expected[start + 49])


# Text


def test_greedy_text_is_that_of_generate(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(SHIPPED[-1], dtype=torch.float32)
    engine = engine_of(model, tmp_path)
    rows = [list(b"The history of the"), list(b"x"), list("Zoë saw".encode()), list(b"Once upon a time there")]
    expected = model.generate(**batch(rows, "left"), max_new_tokens=100, do_sample=False)[:, 22:]
    found = engine.generate([bytes(row) for row in rows], max_new_tokens=100)
    for text, ids in zip(found, expected.tolist()):
        ids = ids[: ids.index(258)] if 258 in ids else ids
        assert text == bytes(i for i in ids if i < 256)
    assert b"".join(engine.stream(bytes(rows[0]), max_new_tokens=100)) == found[0]
    assert engine.generate(bytes(rows[0]).decode(), max_new_tokens=100) == found[0]
    assert engine.generate(b"x", max_new_tokens=0) == b"" and len(engine.generate("", max_new_tokens=9)) <= 9


def test_a_text_ends_where_the_model_ends_it(tiny, tmp_path):
    model = tiny[0]
    greedy = model.generate(torch.tensor([ids_of("x")]), max_new_tokens=30, do_sample=False, eos_token_id=None)[0, 1:]
    model.generation_config.eos_token_id = [int(greedy[12]), 258]
    engine = engine_of(model, tmp_path)
    model.generation_config.eos_token_id = 258
    first = greedy.tolist().index(int(greedy[12]))
    text = bytes(i for i in greedy[: first + 1].tolist() if i < 256)
    assert engine.generate(b"x", max_new_tokens=30) == text == b"".join(engine.stream(b"x", max_new_tokens=30))
    before = bytes(i for i in greedy[:first].tolist() if i < 256)
    assert engine.complete(b"x", 30).startswith(before) and len(engine.complete(b"x", 30)) <= len(before) + 1


def test_sampled_text_depends_on_the_seed_and_not_on_the_batch(tiny):
    _, engine = tiny
    options = {"max_new_tokens": 80, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    together = engine.generate(PROMPTS, seed=5, **options)
    assert together == [engine.generate(prompt, seed=5 + i, **options) for i, prompt in enumerate(PROMPTS)]
    assert together == [b"".join(engine.stream(prompt, seed=5 + i, **options)) for i, prompt in enumerate(PROMPTS)]
    assert together != engine.generate(PROMPTS, seed=6, **options)
    for option, value, words in (
        ("temperature", 0.0, "above 0 to sample"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_k", -1, "at least 0"),
        ("min_p", 2.0, "from 0 to 1"),
        ("repetition_penalty", 0, "above 0"),
    ):
        with pytest.raises(ValueError, match=f"{option}={value} is out of its range: expected a number {words}$"):
            engine.generate(b"x", do_sample=True, **{option: value})
    with pytest.raises(TypeError, match="top_q"):
        next(engine.stream(b"x", top_q=1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.3, "repetition_penalty": 1.5},
        {"top_k": 8, "top_p": 0.7, "temperature": 2.0},
        {"repetition_penalty": 4.0, "temperature": 2.0},
        {"top_p": 0.8, "min_p": 0.3, "temperature": 0.4},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.3, "temperature": 0.4},
    ],
    ids=str,
)
def test_ids_are_drawn_as_often_as_the_processors_of_the_library_say(tiny, options):
    _, engine = tiny
    count, text = 4000, IDS[:20]
    rows = Rows(engine, count)
    rows.read([text] * count)
    warpers = [
        RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0)),
        TemperatureLogitsWarper(options.get("temperature", 1.0)),
        *([TopKLogitsWarper(options["top_k"])] if "top_k" in options else []),
        *([TopPLogitsWarper(options["top_p"])] if "top_p" in options else []),
        *([MinPLogitsWarper(options["min_p"])] if "min_p" in options else []),
    ]
    scores = LogitsProcessorList(warpers)(torch.tensor([text]), torch.from_numpy(rows.logits()[:1]))
    expected = scores.softmax(-1)[0].numpy()
    samplings = [engine.sampling(do_sample=True, **options)] * count
    drawn = np.array(rows.write(samplings, range(count), bytearray(b"\1" * count), 1))[:, 0]
    found = np.bincount(drawn, minlength=engine.vocab_size) / count
    assert (found[expected == 0] == 0).all()
    # Six standard deviations: the seeds are fixed, so that this fails always or never.
    assert (np.abs(found - expected) <= 6 * np.sqrt(expected * (1 - expected) / count) + 1e-9).all()


# generate(custom_generate=engine)


def both(model, engine, rows, side="left", **options):
    """What `generate` returns without and with the engine."""
    options = {"max_new_tokens": 60, "do_sample": False, "eos_token_id": None} | options
    outputs = []
    for custom in ({}, {"custom_generate": engine}):
        torch.manual_seed(0)
        outputs.append(model.generate(**batch(rows, side), **options, **custom))
    return outputs


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 20, "repetition_penalty": 1.2}], ids=["greedy", "sample"]
)
def test_generate_with_the_engine_writes_what_it_writes_without(tiny, options):
    for rows in (ROWS, ROWS[1:2]):
        expected, found = both(*tiny, rows, **options)
        assert torch.equal(found, expected)
    expected, found = both(*tiny, ROWS, num_return_sequences=2, do_sample=True)
    assert torch.equal(found, expected)
    expected, found = both(*tiny, ROWS, side="right", **options)
    assert torch.equal(found, expected)


def test_generate_with_the_engine_stops_where_it_stops_without(tiny):
    model, engine = tiny
    text = both(model, engine, ROWS)[0][:, len(IDS) :]
    expected, found = both(model, engine, ROWS, eos_token_id=[int(text[0, 9]), int(text[2, 30])])
    assert torch.equal(found, expected)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED[0])
    printable = next(bytes([i]).decode() for i in text[3, 5:].tolist() if 32 < i < 127)
    expected, found = both(model, engine, ROWS[3:], stop_strings=[printable], tokenizer=tokenizer)
    assert torch.equal(found, expected) and found.shape[1] < len(ROWS[3]) + 60


def test_generate_with_the_engine_returns_scores(tiny):
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 0.7}
    expected, found = both(*tiny, ROWS, do_sample=True, **kept)
    assert torch.equal(found.sequences, expected.sequences) and len(found.scores) == len(found.logits) == 60
    for name in ("scores", "logits"):
        ours, theirs = torch.stack(found[name]), torch.stack(expected[name])
        assert torch.equal(ours.isinf(), theirs.isinf())
        assert_equal(ours.masked_fill(ours.isinf(), 0), theirs.masked_fill(theirs.isinf(), 0))


def test_generate_with_the_engine_feeds_a_streamer(tiny):
    model, engine = tiny
    streamer = Collector()
    options = {"max_new_tokens": 9, "do_sample": False}
    written = model.generate(torch.tensor(ROWS[3:]), custom_generate=engine, streamer=streamer, **options)
    assert torch.equal(torch.cat(streamer.ids), written[0]) and streamer.has_ended


def test_what_the_engine_cannot_do_is_refused_by_name(tiny, tmp_path):
    model, engine = tiny
    for options, name in (
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ):
        with pytest.raises(ValueError, match=name):
            model.generate(torch.tensor(ROWS[3:]), custom_generate=engine, **options)
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(torch.tensor(ROWS[3:]), custom_generate=engine, assistant_model=model)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(torch.tensor(ROWS[3:])), custom_generate=engine)
    cache = model(torch.tensor(ROWS[3:]), use_cache=True).cache
    with pytest.raises(ValueError, match="filled cache"):
        model.generate(torch.tensor([ROWS[3] + [1]]), cache=cache, custom_generate=engine)
    with pytest.raises(ValueError, match="other weights"):
        tiny_model(**PATCHING["fixed"]).generate(torch.tensor(ROWS[3:]), custom_generate=engine)
    with pytest.raises(ValueError, match="hidden_act"):
        export_gguf(tiny_model(hidden_act="gelu"), tmp_path / "model.gguf")
    with pytest.raises(
        ValueError, match=r"sharing_lora_rank=0, got 2\..* runs with `generate` only; for the engine, train one"
    ):
        export_gguf(tiny_model(**SHARING["cycle"], sharing_lora_rank=2), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        export_gguf(tiny_model(tie_word_embeddings=False), tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="type='int3'"):
        export_gguf(model, tmp_path / "model.gguf", "int3")
    assert not (tmp_path / "model.gguf").exists()


def test_eight_bits_have_the_name_of_llama_cpp_too(tmp_path):
    for type in ("q8", "q8_0"):
        export_gguf(tiny_model(), tmp_path / type, type)
    assert (tmp_path / "q8").read_bytes() == (tmp_path / "q8_0").read_bytes()


def test_weights_that_were_trained_since_are_noticed(tmp_path):
    model = tiny_model(use_cache=True)
    engine, ids = engine_of(model, tmp_path), torch.tensor(ROWS[3:])
    model.generate(ids, max_new_tokens=2, custom_generate=engine)
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match="other weights"):
        model.generate(ids, max_new_tokens=2, custom_generate=engine)


@pytest.mark.parametrize("type", TYPES)
def test_the_exported_model_and_the_model_of_the_file_are_accepted(type, tmp_path):
    model = tiny_model(use_cache=True)
    engine, ids = engine_of(model, tmp_path, type), torch.tensor(ROWS[3:])
    loaded, options = load_gguf(tmp_path / "model.gguf"), {"max_new_tokens": 30, "do_sample": False}
    written = loaded.generate(ids, custom_generate=engine, **options)
    assert torch.equal(model.generate(ids, custom_generate=engine, **options), written)
    if type in ("f32", "bf16"):  # the others round what goes into a matrix, too
        assert torch.equal(loaded.generate(ids, **options), written)
    with torch.no_grad():
        loaded.model.final_norm.weight[0] += 1e-6
    with pytest.raises(ValueError, match="other weights"):
        loaded.generate(ids, custom_generate=engine, **options)


# States


@pytest.mark.parametrize("name", ["layers none", "patches vocabulary", "patches learned", "mixers both"])
def test_a_row_that_is_rewound_goes_on_as_if_the_rest_had_never_been(name, tmp_path):
    engine, random = engine_of(tiny_model(**MODELS[name]), tmp_path), np.random.default_rng(0)
    rows, snapshots = Rows(engine, 2), []
    expected = step_logits(Rows(engine, 1), IDS)
    for i in IDS:
        snapshots.append(rows.take(1))
        rows.read([[], [i]])
    for _ in range(60):
        at = int(random.integers(0, rows.length(1) + 1))
        rows.rewind(snapshots[at], 1)
        other = random.integers(97, 99, 30).tolist()  # text that repeats itself, and that is taken back
        rows.read([[], other])
        rows.rewind(snapshots[at], 1)
        end = int(random.integers(at, len(IDS))) + 1
        rows.read([[], IDS[at:end]])
        rows.read([[1], []])
        assert np.array_equal(rows.logits()[1], expected[end - 1])


def test_a_snapshot_of_another_text_is_refused(tiny):
    rows = Rows(tiny[1], 1)
    start = rows.take()
    rows.read([b"abc"])
    snapshot = rows.take()
    rows.rewind(start)
    with pytest.raises(ValueError, match="3 bytes of the snapshot"):
        rows.rewind(snapshot)
    rows.read([b"abd"])
    with pytest.raises(ValueError, match="3 bytes of the snapshot"):
        rows.rewind(snapshot)
    rows.rewind(start)
    rows.read([b"abc and more"])
    rows.rewind(snapshot)
    assert rows.length(0) == 3


def test_completions_are_those_of_fresh_rows_whatever_is_typed(tiny):
    engine, random, text = tiny[1], np.random.default_rng(0), b""
    for _ in range(60):
        text = text[: max(0, len(text) - int(random.integers(0, 9)) * int(random.integers(0, 2)))]
        text += TEXT.encode()[len(text) :][: int(random.integers(0, 6))] if random.integers(0, 3) else b"ab"
        assert engine.complete(text, 5) == engine.generate(text, 5)


@pytest.mark.parametrize("most", [1, 30])
def test_the_states_that_completions_keep_are_bounded_in_bytes(most, tiny, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_SNAPSHOT_BYTES", most * tiny[1].snapshot_size + 5)
    engine, text = Engine(tiny[1].path), TEXT.encode() * 2
    for typed, n in enumerate(range(60, 110), 1):
        assert engine.complete(text[:n], 3) == tiny[1].generate(text[:n], 3)
        assert len(engine._typed[2]) == 1 + min(typed, most)  # the first is that of an empty row
    for n in [*range(110, 50, -7), 130, 0, 5]:
        assert engine.complete(text[:n], 3) == tiny[1].generate(text[:n], 3)
        assert len(engine._typed[2]) <= 1 + most


def test_numbers_of_numpy_and_of_64_bits_are_right_or_refused_in_words(tiny):
    engine = tiny[1]
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.5}
    expected = engine.generate(b"ab", 70, seed=3, **options)
    same = {"do_sample": np.bool_(True), "temperature": np.float64(0.7), "top_p": np.float32(0.5)}
    for top_k in (2**32, np.int64(2**33), np.uint8(0), engine.vocab_size):
        assert engine.generate(b"ab", np.int64(70), top_k=top_k, seed=np.int32(3), **same) == expected
    assert engine.generate(b"ab", 9, seed=-1, **options) == engine.generate(b"ab", 9, seed=2**64 - 1, **options)
    assert engine.complete(b"ab", np.int16(5)) == engine.generate(b"ab", 5) and engine.generate(b"ab", -1) == b""
    rows = Rows(engine, np.int64(2))
    rows.read([np.array([1, 2], np.int64), torch.tensor([1, 2])])
    rows.read([np.array([3], np.uint16), (3,)])
    assert np.array_equal(*rows.logits()) and rows.length(np.int8(1)) == 3
    for texts, words in (
        ([[1], [2**40]], "row 1: expected bytes or ids below 2\\*\\*31"),
        ([[1], np.array([0, 2**40])], "row 1: expected bytes or ids"),
        ([[1.0], [1]], "row 0: expected bytes or ids"),
        (["ab", [1]], "row 0: expected bytes or ids"),
        ([np.array([1.5]), [1]], "row 0: expected bytes or ids"),
        ([[[1]], [1]], "row 0: expected bytes or ids"),
        ([[1], [3, -1]], "id 1 of row 1 is -1, expected 0 to 319"),
    ):
        with pytest.raises(ValueError, match=words):
            rows.read(texts)
    assert [rows.length(0), rows.length(1)] == [3, 3]
    for num_rows in (2**32 + 1, 2**31, -1):
        with pytest.raises(ValueError, match="num_rows="):
            Rows(engine, num_rows)
    for name, value in (("temperature", float("nan")), ("top_p", np.float32("nan")), ("min_p", 1.5)):
        with pytest.raises(ValueError, match=f"{name}=.* is out of its range"):
            engine.generate(b"x", do_sample=True, **{name: value})
    with pytest.raises(TypeError):
        engine.generate(b"x", top_k=2.0)


def test_rows_on_several_threads_are_the_same_bits(tiny):
    engine, random = tiny[1], np.random.default_rng(0)
    for num_threads, num_rows in ((2, 5), (3, 7), (4, 2), (8, 1)):
        alone, shared = Rows(engine, num_rows), Rows(Engine(engine.path, num_threads=num_threads), num_rows)
        samplings = [engine.sampling(True, 0.5 + row / 4) for row in range(num_rows)]
        snapshots = []
        for call in range(12):
            texts = [IDS[: random.integers(0, 70)] or [1] for _ in range(num_rows)]
            for rows in (alone, shared):
                rows.read(texts)
            assert np.array_equal(alone.logits(), shared.logits())
            for ours, theirs in zip(alone.score(texts), shared.score(texts)):
                assert np.array_equal(ours, theirs)
            active, row = bytearray(random.integers(0, 2, num_rows).astype(np.uint8)), call % num_rows
            flags = [bytearray(active), bytearray(active)]
            written = [rows.write(samplings, range(num_rows), flag, 20) for rows, flag in zip((alone, shared), flags)]
            assert written[0] == written[1] and flags[0] == flags[1]
            snapshots.append((row, alone.take(row), shared.take(row)))
        for row, ours, theirs in snapshots[::-1]:
            alone.rewind(ours, row), shared.rewind(theirs, row)
            assert ours.length == theirs.length == shared.length(row)
        assert np.array_equal(alone.logits(), shared.logits())


def test_rows_on_several_threads_are_refused_as_on_one(tiny):
    rows = Rows(Engine(tiny[1].path, num_threads=2), 4)
    for call, words in (
        (lambda: rows.read([[1], [1], [1], [2, 320]]), "id 1 of row 3 is 320, expected 0 to 319"),
        (rows.logits, "row 0 is empty"),
        (lambda: rows.score([[], [], [], [1]]), "row 3 is empty"),
        (lambda: rows.write([tiny[1].sampling()] * 4, range(4), bytearray(b"\0\0\1\0"), 1), "row 2 is empty"),
        (
            lambda: rows.write([tiny[1].sampling()] * 4, [0], bytearray(b"\1" * 4), 1),
            "4 samplings, 1 seeds and 4 flags",
        ),
        (lambda: rows.write([tiny[1].sampling()], range(4), bytearray(b"\1" * 4), 1), "1 samplings, 4 seeds and 4"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert [rows.length(row) for row in range(4)] == [0] * 4
    rows.read([[1], [1], [1], [2]])
    with pytest.raises(ValueError, match="row 2 does not begin with the 1 bytes"):
        rows.rewind(rows.take(3), 2)
    for num_threads in (0, -1):
        with pytest.raises(ValueError, match=f"num_threads={num_threads}"):
            Engine(tiny[1].path, num_threads=num_threads)


def test_an_interrupt_waits_for_the_threads_and_they_keep_what_they_use(tiny):
    rows, done = Rows(Engine(tiny[1].path, num_threads=2), 2), []

    def call(part):
        if part.first == 0:
            raise KeyboardInterrupt
        time.sleep(0.3)
        done.append(part.first)
        return 0

    with pytest.raises(KeyboardInterrupt):
        rows._run(call)
    assert done == [1]
    # Nobody but the threads has the rows and the arrays.
    held = []

    class Pool:
        def submit(self, function, *arguments):
            held.append((function, *arguments))
            raise KeyboardInterrupt

    rows.read([b"a", b"b"])
    rows.engine._pool = Pool()
    with pytest.raises(KeyboardInterrupt):
        rows.logits()
    alive = weakref.ref(rows)
    del rows
    assert alive() is not None
    (_, call, _) = held.pop()
    assert any(isinstance(cell.cell_contents, np.ndarray) for cell in call.__closure__)


def test_wrong_calls_are_refused_in_words(tiny):
    rows = Rows(tiny[1], 2)
    with pytest.raises(ValueError, match="id 2 of row 1 is 320, expected 0 to 319"):
        rows.read([[1], [2, 3, 320]])
    assert rows.length(0) == 0
    assert tiny[1].generate(bytearray(b"ab"), 3) == tiny[1].generate("ab", 3)
    with pytest.raises(TypeError):
        tiny[1].generate([1, 2], 3)
    for call in (rows.logits, lambda: rows.read([[1]]), lambda: Rows(tiny[1], 0)):
        with pytest.raises(ValueError, match=r"empty|2 rows|at least 1"):
            call()
    with pytest.raises(IndexError, match="row 2 of 2"):
        rows.take(2)


# Files


@pytest.mark.parametrize("type", TYPES)
def test_a_file_becomes_a_model_again(type, tmp_path):
    model = tiny_model(**PATCHING["learned"], **SHARING["ffn"], hidden_size=32)
    export_gguf(model, tmp_path / "model.gguf", type)
    loaded = load_gguf(tmp_path / "model.gguf")
    assert loaded.config.to_dict() == model.config.to_dict()
    for (name, ours), theirs in zip(model.state_dict().items(), loaded.state_dict().values()):
        has_four_bits = type == "q4_0" and name.startswith(
            ("model.trunk.", "model.patcher.", "model.ngram_embedding.ngram_tables.")
        )
        tolerance = {"f32": 0, "bf16": 2**-8, "q8": 1 / 127, "q4_0": 1 / 7 if has_four_bits else 1 / 127}[type]
        largest = ours.abs().amax(-1, keepdim=True) if type[0] == "q" and ours.ndim == 2 else ours.abs()
        assert ((ours - theirs).abs() <= tolerance * largest).all(), name
    # What is rounded stays as it is.
    export_gguf(loaded, tmp_path / "again.gguf", "f32" if type == "q4_0" else type)
    assert load_gguf(tmp_path / "again.gguf").state_dict().keys() == model.state_dict().keys()


def changed(data: bytes, key: bytes, value: bytes, skip: int = 4) -> bytes:
    """A file with `value` at `skip` bytes after `key`, and a checksum that fits."""
    own = data.index(CHECKSUM) + len(CHECKSUM) + 4
    at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + skip
    new = data[:at] + value + data[at + len(value) :]
    new = new[:own] + bytes(4) + new[own + 4 :]
    return new[:own] + struct.pack("<I", zlib.adler32(new)) + new[own + 4 :]


def test_damaged_foreign_and_newer_files_are_refused_in_words(tiny, tmp_path):
    data, path = tiny[1].path.read_bytes(), tmp_path / "bad.gguf"

    def refusal(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"bad\.gguf") as python:
            load_gguf(path)
        with pytest.raises(ValueError, match=r"bad\.gguf") as c:
            Engine(path)
        assert str(python.value) and "\n" not in str(c.value)
        return str(c.value)

    random = np.random.default_rng(0)
    for size in [0, 3, 4, 20, *random.integers(24, len(data), 40).tolist()]:
        assert any(word in refusal(data[:size]) for word in ("truncated", "not a GGUF"))
    for place in random.integers(0, len(data), 60).tolist():
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(random.integers(8))
        refusal(bytes(flipped))
    assert "not a GGUF" in refusal(b"PK\x03\x04" + data[4:])
    assert "version 9 of GGUF" in refusal(data[:4] + struct.pack("<I", 9) + data[8:])

    assert "version 7 of the format" in refusal(changed(data, b"stlm.format_version", struct.pack("<I", 7)))
    path.write_bytes(changed(data, b"general.architecture", b"lama", 12))
    with pytest.raises(ValueError, match="architecture 'lama'"):
        Engine(path)
    path.write_bytes(changed(data, b"stlm.hidden_size", struct.pack("<I", 17)))
    with pytest.raises(ValueError, match="shape"):
        Engine(path)
    with pytest.raises(FileNotFoundError):
        Engine(tmp_path / "none.gguf")


def test_a_file_that_cannot_be_written_leaves_the_one_before(tiny, tmp_path):
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "model.gguf", resource.getrlimit(resource.RLIMIT_FSIZE)
    export_gguf(tiny[0], path, "q8")
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(OSError, match=r"requested and .* written"):
            export_gguf(tiny[0], path, "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (tmp_path / "link.gguf").symlink_to(path)
    export_gguf(tiny[0], tmp_path / "link.gguf", "f32")
    assert (tmp_path / "link.gguf").is_symlink() and path.stat().st_size > len(before)


def test_a_text_may_have_no_end(tmp_path):
    model = tiny_model(eos_token_id=None)
    engine = engine_of(model, tmp_path)
    assert engine.eos_token_ids == [] and len(engine.generate("x", 9)) <= 9
    assert load_gguf(tmp_path / "model.gguf").generation_config.eos_token_id is None


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.final_norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"^model\.final_norm\.weight is not finite: "):
        export_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_with_more_weights_than_its_configuration_says_is_refused(tmp_path):
    model = tiny_model(use_cache=True)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got a PeftModel: merge adapters first \(merge_and_unload\)"):
        export_gguf(wrapped, tmp_path / "model.gguf")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    words = r"unlike those of its configuration: model\.trunk\..*q_proj.*, and \d+ more: merge adapters first"
    with pytest.raises(ValueError, match=words):
        export_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"unlike those of its configuration: objectives\."):
        export_gguf(with_objectives(tiny_model(), [(MultiByte(2), 0.5)]), tmp_path / "model.gguf")
    export_gguf(wrapped.merge_and_unload(), tmp_path / "model.gguf")
    with torch.no_grad():
        logits = wrapped(torch.tensor([[257, *b"abc"]])).logits[0, :3].log_softmax(-1)
    expected = logits.gather(1, torch.tensor([*b"abc"])[:, None])[:, 0]
    assert_equal(torch.from_numpy(Engine(tmp_path / "model.gguf").score("abc")), expected)


# The first version whose engines know such a field, and a value that needs it.
FIRST_VERSION = {"match_doublings": (2, 1), "trunk_window_patches": (3, 1), "context_ngram_orders": (4, [2])}
WITHOUT = {"match_doublings": 0, "trunk_window_patches": None, "context_ngram_orders": []}


@pytest.mark.parametrize("field", FIRST_VERSION)
def test_files_of_before_a_field_are_read_as_they_were(field, tmp_path):
    model = tiny_model(**WITHOUT)
    export_gguf(model, tmp_path / "model.gguf", "f32")
    data = (tmp_path / "model.gguf").read_bytes()
    version = b"stlm.format_version" + struct.pack("<II", 4, 1)  # of type uint32: 1
    assert version in data
    without = data.replace(b"stlm." + field.encode(), b"what." + field.encode())
    assert (without != data) == (field != "context_ngram_orders")  # which is left out where there are none
    (tmp_path / "before.gguf").write_bytes(changed(without, b"stlm.format_version", struct.pack("<I", 1)))
    text = b"one two; a two, one two; one two; a two"
    now, before = (Engine(tmp_path / name).score(text) for name in ("model.gguf", "before.gguf"))
    assert (now == before).all()
    first_version, value = FIRST_VERSION[field]
    newer = tiny_model(**WITHOUT | {field: value})
    export_gguf(newer, tmp_path / "newer.gguf", "f32")  # an engine of before refuses it
    expected = b"stlm.format_version" + struct.pack("<II", 4, first_version)
    assert expected in (tmp_path / "newer.gguf").read_bytes()


def test_the_command_writes_a_file_that_runs(tmp_path):
    command = [
        sys.executable,
        "-m",
        "modeling_stlm.inference.export",
        SHIPPED[-1],
        tmp_path / "m.gguf",
        "--type",
        "q8",
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    file, size = tmp_path / "m.gguf", (tmp_path / "m.gguf").stat().st_size / 1e6
    assert printed == f'{file}: q8, {size:.1f} MB; next: stlm run {file} -p "The history of"\n'
    import gguf

    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.license"].contents() == "cc-by-sa-4.0"
    assert fields["tokenizer.ggml.tokens"].contents()[256:259] == ["<pad>", "<bos>", "<eos>"]
    assert (tmp_path / "m.gguf").stat().st_size < 1.2 * 2.97e6  # parameters
    engine = Engine(tmp_path / "m.gguf")
    assert engine.bos_token_id == 257 and engine.eos_token_ids == [258] and len(engine.generate(b"The ", 9)) == 9


def test_what_the_command_cannot_export_is_said_in_one_line(tmp_path):
    tiny_model(**SHARING["cycle"], sharing_lora_rank=2).save_pretrained(tmp_path / "lora")
    STLMTokenizer().save_pretrained(tmp_path / "lora")
    encoder = ROOT / "examples" / "checkpoints" / "stlm-3m-encoder"
    for folder, output, subject, words in (
        (encoder, "m.gguf", encoder, "is_causal=True, got that of an encoder"),
        (tmp_path / "lora", "m.gguf", tmp_path / "lora", "got 2"),
        (SHIPPED[-1], "no/m.gguf", tmp_path / "no" / "m.gguf cannot be written", f"no folder {tmp_path / 'no'}"),
    ):
        command = [sys.executable, "-m", "modeling_stlm.inference.export", folder, tmp_path / output]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        last = run.stderr.splitlines()[-1]
        assert run.returncode == 1 and run.stdout == "" and "Traceback" not in run.stderr
        assert last.startswith(f"{subject}: ") and words in last


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("stlm-4m", "no such folder"),
        ("examples/checkpoints/stlm-4m", "no such folder"),
        ("examples/checkpoints", "a folder without config.json"),
        ("README.md", "a file"),
        ("one/two/three", "no such folder"),
        ("../none", "no such folder"),
        ("owner/model", None),
        ("examples/checkpoints/stlm-3m", None),
    ],
)
def test_a_slip_of_the_pen_is_no_name_on_the_hub_here_and_in_the_examples(name, found, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "examples")
    for checked in (folder_or_hub_id, importlib.import_module("inputs").checkpoint):
        if found is None:
            assert checked(name) == name
        else:
            with pytest.raises(argparse.ArgumentTypeError) as refusal:
                checked(name)
            expected = "expected a folder with a checkpoint, or the name of one on the Hub (owner/name)"
            assert str(refusal.value) == f"{name} is {found}: {expected}"


@pytest.mark.parametrize("name", SIZES)
def test_sizes_out_of_bounds_are_refused_at_export_as_by_the_engine(name, tiny, tmp_path):
    lowest, highest = SIZES[name]
    model = tiny_model(**PATCHING["fixed"] if name == "patch_bytes" else {})
    for size in (highest + 1, lowest - 1) if lowest else (highest + 1,):
        bad = copy.deepcopy(model)
        vars(bad.config)[name] = size  # its own check refuses some
        with pytest.raises(ValueError, match=f"the engine takes {name} from {lowest} to {highest}, got {size}"):
            export_gguf(bad, tmp_path / "bad.gguf")
        # What the engine says of a file that has it all the same.
        export_gguf(model, tmp_path / "bad.gguf")
        value = struct.pack("<I", size)
        (tmp_path / "bad.gguf").write_bytes(
            changed((tmp_path / "bad.gguf").read_bytes(), f"stlm.{name}".encode(), value)
        )
        highest_here = {"num_key_value_heads": 2, "trunk_num_key_value_heads": 4, "bos_token_id": 319}.get(
            name, highest
        )
        with pytest.raises(ValueError, match=f"stlm.{name} is {size}, expected {lowest} to {highest_here}"):
            Engine(tmp_path / "bad.gguf")


def test_lists_out_of_bounds_are_refused_at_export(tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(65))
    with pytest.raises(ValueError, match="tokens that end a text from 0 to 64, got 65"):
        export_gguf(model, tmp_path / "bad.gguf")
    for options, words in (
        ({"ngram_orders": [2, 65]}, "the longest of ngram_orders from 0 to 64, got 65"),
        ({"ngram_orders": list(range(2, 18))}, "lengths of n-grams from 0 to 15, got 16"),
        (
            {"layer_sharing": "cycle", "num_trunk_layers": 1025, "num_unique_trunk_layers": 1},
            "from 1 to 1024, got 1025",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            export_gguf(tiny_model(**options), tmp_path / "bad.gguf")


def test_a_library_of_other_sources_is_refused(tiny, monkeypatch):
    header = (ROOT / "modeling_stlm" / "inference" / "stlm.h").read_text()
    assert f"STLM_VERSION = {engine_module.VERSION}," in header
    monkeypatch.setattr(engine_module, "VERSION", 99)
    with pytest.raises(ImportError, match=f"version {tiny[1]._library.stlm_version()} of the interface, expected 99"):
        Engine(tiny[1].path)


def test_without_a_library_the_engine_says_what_to_do(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_module, "FOLDER", tmp_path)
    with pytest.raises(ImportError, match="C compiler"):
        Engine(tiny[1].path)


def test_a_build_with_sanitizers_survives_mutated_files(tmp_path):
    files = [tmp_path / f"{i}.gguf" for i in range(3)]
    export_gguf(tiny_model(**PATCHING["vocabulary"]), files[0], "q8")
    export_gguf(tiny_model(**PATCHING["learned"], **MIXERS["both"]), files[1], "bf16")
    export_gguf(tiny_model(hidden_size=32, ngram_embedding_size=32, ngram_rows=4), files[2], "q4_0")
    flags = "-g -O1 -std=c99 -DWINDOW_BITS=9 -Wno-psabi -fno-sanitize-recover=all".split()
    flags.append("-fsanitize=address,undefined,float-cast-overflow")
    source = ROOT / "modeling_stlm" / "inference"
    sources = [f"-I{source}", ROOT / "tests" / "fuzz_engine.c", source / "stlm.c", source / "zip.c", "-lm"]
    program = tmp_path / "fuzz"
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    if subprocess.run(["cc", *flags, tmp_path / "empty.c", "-o", program], capture_output=True).returncode:
        pytest.skip("no sanitizers here")
    subprocess.run(["cc", *flags, *sources, "-o", program], check=True)
    run = subprocess.run([program, "600", "1", *files], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "600 files" in run.stdout and int(run.stdout.split()[2]) > 20


def test_completions_may_be_asked_for_by_several_threads(tiny):
    _, engine = tiny
    texts = [bytes(ids_of(TEXT)[:n]) for n in range(5, 45)]
    expected = [engine.generate(text, max_new_tokens=8) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: engine.complete(text, 8), texts * 3)) == expected * 3


def test_weights_that_were_reordered_are_noticed(tmp_path):
    model = tiny_model(use_cache=True)
    engine, ids = engine_of(model, tmp_path), torch.tensor(ROWS[3:])
    model.generate(ids, max_new_tokens=2, custom_generate=engine)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.flip(0))
    with pytest.raises(ValueError, match="other weights"):
        model.generate(ids, max_new_tokens=2, custom_generate=engine)


def test_the_engine_has_neither_dropout_nor_documents(tmp_path):
    model = tiny_model(hidden_dropout=0.5)
    engine, ids = engine_of(model, tmp_path), torch.tensor(ROWS[3:])
    with pytest.raises(ValueError, match=r"dropout \(call eval\(\)\)"):
        model.train().generate(ids, max_new_tokens=2, custom_generate=engine)
    positions = torch.arange(ids.shape[1])[None] % 7
    with pytest.raises(ValueError, match="position_ids restart"):
        model.eval().generate(ids, position_ids=positions, max_new_tokens=2, custom_generate=engine)


def test_a_loaded_model_ends_texts_where_the_file_does(tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [10, 258]
    engine = engine_of(model, tmp_path)
    assert engine.eos_token_ids == load_gguf(tmp_path / "model.gguf").generation_config.eos_token_id == [10, 258]


@pytest.mark.parametrize("type", ["f32", "bf16", "q8"])
@pytest.mark.parametrize("window", [1, 100, 128, 129, 200, 300])
@torch.no_grad()
def test_a_trunk_window_ends_within_and_at_pages_of_the_cache(window, type, tmp_path):
    """The engine keeps keys in pages of 128 patches, and reads from the page in which the window begins."""
    model = tiny_model(trunk_window_patches=window, patching="fixed", patch_bytes=2)
    ids = np.random.default_rng(0).integers(97, 123, 700).tolist()
    export_gguf(model, tmp_path / "model.gguf", type)
    found, model = Engine(tmp_path / "model.gguf").score(bytes(ids)), load_gguf(tmp_path / "model.gguf")
    expected = model(torch.tensor([[257, *ids]])).logits[0].log_softmax(-1)[:-1]
    expected = expected.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy()
    tolerance = 0.05 if type == "q8" else 1e-4  # its keys and values are bfloat16
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options", [{"rope_theta": 20.0}, {"norm_eps": 0.05}, {"hidden_act": "silu"}, {"trunk_window_patches": 3}], ids=str
)
def test_models_that_compute_otherwise_have_other_fingerprints(options):
    assert fingerprint(tiny_model(**options)) != fingerprint(tiny_model())


def test_quantized_weights_are_the_nearest():
    weights = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    numbers, scales = quantize(weights)
    assert (np.abs(dequantize(numbers, scales) - weights) <= 0.501 * scales[:, None]).all()
