# SPDX-License-Identifier: Apache-2.0
"""Static caches, and compiled and exported graphs, against the plain forward."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from .tiny import MIXERS, PATCHING, SHARING, TEXT, assert_equal, batch, ids_of, tiny_model


ROWS = [ids_of(TEXT), ids_of("A short one. "), ids_of("x"), ids_of("Ends mid wor"), [258, *ids_of("ab cd"), 258]]


def cases(*tables):
    return [pytest.param(options, id=name) for table in tables for name, options in table.items()]


def generate(model, inputs, **options):
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    return model.generate(**inputs, **(settings | options))


@pytest.mark.parametrize("options", cases(PATCHING, MIXERS, SHARING))
def test_a_static_cache_generates_the_same_bytes(options):
    model = tiny_model(use_cache=True, **options)
    inputs = batch(ROWS, "left")
    expected = generate(model, inputs)
    assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)
    beams = {"num_beams": 3, "max_new_tokens": 12}
    expected = generate(model, inputs, **beams)
    assert torch.equal(generate(model, inputs, cache_implementation="static", **beams), expected)


@torch.no_grad()
def test_chunks_and_turns_fill_a_static_cache_as_one_call_does():
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = model(**inputs).logits
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    parts = []
    for first in range(0, ids.shape[1], 13):
        end = min(first + 13, ids.shape[1])
        # The mask of everything so far, or of the new bytes alone.
        chunk_mask = mask[:, :end] if first % 2 else mask[:, first:end]
        out = model(ids[:, first:end], attention_mask=chunk_mask, cache=cache, use_cache=True)
        parts.append(out.logits)
    assert_equal(torch.cat(parts, 1)[mask == 1], expected[mask == 1])
    with pytest.raises(ValueError, match="1 more do not fit"):
        model(ids[:, :1], cache=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-3)
    cache.reset()
    again = model(ids[:1, -40:], cache=cache, use_cache=True).logits
    assert_equal(again, model(ids[:1, -40:]).logits)


def storage_bytes(cache) -> int:
    tensors = (value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@torch.no_grad()
def test_byte_layers_keep_no_more_than_their_window_of_a_prompt():
    # A view of what the prefill computed would keep all of it.
    model = tiny_model(**MIXERS["both"])
    sizes = []
    for num_bytes in (400, 800):
        cache = DynamicCache(config=model.config)
        model(torch.tensor([(ids_of(TEXT) * 5)[:num_bytes]]), cache=cache, use_cache=True)
        byte_slots = sum(
            t.untyped_storage().nbytes()
            for layer in cache.layers[:3]
            for t in (layer.keys, layer.values)
            if t is not None
        )
        pool = cache.layers[3]
        small = sum(state.untyped_storage().nbytes() for state in pool.state)
        sizes.append(byte_slots + small)
    assert sizes[0] == sizes[1]
    assert sizes[0] < 8 * (2 * 3 * 16 + 8 * 2 * 8 + 4 * 16 + 32)  # a few bytes of width 16


@torch.no_grad()
def test_a_decoding_step_compiles_into_one_graph_once():
    model = tiny_model(**MIXERS["both"])
    ids = torch.tensor([ids_of(TEXT)[:60], ids_of(TEXT)[20:80]])
    expected = model(ids).logits
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=64)
    parts = [model(ids[:, :30], cache=cache, use_cache=True).logits]
    parts += [step(ids[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(30, 60)]
    assert_equal(torch.cat(parts, 1), expected)
    assert len(graphs) == 1
    # Of a store that a scatter writes to, inductor makes a copy at every step.
    scattered = [node.meta["example_value"] for node in graphs[0].graph.nodes if "scatter" in str(node.target)]
    assert all(not states.is_floating_point() for states in scattered)


@torch.no_grad()
def test_a_prompt_without_a_patch_does_not_compile_the_step_twice():
    model, ids, graphs = tiny_model(), torch.tensor([ids_of("abcd and more")]), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=16)
    parts = [model(ids[:, :3], cache=cache, use_cache=True).logits]
    parts += [step(ids[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(3, ids.shape[1])]
    assert_equal(torch.cat(parts, 1), model(ids).logits)
    assert len(graphs) == 1


@pytest.mark.slow
@torch.no_grad()
def test_compiled_kernels_give_the_same_logits():
    model = tiny_model()
    ids = torch.tensor([ids_of(TEXT)[:60], ids_of(TEXT)[20:80]])
    expected = model(ids).logits
    assert_equal(torch.compile(model)(ids).logits, expected)
    step = torch.compile(model.forward, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=64)
    parts = [model(ids[:, :50], cache=cache, use_cache=True).logits]
    parts += [step(ids[:, t : t + 1], cache=cache, use_cache=True).logits for t in range(50, 60)]
    assert_equal(torch.cat(parts, 1), expected)


@torch.no_grad()
def test_attentions_of_a_second_chunk_have_the_keys_there_are():
    model = tiny_model(**MIXERS["both"])
    model.set_attn_implementation("eager")
    ids, mask = torch.tensor([ids_of(TEXT)[:12], ids_of(TEXT)[20:32]]), torch.ones(2, 4, dtype=torch.long)
    mask[1, :2] = 0
    found = []
    for chunk_mask in (mask, torch.cat([torch.ones(2, 8, dtype=torch.long), mask], 1)):
        cache = StaticCache(config=model.config, max_cache_len=12)
        model(ids[:, :8], cache=cache, use_cache=True)
        out = model(ids[:, 8:], attention_mask=chunk_mask, cache=cache, use_cache=True, output_attentions=True)
        found.append(out.attentions[0])
    assert found[0].shape[2:] == (4, 12) and torch.equal(found[0], found[1])
