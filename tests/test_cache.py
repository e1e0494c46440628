# SPDX-License-Identifier: Apache-2.0
"""The cache: whatever way bytes are fed, logits are those of one forward pass over the row alone."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, StaticCache

from modeling_stlm import STLMModel

from .test_model import ALL, ROWS, cases
from .tiny import (
    MIXERS,
    PATCHING,
    RTOL,
    SHARING,
    TEXT,
    assert_equal,
    batch,
    ids_of,
    randomize,
    tiny_config,
    tiny_model,
)


IDS = torch.tensor([ids_of(TEXT)])


def feed(model, input_ids, attention_mask=None, sizes=(1,), cache=None):
    """Logits of the pieces of `input_ids`, and the cache."""
    pieces, start = [], 0
    while start < input_ids.shape[1]:
        end = min(input_ids.shape[1], start + sizes[len(pieces) % len(sizes)])
        past = 0 if cache is None else cache.get_seq_length()
        mask = None if attention_mask is None else attention_mask[:, : past + end - start]
        out = model(input_ids[:, start:end], attention_mask=mask, cache=cache, use_cache=True)
        cache, start = out.cache, end
        pieces.append(out.logits)
    return torch.cat(pieces, 1), cache


@pytest.mark.parametrize("sizes", [(1,), (3,), (7, 1, 20)], ids=["steps", "threes", "mixed"])
@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_cached_logits_equal_full_forward_at_every_offset(options, sizes):
    model = tiny_model(**options)
    logits, cache = feed(model, IDS, sizes=sizes)
    assert_equal(logits, model(IDS, use_cache=False).logits)
    assert cache.get_seq_length() == IDS.shape[1]
    assert len(cache) == model.config.num_hidden_layers


@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_cached_logits_stay_within_the_rounding_of_bfloat16(options):
    model = tiny_model(**options).to(torch.bfloat16)
    logits, _ = feed(model, IDS, sizes=(11, 1))
    expected = model(IDS, use_cache=False).logits
    num_bytes = IDS.shape[1]
    if options.get("patching") == "learned":  # a decision near one half may fall the other way; what follows differs
        cache = DynamicCache(config=model.config)
        steps = [model.model(IDS[:, t : t + 1], cache=cache, output_boundaries=True) for t in range(num_bytes)]
        flips = (
            torch.cat([step.boundaries for step in steps], 1) != model.model(IDS, output_boundaries=True).boundaries
        )
        num_bytes = int(flips[0].long().argmax()) if flips.any() else num_bytes
        assert num_bytes > 20
    # Eight bits over a dozen layers, as for one pass against float32 (test_model.py); measured up to 0.064.
    assert (logits - expected)[:, :num_bytes].abs().max() <= 0.1 * expected.abs().max()


@torch.no_grad()
def test_a_cache_works_under_autocast():
    model = tiny_model(**MIXERS["both"])
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = feed(model, IDS, sizes=(30, 1))
        expected = model(IDS, use_cache=False).logits
    assert (logits - expected).abs().max() <= 0.06 * expected.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_ragged_rows_in_a_cache_equal_the_rows_alone(options, side):
    # Prompts of different lengths, padded on either side, then one byte at a time.
    model = tiny_model(**options)
    prompts = batch(ROWS, side)
    new = torch.tensor([ids_of(" and more, w")] * len(ROWS))
    ids = torch.cat([prompts["input_ids"], new], 1)
    mask = torch.cat([prompts["attention_mask"], torch.ones_like(new)], 1)
    num_prompt = prompts["input_ids"].shape[1]
    logits, _ = feed(model, ids, mask, sizes=(num_prompt, *[1] * new.shape[1]))
    for b, row in enumerate(ROWS):
        alone = model(torch.tensor([row + new[b].tolist()]), use_cache=False).logits[0]
        assert_equal(logits[b][mask[b] == 1], alone)


chunks = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(chunks, st.lists(st.integers(0, 40), min_size=1, max_size=4), st.sampled_from(sorted(PATCHING)), st.booleans())
@settings(max_examples=30)
@torch.no_grad()
def test_cropping_leaves_the_cache_of_the_shorter_text(sizes, crops, patching, recording):
    for options in (MIXERS["both"], SHARING["middle"]):
        model = tiny_model(**PATCHING[patching], **options)
        expected = model(IDS, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        if recording:
            cache.activate_past_recording()
        feed(model, IDS, sizes=sizes, cache=cache)
        for crop in crops:
            cache.crop(-(crop // 2))
            cache.crop(-(crop - crop // 2))
            kept = IDS.shape[1] - crop
            assert cache.get_seq_length() == kept
            if crop:
                logits, cache = feed(model, IDS[:, kept:], sizes=sizes, cache=cache)
                assert (logits - expected[:, kept:]).abs().max() <= RTOL * expected.abs().max()


@pytest.mark.parametrize("options", cases(PATCHING, MIXERS))
@torch.no_grad()
def test_recorded_bytes_are_taken_back_without_running_layers_again(options):
    model = tiny_model(**options)
    expected = model(IDS, use_cache=False).logits
    ids, cache, num_run = IDS.repeat(2, 1), DynamicCache(config=model.config), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: num_run.append(args[0].shape[1]))
    cache.activate_past_recording()
    model(ids[:, :20], cache=cache)
    at = 20
    for size in [5, 1, 7, 3, 1, 9] * 20:
        if at + size > ids.shape[1]:
            break
        num_run.clear()
        logits = model(ids[:, at : at + size], cache=cache).logits
        assert num_run == [size]
        assert_equal(logits[1:], expected[:, at : at + size])
        cache.crop(-(size // 4))
        cache.crop(-(size // 2 - size // 4))
        cache.reorder_cache(torch.tensor([1, 0]))
        at += size - size // 2
        assert cache.get_seq_length() == at
    assert at > 100


@torch.no_grad()
def test_cropping_to_soft_embeddings_is_refused():
    model = tiny_model()
    soft = torch.cat([torch.randn(1, 3, 16), model.get_input_embeddings()(IDS[:, :20])], 1)
    cache = model(inputs_embeds=soft, use_cache=True).cache
    cache.crop(-4)
    with pytest.raises(ValueError, match="cannot run the 19 bytes that crop left again"):
        model(IDS[:, 20:24], cache=cache)
    with pytest.raises(ValueError, match="cannot run the 19 bytes"):
        model(IDS[:, 20:24], cache=cache)


@torch.no_grad()
def test_cropping_ragged_rows_removes_positions_and_not_bytes():
    model = tiny_model(**MIXERS["both"])
    for side in ("left", "right"):
        prompts = batch(ROWS, side)
        ids, mask = prompts["input_ids"], prompts["attention_mask"]
        full, cache = feed(model, ids, mask, sizes=(ids.shape[1],))
        cache.crop(-20)
        again, _ = feed(model, ids[:, -20:], mask, sizes=(6, 3), cache=cache)
        valid = mask[:, -20:] == 1
        assert_equal(again[valid], full[:, -20:][valid])


@torch.no_grad()
def test_a_cache_can_be_cropped_to_nothing_and_reset():
    model = tiny_model()
    expected = model(IDS, use_cache=False).logits
    for empty in (lambda cache: cache.crop(-IDS.shape[1]), lambda cache: cache.reset()):
        _, cache = feed(model, IDS, sizes=(9,))
        empty(cache)
        assert cache.get_seq_length() == 0
        logits, _ = feed(model, IDS, sizes=(5,), cache=cache)
        assert_equal(logits, expected)


@torch.no_grad()
def test_rows_of_a_cache_can_be_reordered_repeated_and_selected():
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    new = torch.tensor([ids_of(" next wo")] * len(ROWS))
    ones = torch.ones_like(new)
    for rows, change in (
        ([2, 0, 0, 4, 1], lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0, 4, 1]))),
        ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], lambda cache: cache.batch_repeat_interleave(2)),
        ([3, 1], lambda cache: cache.batch_select_indices(torch.tensor([3, 1]))),
    ):
        for crop in (0, 4):
            _, cache = feed(model, inputs["input_ids"], inputs["attention_mask"], sizes=(11,))
            cache.crop(-crop)
            change(cache)
            kept = inputs["input_ids"].shape[1] - crop
            mask = torch.cat([inputs["attention_mask"][:, :kept], ones], 1)[rows]
            logits, _ = feed(model, new[rows], mask, sizes=(3,), cache=cache)
            for b, row in enumerate(rows):
                text = inputs["input_ids"][row, :kept][inputs["attention_mask"][row, :kept] == 1].tolist()
                alone = model(torch.tensor([text + new[row].tolist()]), use_cache=False).logits[0, -new.shape[1] :]
                assert_equal(logits[b], alone)


@torch.no_grad()
def test_the_trunk_runs_only_for_rows_whose_patch_is_complete():
    model = tiny_model(**SHARING["middle"])
    runs = []
    model.model.trunk.register_forward_hook(lambda module, inputs, output: runs.append(tuple(output.shape[:2])))
    texts = ["ab cd, ef", "abcdefghi", "a b c d e"]
    ids = torch.tensor([ids_of(text) for text in texts])
    boundary = model.model(ids, output_boundaries=True, use_cache=False).boundaries
    runs.clear()
    feed(model, ids)
    expected = [(int(rows), 1) for rows in boundary.sum(0) if rows]
    assert runs == expected, "one run at each step that completes a patch, with just the rows that complete one"
    assert sum(rows for rows, _ in runs) == boundary.sum() and len(runs) < ids.shape[1]

    runs.clear()
    feed(model, ids, sizes=(9,))
    assert runs == [(2, int(boundary.sum(1).max()))], "the row without any patch is left out of the prefill"


@torch.no_grad()
def test_memory_is_one_entry_a_patch_and_a_constant_for_bytes():
    model = tiny_model(**MIXERS["both"])
    boundary = model.model(IDS, output_boundaries=True, use_cache=False).boundaries
    _, cache = feed(model, IDS)
    num_patches = int(boundary.sum())
    config = model.config
    for slot, layer in enumerate(cache.layers):
        if slot < config.num_byte_layers:
            reach = config.conv_kernel_size if config.byte_mixers[slot] == "conv" else config.attention_window_bytes
            assert layer.keys.shape[1] == reach - 1
        elif slot > config.num_byte_layers:
            assert num_patches <= layer.keys.shape[2] <= max(16, 2 * num_patches)
            assert layer.get_seq_length() == num_patches


@torch.no_grad()
def test_a_cache_made_without_a_config_is_filled_in():
    model = tiny_model()
    cache = DynamicCache()
    logits, _ = feed(model, IDS, sizes=(50, 1), cache=cache)
    assert_equal(logits, model(IDS, use_cache=False).logits)


def test_training_makes_no_cache():
    model = tiny_model(use_cache=True).train()
    assert model(IDS).cache is model(IDS, use_cache=True).cache is None
    assert model.eval()(IDS).cache is not None


def test_foreign_caches_are_refused_in_words():
    model = tiny_model()
    llama = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=model.config.num_hidden_layers)
    with pytest.raises(ValueError, match="make it with DynamicCache"):
        model(IDS, cache=DynamicCache(config=llama))
    with pytest.raises(ValueError, match="make it with DynamicCache"):
        model(IDS, cache=DynamicCache(config=tiny_config(num_trunk_layers=3)))
    with pytest.raises(ValueError, match="the cache has slots"):
        model(torch.tensor([[65]]), cache=StaticCache(config=LlamaConfig(), max_cache_len=16))
    cache = model(IDS, use_cache=True).cache
    with pytest.raises(ValueError, match="holds 1 rows, but the input has 2"):
        model(IDS.expand(2, -1), cache=cache)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)
    with pytest.raises(ValueError, match=f"the cache holds {IDS.shape[1]}"):
        cache.crop(-1000)
    assert cache.get_seq_length() == IDS.shape[1], "a refused crop changes nothing"


def test_a_cache_in_a_graph_can_be_extended_and_differentiated():
    model = tiny_model()
    out = model(IDS[:, :20], use_cache=True)
    second = model(IDS[:, 20:40], cache=out.cache)
    third = model(IDS[:, 40:60], cache=second.cache)
    third.logits.sum().backward()
    gradient = model.model.patcher.patch_proj.weight.grad.clone()
    model.zero_grad()
    model(IDS[:, :60], use_cache=False).logits[:, 40:].sum().backward()
    torch.testing.assert_close(gradient, model.model.patcher.patch_proj.weight.grad, atol=1e-3, rtol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return output


@pytest.mark.parametrize("options", cases(PATCHING, MIXERS))
@torch.no_grad()
def test_memory_for_a_first_prompt_grows_with_its_length_and_not_faster(options):
    model, largest = tiny_model(**options), []
    for num_bytes in (2000, 4000):
        ids = torch.tensor([(IDS[0].tolist() * 30)[:num_bytes]])
        with LargestTensor() as tensors:
            model(ids, cache=DynamicCache(config=model.config), logits_to_keep=1)
        largest.append(tensors.size)
    assert largest[1] < 2.1 * largest[0]


@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_memory_grows_no_faster_than_a_text_with_a_window_of_the_trunk(is_causal):
    model, largest = randomize(STLMModel(tiny_config(is_causal=is_causal, trunk_window_patches=4))), []
    for num_bytes in (2000, 4000):
        ids = torch.tensor([(IDS[0].tolist() * 30)[:num_bytes]])
        cache = model(ids[:, :40], cache=DynamicCache(config=model.config)).cache if is_causal else None
        with LargestTensor() as tensors:
            out = model(ids, cache=cache)  # after 40 bytes, where there is a cache
        assert not is_causal or out.cache.get_seq_length() == 40 + num_bytes
        largest.append(tensors.size)
    assert largest[1] < 2.1 * largest[0]


@torch.no_grad()
def test_chunks_equal_one_pass_under_eager_attention_with_a_window_of_the_trunk():
    model = tiny_model(trunk_window_patches=3)
    model.set_attn_implementation("eager")
    ids, cache, logits = torch.tensor([IDS[0].tolist() * 2]), None, []
    for chunk in ids.split([40, 30, 1, ids.shape[1] - 71], dim=1):
        out = model(chunk, cache=cache, use_cache=True)
        cache = out.cache
        logits.append(out.logits)
    assert_equal(torch.cat(logits, dim=1), model(ids).logits)


@torch.no_grad()
def test_a_step_reads_the_window_of_the_trunk_alone():
    largest = []
    for num_bytes in (1000, 4000):
        model = tiny_model(trunk_window_patches=4)
        cache = model(torch.tensor([(IDS[0].tolist() * 30)[:num_bytes]]), use_cache=True).cache
        seen, attend = [], F.scaled_dot_product_attention

        def count(query, key, *args, seen=seen, attend=attend, **kwargs):
            seen.append(key.shape[2])
            return attend(query, key, *args, **kwargs)

        with mock.patch.object(F, "scaled_dot_product_attention", count):
            model(torch.tensor([ids_of("so ")]), cache=cache)
        largest.append(max(seen))
    assert largest == [4, 4]


def test_gradients_through_a_cache_of_ragged_rows_are_those_of_one_pass():
    inputs = batch([ids_of(TEXT)[:40], ids_of("A short one. And more"), ids_of("Ends mid wor")], "left")
    gradients = []
    for sizes in ((40,), (25, *[1] * 15), (9, 8)):
        model = tiny_model()
        logits, _ = feed(model, **inputs, sizes=sizes)
        valid = inputs["attention_mask"].bool()
        logits[valid].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            torch.testing.assert_close(
                other[name], expected, atol=1e-4 * float(expected.abs().max()), rtol=0, msg=name
            )


def interrupt(module, *args):
    raise KeyboardInterrupt


@pytest.mark.parametrize("part", ["trunk", "final_norm", "local_encoder"])
@torch.no_grad()
def test_an_interrupted_call_leaves_the_cache_as_it_was(part):
    model = tiny_model(**MIXERS["both"])
    module = getattr(model.model, part)
    module = module[1] if part == "local_encoder" else module
    expected = model(IDS, use_cache=False).logits
    cache = model(IDS[:, :30], use_cache=True).cache
    for crop in (0, 5):  # in a call, and in the replay after a crop
        cache.crop(-crop)
        start = 30 - crop
        handle = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, start:50], cache=cache)
        handle.remove()
        assert cache.get_seq_length() == start
        if crop:
            assert_equal(model(IDS[:, start:30], cache=cache).logits, expected[:, start:30])
    assert_equal(model(IDS[:, 30:50], cache=cache).logits, expected[:, 30:50])


@torch.no_grad()
def test_an_interrupted_static_cache_is_refused_until_it_is_reset():
    model = tiny_model()
    cache = StaticCache(config=model.config, max_cache_len=IDS.shape[1])
    model(IDS[:, :30], cache=cache)
    handle = model.model.trunk.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS[:, 30:40], cache=cache)
    handle.remove()
    with pytest.raises(ValueError, match="interrupted"):
        model(IDS[:, 30:40], cache=cache)
    cache.reset()
    assert_equal(model(IDS, cache=cache).logits, model(IDS, use_cache=False).logits)


def test_a_cache_goes_on_from_one_mode_of_autograd_in_another():
    model = tiny_model()
    expected = model(IDS, use_cache=False).logits
    with torch.inference_mode():
        cache = model(IDS[:, :30], use_cache=True).cache
    assert_equal(model(IDS[:, 30:50], cache=cache).logits, expected[:, 30:50])

    out = model(IDS[:, :30], use_cache=True, labels=IDS[:, :30])
    with torch.no_grad():
        model(IDS[:, 30:45], cache=out.cache)
    out.loss.backward()


def test_gradient_checkpointing_and_other_types_of_caches_are_refused():
    model = tiny_model().train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(IDS, labels=IDS, cache=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="cache is a tuple"):
        tiny_model()(IDS, cache=())


@pytest.mark.parametrize("options", cases(PATCHING))
@torch.no_grad()
def test_padded_rows_in_chunks_equal_the_rows_alone(options):
    # Some chunks are nothing but padding, before the first byte of a row and between two of its bytes.
    model = tiny_model(**options)
    inputs = batch(ROWS, "left")
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    mask[0, 20:35] = 0
    states, start, cache = [], 0, DynamicCache(config=model.config)
    while start < ids.shape[1]:
        end = min(start + 7, ids.shape[1])
        out = model.model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache)
        states.append(out.last_hidden_state)
        start = end
    states = torch.cat(states, 1)
    for b in range(len(ROWS)):
        valid = mask[b] == 1
        alone = model.model(ids[b][valid][None], use_cache=False).last_hidden_state[0]
        # At padding: that of the last valid byte before it, zero if there is none.
        expected = torch.cat([torch.zeros_like(alone[:1]), alone])[valid.cumsum(0)]
        assert_equal(states[b], expected)


@torch.no_grad()
def test_the_length_of_the_trunk_is_that_of_the_row_with_most_patches():
    model = tiny_model()
    ids = torch.tensor([ids_of("a b c d e f"), ids_of("abcdefghij ")])
    boundaries = model.model(ids, output_boundaries=True, use_cache=False).boundaries
    _, cache = feed(model, ids)
    assert boundaries[:, -1].tolist() == [False, True], "the row with fewer patches completes the last one"
    for layer in cache.layers[model.config.num_byte_layers + 1 :]:
        assert layer.get_seq_length() == boundaries.sum(1).max()


@torch.no_grad()
def test_a_whole_recorded_call_is_taken_back_without_running_layers_again():
    model, num_run = tiny_model(**MIXERS["both"]), []
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(IDS[:, :20], cache=cache)
    model(IDS[:, 20:27], cache=cache)
    cache.crop(-7)
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: num_run.append(args[0].shape[1]))
    logits = model(IDS[:, 20:30], cache=cache).logits
    assert num_run == [10]
    assert_equal(logits, model(IDS[:, :30], use_cache=False).logits[:, 20:])


@torch.no_grad()
def test_ragged_rows_of_a_cache_go_on_under_autocast():
    model = tiny_model(**MIXERS["both"])
    inputs, new = batch(ROWS, "left"), torch.tensor([ids_of(" and more, w")] * len(ROWS))
    ids = torch.cat([inputs["input_ids"], new], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, -new.shape[1] :]
    cache = model(**inputs, use_cache=True).cache
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = feed(model, new, mask, sizes=(1,), cache=cache)
    assert (logits - expected).abs().max() <= 0.06 * expected.abs().max()


@torch.no_grad()
def test_positions_are_not_read_after_a_filled_cache():
    model = tiny_model()
    cache = model(IDS[:, :20], use_cache=True).cache
    positions = torch.arange(10)[None] % 4
    logits = model(IDS[:, 20:30], position_ids=positions, cache=cache).logits
    assert_equal(logits, model(IDS[:, :30], use_cache=False).logits[:, 20:])


@torch.no_grad()
def test_the_loss_after_a_padded_history_counts_the_bytes_that_have_one_before():
    model = tiny_model()
    rows = [ids_of("a row that fills it"), ids_of("abc"), ids_of("seven b")]
    inputs = batch(rows, "left")
    history = 14  # padding alone in the second row, one of seven bytes in the third
    cache = model(
        inputs["input_ids"][:, :history], attention_mask=inputs["attention_mask"][:, :history], use_cache=True
    ).cache
    new = inputs["input_ids"][:, history:]
    loss = model(new, attention_mask=inputs["attention_mask"], cache=cache, labels=new).loss
    nats = []
    for row in rows:
        log_probs = model(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        first = max(1, len(row) - new.shape[1] + 1)  # shifting drops the first byte of a call
        nats += [-log_probs[t - 1, row[t]] for t in range(first, len(row))]
    assert len(nats) == 4 + 2 + 4
    torch.testing.assert_close(loss, torch.stack(nats).mean())


@torch.no_grad()
def test_slots_move_every_state_off_the_device_and_back():
    model = tiny_model(**MIXERS["both"])
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(IDS[:, :20], cache=cache)
    model(IDS[:, 20:30], cache=cache)
    for slot in cache.layers:
        slot.offload()
    assert_equal(model(IDS[:, 30:], cache=cache).logits, model(IDS, use_cache=False).logits[:, 30:])
    moved = 0
    for slot in cache.layers:
        if slot.is_initialized:  # the library prefetches those that have keys
            slot.device = torch.device("meta")
            slot.prefetch()
        else:
            slot._map_rows(lambda state: state.to("meta"))
        states = [state for state in tree_leaves(list(vars(slot).values())) if isinstance(state, torch.Tensor)]
        assert states and all(state.is_meta for state in states)
        moved += len(states)
    assert moved > 2 * len(cache.layers)


def test_packed_documents_in_a_cache_are_refused():
    model = tiny_model()
    positions = torch.arange(IDS.shape[1])[None] % 30
    with pytest.raises(ValueError, match="one document per row"):
        model(IDS, position_ids=positions, cache=DynamicCache(config=model.config))


def test_a_cache_of_inference_mode_goes_on_outside():
    model = tiny_model()
    with torch.inference_mode():
        cache = model(IDS[:, :3], use_cache=True).cache
    assert_equal(model(IDS[:, 3:8], cache=cache).logits, model(IDS[:, :8], use_cache=False).logits[:, 3:])
