# SPDX-License-Identifier: Apache-2.0
"""The forward pass without a cache: against the loop, and the promises of padding, packing and causality."""

import pytest
import torch

from modeling_stlm import STLMConfig, STLMForCausalLM, STLMForMaskedLM, STLMModel, layers_stlm

from . import reference
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


def cases(*tables):
    return [pytest.param(options, id=name) for table in tables for name, options in table.items()]


OTHERS = {
    "bigrams": {"ngram_orders": [2]},
    "no n-grams": {"ngram_orders": [], "ngram_word_bytes": 0},
    "no words": {"ngram_word_bytes": 0},
    "n-grams added up": {"ngram_embedding_size": None},
    "words shorter than n-grams": {"ngram_word_bytes": 3},
    "short words alone": {"ngram_orders": [], "ngram_word_bytes": 3},
    "no matches": {"match_bytes": 0},
    "long matches": {"match_bytes": 6},
    "the last match": {"match_doublings": 0},
    "no in-context n-grams": {"context_ngram_orders": []},
    "no lookups": {"context_ngram_orders": [], "match_bytes": 0},
    "longer in-context n-grams": {"context_ngram_orders": [2, 6, 4], "context_ngram_places": 1},
    "passes that differ": {**SHARING["middle"], "sharing_lora_rank": 2},
    "shared feed-forward layers that differ": {**SHARING["ffn"], "sharing_lora_rank": 3},
    "a narrow trunk window": {"trunk_window_patches": 1},
    "a wide trunk window": {"trunk_window_patches": 12},
    "other numbers": {"rope_theta": 20.0, "hidden_act": "silu", "norm_eps": 0.05, "conv_kernel_size": 7},
}
ALL = cases(PATCHING, MIXERS, SHARING, OTHERS)
ROWS = [ids_of(TEXT), ids_of("A short one. "), ids_of("x"), ids_of("Ends mid wor"), [258, *ids_of("ab cd"), 258]]


@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_logits_equal_the_slow_reference(options):
    model = tiny_model(**options)
    for ids in ROWS:
        assert_equal(model(torch.tensor([ids])).logits[0], reference.logits(model, ids))


@pytest.mark.parametrize("options", cases(PATCHING, MIXERS))
def test_future_bytes_do_not_change_past_logits(options):
    model = tiny_model(**options)
    ids = torch.tensor([ids_of(TEXT)])
    with torch.no_grad():
        before = model(ids).logits
        for t in range(0, ids.shape[1], 5):
            changed = ids.clone()
            changed[:, t:] = 32 if t % 2 else 120
            if t:
                assert_equal(model(changed).logits[:, :t], before[:, :t])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_a_padded_row_gives_the_logits_of_the_row_alone(options, side):
    model = tiny_model(**options)
    inputs = batch(ROWS, side)
    logits = model(**inputs).logits
    for b, ids in enumerate(ROWS):
        assert_equal(logits[b][inputs["attention_mask"][b] == 1], model(torch.tensor([ids])).logits[0])


@torch.no_grad()
def test_padding_in_the_middle_counts_for_nothing():
    model = tiny_model(**MIXERS["both"])
    ids = torch.tensor([ids_of(TEXT)])
    mask = torch.ones_like(ids)
    mask[:, 7:11] = mask[:, 30] = 0
    assert_equal(model(ids, attention_mask=mask).logits[mask == 1], model(ids[mask == 1][None]).logits[0])


@torch.no_grad()
def test_right_padding_without_a_mask_is_exact():
    # lm-evaluation-harness pads with zeros and passes no mask.
    model = tiny_model()
    ids = ids_of("a few words")
    padded = model(torch.tensor([ids + [0] * 9])).logits[:, : len(ids)]
    assert_equal(padded, model(torch.tensor([ids])).logits)


@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_packed_documents_give_the_logits_of_the_documents_apart(options):
    model = tiny_model(**options)
    ids = torch.tensor([[i for row in ROWS for i in row]])
    positions = torch.tensor([[t for row in ROWS for t in range(len(row))]])
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])
    for more in ({}, {"attention_mask": torch.ones_like(ids)}):
        assert_equal(model(ids, position_ids=positions, **more).logits[0], alone)
    # Padding may be anywhere, also inside a document.
    padded = torch.full((1, ids.shape[1] + 9), 256)
    valid = torch.ones_like(padded)
    valid[0, [0, 1, 5, 40, 41, 42, 90, -2, -1]] = 0
    padded[valid == 1], at = ids, torch.zeros_like(padded)
    at[valid == 1] = positions
    for fill in (0, 1):
        logits = model(padded, position_ids=at.masked_fill(valid == 0, fill), attention_mask=valid).logits
        assert_equal(logits[valid == 1], alone)


@pytest.mark.parametrize("options", cases(PATCHING, MIXERS))
@torch.no_grad()
def test_outputs_at_padding_are_those_of_the_last_valid_byte_before_it(options):
    model = tiny_model(**options)
    inputs = batch(ROWS, "left")
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((len(ROWS), 3), 256)], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.zeros(len(ROWS), 3, dtype=torch.long)], 1)
    logits = model(**inputs).logits
    for b, row in enumerate(ROWS):
        start = inputs["input_ids"].shape[1] - 3 - len(row)
        assert not logits[b, :start].any(), "before the first byte there is nothing"
        assert_equal(logits[b, start:], torch.cat([model(torch.tensor([row])).logits[0], logits[b, [-4] * 3]]))


def test_a_loss_over_left_padding_does_not_see_later_bytes():
    model = tiny_model()
    inputs = batch([ids_of("abc"), ids_of("a much longer row")], "left")
    labels, other = inputs["input_ids"].clone(), inputs["input_ids"].clone()
    other[0, -1] = ord("z")
    pad = inputs["attention_mask"][0] == 0
    logits = [model(ids, attention_mask=inputs["attention_mask"]).logits[0][pad] for ids in (labels, other)]
    assert torch.equal(*logits)


@torch.no_grad()
def test_the_documents_of_a_row_do_not_depend_on_the_padding_of_another():
    model = tiny_model()
    ids, positions = torch.tensor([ids_of(TEXT)[:40]] * 2), torch.arange(40).repeat(2, 1)
    positions[0, 20:] = torch.arange(5, 25)  # a document that does not start at zero
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    alone = model(ids[:1], position_ids=positions[:1]).logits
    assert_equal(model(ids, position_ids=positions, attention_mask=mask).logits[:1], alone)


@torch.no_grad()
def test_packed_documents_stay_within_the_rounding_of_autocast():
    for options in (MIXERS["both"], MIXERS["both"] | {"is_causal": False}):
        model = tiny_config(**options)
        model = randomize((STLMForCausalLM if model.is_causal else STLMForMaskedLM)(model))
        ids = torch.tensor([[i for row in ROWS for i in row]])
        positions = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
        expected = model(ids, position_ids=positions).logits
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, position_ids=positions).logits
        assert (logits - expected).abs().max() <= 0.06 * expected.abs().max()


@torch.no_grad()
def test_hidden_states_and_attentions_of_padded_rows_stand_at_their_bytes():
    model = tiny_model(**MIXERS["attention"]).model
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True, "output_boundaries": True}
    inputs = batch(ROWS, "left")
    padded = model(**inputs, **wanted)
    assert len(padded.hidden_states) == 4 and len(padded.attentions) == 3
    for b, ids in enumerate(ROWS):
        at = inputs["attention_mask"][b] == 1
        alone = model(torch.tensor([ids]), **wanted)
        assert torch.equal(padded.boundaries[b][at], alone.boundaries[0])
        assert not padded.boundaries[b][~at].any(), "padding is part of no patch"
        for ours, expected in zip(padded.hidden_states, alone.hidden_states, strict=True):
            assert_equal(ours[b][at], expected[0])
        for ours, expected in zip(padded.attentions, alone.attentions, strict=True):
            assert_equal(ours[b][:, at][:, :, at], expected[0])


def test_the_old_name_of_the_cache_may_be_set():
    output = tiny_model()(torch.tensor([ids_of("One")]), use_cache=True)
    cache = output.cache
    output.past_key_values = None
    assert output.cache is None
    output.past_key_values = cache
    assert output.cache is output["cache"] is cache


@pytest.mark.parametrize("window", [None, 3])
@torch.no_grad()
def test_patch_outputs_have_one_entry_a_patch(window):
    model = tiny_model(**SHARING["middle"], trunk_window_patches=window)
    model.set_attn_implementation("eager")
    ids = torch.tensor([ids_of(TEXT)])
    out = model(
        ids, output_boundaries=True, output_patch_hidden_states=True, output_patch_attentions=True, use_cache=False
    )
    num_patches = int(out.boundaries.sum())
    assert num_patches > 10
    assert [tuple(states.shape) for states in out.patch_hidden_states] == [(1, num_patches, 24)] * 5
    assert [tuple(weights.shape) for weights in out.patch_attentions] == [(1, 4, num_patches, num_patches)] * 5
    cached = model(ids, output_patch_attentions=True, use_cache=True)
    assert_equal(torch.stack(cached.patch_attentions), torch.stack(out.patch_attentions))
    seen = (torch.stack(out.patch_attentions) > 0).sum(-1)
    assert (seen == torch.arange(1, num_patches + 1).clamp(max=window or num_patches)).all()
    one = model(torch.tensor([ids_of("new ")]), output_patch_attentions=True, cache=cached.cache)
    assert [tuple(weights.shape) for weights in one.patch_attentions] == [(1, 4, 1, window or num_patches + 1)] * 5


@pytest.mark.parametrize("options", cases(MIXERS))
@torch.no_grad()
def test_eager_attention_agrees_with_sdpa(options):
    model = tiny_model(**options)
    inputs = batch(ROWS, "left")
    expected = model(**inputs).logits
    model.set_attn_implementation("eager")
    valid = inputs["attention_mask"] == 1
    assert_equal(model(**inputs).logits[valid], expected[valid])


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Patches of each call of `blockwise_attention`, whose blocks have five queries."""
    calls, blockwise_attention = [], layers_stlm.blockwise_attention
    monkeypatch.setattr(layers_stlm, "BLOCK_QUERIES", 5)

    def counted(query, *arguments):
        calls.append(query.shape[2])
        return blockwise_attention(query, *arguments)

    monkeypatch.setattr(layers_stlm, "blockwise_attention", counted)
    return calls


LONG = ids_of(TEXT * 2)
PACKED = {"input_ids": torch.tensor([LONG]), "position_ids": torch.tensor([[*range(70), *range(len(LONG) - 70)]])}
INPUTS = {"plain": {"input_ids": torch.tensor([LONG])}, "padded": batch([LONG, *ROWS], "left"), "packed": PACKED}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (True, 12), (False, None)])
@pytest.mark.parametrize("options", cases(MIXERS))
def test_blockwise_attention_has_the_gradients_of_eager_attention(
    options, is_causal, window, inputs, calls, monkeypatch
):
    monkeypatch.setattr(layers_stlm, "trains_in_bfloat16_on_cpu", lambda query, value: query.requires_grad)  # float32
    model = randomize(STLMModel(tiny_config(**{**options, "trunk_window_patches": window}, is_causal=is_causal)))
    valid, results = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) == 1, []
    for implementation in ("eager", "sdpa"):
        model.zero_grad()
        model.set_attn_implementation(implementation)
        output = model(**inputs).last_hidden_state[valid]
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({"output": output.detach(), **gradients})
        assert (len(calls) > 0) == (implementation == "sdpa")
    expected, got = results
    assert expected["trunk.attention_blocks.0.attention.k_proj.weight"].abs().max() > 0.01
    largest = float(max(values.abs().max() for values in expected.values()))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=RTOL * largest, rtol=0, msg=name)
    assert max(calls) > 2 * 5


@pytest.mark.parametrize("is_causal", [True, False])
def test_blockwise_attention_leaves_out_what_it_must_not_see(is_causal, monkeypatch):
    monkeypatch.setattr(layers_stlm, "BLOCK_QUERIES", 5)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 13, 8, generator=draw) for heads in (4, 2, 2))
    allowed = torch.rand(2, 1, 13, 13, generator=draw) > 0.3
    allowed |= torch.eye(13, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    key[:, :, 3] *= 1000  # the largest scores by far, for those who may see it
    arguments = {"attn_mask": allowed, "enable_gqa": True, "scale": 0.3}
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, **arguments)
    got = layers_stlm.blockwise_attention(query, key, value, allowed, is_causal, 0.3)
    assert_equal(got, expected.transpose(1, 2).flatten(2))
    value[:, :, 10:] = float("nan")
    is_number = layers_stlm.blockwise_attention(query, key, value, allowed, is_causal, 0.3).isfinite().all(-1)
    assert is_number[:, :10].all() == is_causal, "a block reads the keys after it"


@pytest.mark.parametrize("sharpness", [1, 3])
def test_blockwise_attention_in_bfloat16_stays_within_its_rounding(sharpness):
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(2, heads, 300, 16, generator=draw).bfloat16() for heads in (4, 2, 2)]
    states[0] *= sharpness
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        query, key, value = (each.to(dtype).requires_grad_() for each in states)
        if dtype == torch.bfloat16:
            output = layers_stlm.blockwise_attention(query, key, value, None, True, 0.25)
        else:
            arguments = {"is_causal": True, "enable_gqa": True, "scale": 0.25}
            output = torch.nn.functional.scaled_dot_product_attention(query, key, value, **arguments)
            output = output.transpose(1, 2).flatten(2)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        results.append([output, *torch.autograd.grad((output.double() * weights).sum(), (query, key, value))])
    for expected, got in zip(*results):
        assert (got.double() - expected).norm() < 0.01 * sharpness**0.5 * expected.norm()


def test_attention_is_blockwise_where_the_trunk_trains_in_bfloat16(calls, monkeypatch):
    model, ids = tiny_model(trunk_window_patches=None, **MIXERS["attention"]), PACKED["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    model(ids)
    assert not calls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
        assert len(calls) == model.config.num_trunk_layers  # and not the byte layers
        (num_patches,) = set(calls)
        monkeypatch.setattr(layers_stlm, "MAX_BLOCKWISE_PATCHES", num_patches - 1)
        model(ids)
        assert len(calls) == model.config.num_trunk_layers
    monkeypatch.setattr(layers_stlm, "MAX_BLOCKWISE_PATCHES", num_patches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    assert len(calls) == 2 * model.config.num_trunk_layers


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_draws_dropout_once_in_bfloat16(use_reentrant, calls):
    model = tiny_model(attention_dropout=0.3, hidden_dropout=0.3, trunk_window_patches=None).train()

    def gradients():
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**PACKED, labels=PACKED["input_ids"]).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_one_query_a_head_attends_as_eager_attention_does(num_key_value_heads):
    model = tiny_model(trunk_num_key_value_heads=num_key_value_heads)
    attention, torch_generator = model.model.trunk.attention_blocks[0].attention, torch.Generator().manual_seed(0)
    shapes = (3, 4, 1), (3, num_key_value_heads, 9), (3, num_key_value_heads, 9)
    states = [
        torch.randn(*shape, attention.head_dim, generator=torch_generator, requires_grad=True) for shape in shapes
    ]
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        output, _ = attention.attend(*states, None)
        assert output.shape == (3, 1, 4 * attention.head_dim)
        weights = torch.arange(1.0, output.numel() + 1).reshape(output.shape)
        results.append((output, *torch.autograd.grad((output * weights).sum(), states)))
    for expected, got in zip(*results):
        assert_equal(got, expected)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_attention_without_masks_is_refused(implementation):
    with pytest.raises((ValueError, ImportError), match=r"(?i)flex|flash"):
        STLMForCausalLM._from_config(tiny_config(), attn_implementation=implementation)


@pytest.mark.parametrize("options", cases(MIXERS, SHARING))
def test_gradient_checkpointing_changes_no_gradient(options):
    model = tiny_model(**options).train()
    ids = torch.tensor([ids_of(TEXT)])

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.activation_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
        assert gradient.abs().sum() > 0, f"{name} gets no gradient"


def test_every_parameter_has_a_gradient_without_any_patch():
    # Distributed training hangs if a rank whose batch completes no patch leaves the trunk out.
    model = STLMForCausalLM(tiny_config()).train()
    ids = torch.tensor([ids_of("word")])
    model(ids, labels=ids).loss.backward()
    assert not model.model(ids, output_boundaries=True).boundaries.any()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_embeddings_of_bytes_give_the_logits_of_the_bytes():
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    expected = model(**inputs).logits
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    valid = inputs["attention_mask"] == 1
    assert_equal(model(inputs_embeds=embeds, **inputs).logits[valid], expected[valid])
    # An embedding of no byte is part of a word, with the n-grams of a missing byte.
    soft = torch.randn_like(embeds)
    assert torch.isfinite(model(inputs_embeds=soft, **inputs).logits).all()


@torch.no_grad()
def test_logits_to_keep_gives_the_last_logits():
    model = tiny_model()
    ids = torch.tensor([ids_of(TEXT)])
    full = model(ids).logits
    assert_equal(model(ids, logits_to_keep=3).logits, full[:, -3:])
    assert_equal(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, full[:, [1, 5]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_stays_within_its_rounding(dtype):
    model = tiny_model()
    ids = torch.tensor([ids_of(TEXT)])
    expected = model(ids).logits
    halved = model.to(dtype)(ids).logits
    assert halved.dtype == dtype
    # Eight (bfloat16) or eleven bits, over a dozen layers; measured 0.05 and 0.007 of the largest logit.
    bound = {torch.bfloat16: 0.1, torch.float16: 0.015}[dtype]
    assert (halved.float() - expected).abs().max() < bound * expected.abs().max()


def test_added_tokens_get_embeddings_and_leave_old_logits_alone():
    model = tiny_model()
    ids = torch.tensor([ids_of(TEXT)])
    expected = model(ids).logits
    model.resize_token_embeddings(330)
    logits = model(ids).logits
    assert logits.shape[-1] == 330 and torch.equal(logits[..., :320], expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.isfinite(model(torch.tensor([[65, 329, 66]])).logits).all()


@pytest.mark.parametrize("options", cases(SHARING))
def test_shared_layers_are_one_module_and_the_budget_adds_up(options):
    model = tiny_model(**options)
    config, budget = model.config, model.parameter_budget()
    assert len(model.model.trunk.feed_forward_blocks) == config.num_unique_trunk_layers
    assert len(config.trunk_schedule) == config.num_trunk_layers
    assert sum(count for name, count in budget["stored"].items() if name != "total") == model.num_parameters()
    if options:
        assert budget["effective"]["trunk"] > budget["stored"]["trunk"]
    else:
        assert budget["effective"]["trunk"] == budget["stored"]["trunk"]
    assert len(set(map(id, model.parameters()))) == len(model.state_dict()) - 1  # only the head is there twice


@pytest.mark.parametrize(
    "changes", cases({"preset": {}, "learned": PATCHING["learned"], "own": OTHERS["passes that differ"]})
)
def test_flops_per_byte_equal_the_count_of_the_profiler(changes):
    model = STLMForCausalLM(STLMConfig.from_preset("stlm-3m", **changes)).eval()
    ids = torch.tensor([ids_of(TEXT * 4)])
    with torch.no_grad():
        boundaries = model.model(ids, output_boundaries=True, use_cache=False).boundaries
        with torch.profiler.profile(with_flops=True) as profile:
            model(ids, use_cache=False)
    # The profiler counts mm and convolutions, not fused attention; it counts elementwise products too.
    counted = sum(event.flops for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    patch = ids.shape[1] / boundaries.sum().item()
    config = model.config
    attention = 4 * ids.shape[1] / patch / 2 * config.trunk_num_attention_heads * config.trunk_head_dim
    conv = 2 * config.conv_kernel_size * config.hidden_size * config.num_byte_layers
    ours = model.flops_per_byte(patch, ids.shape[1]) - config.num_trunk_layers * attention / patch - conv
    assert ours == pytest.approx(counted / ids.shape[1], rel=0.01)


@pytest.mark.parametrize("window", [None, 30, 60, 200])
@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_of_attention_are_those_of_the_pairs_that_attend(is_causal, window):
    options = {"is_causal": is_causal, "attn_implementation": "eager", "intermediate_size": 8}
    options["trunk_window_patches"] = window
    model = randomize(STLMModel(tiny_config(**options, **MIXERS["attention"])))
    config, ids = model.config, torch.tensor([ids_of(TEXT * 4)])
    with torch.no_grad(), torch.profiler.profile(with_flops=True) as profile:
        outputs = model(
            ids, use_cache=False, output_attentions=True, output_patch_attentions=True, output_boundaries=True
        )
    counted = sum(event.flops for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    pairs, patch_pairs = (
        sum((weights > 0).sum().item() for weights in layers)
        for layers in (outputs.attentions, outputs.patch_attentions)
    )
    attention = 4 * (pairs * config.head_dim + patch_pairs * config.trunk_head_dim)
    assert attention > counted / 5
    patch = ids.shape[1] / outputs.boundaries.sum().item()
    expected = (counted + attention) / ids.shape[1]
    assert model.flops_per_byte(patch, ids.shape[1]) == pytest.approx(expected, rel=0.01)


PRESET_SIZES = {
    "stlm-3m": 2_996_992,
    "stlm-10m": 9_919_424,
    "stlm-10m-wide": 9_899_328,
    "stlm-50m": 49_179_328,
    "stlm-100m": 98_421_120,
}


@pytest.mark.parametrize("name", PRESET_SIZES)
def test_presets_are_up_to_two_percent_below_their_name(name):
    with torch.device("meta"):
        model = STLMForCausalLM(STLMConfig.from_preset(name))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    size = int(name.removeprefix("stlm-").removesuffix("-wide").removesuffix("m")) * 1_000_000
    assert model.num_parameters() == PRESET_SIZES[name]
    assert 0.98 * size <= PRESET_SIZES[name] <= size


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one of each"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "at least one of each"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 5)}, r"expected \(1, 4\)"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 1, 4, 4)}, "more axes"),
        (
            {"input_ids": torch.zeros(1, 4, dtype=torch.long), "position_ids": torch.zeros(1, 3)},
            "position_ids has shape",
        ),
    ],
)
def test_wrong_inputs_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)


def test_ids_are_known_by_their_embeddings_under_autocast_and_after_resizing():
    model = tiny_model(hidden_size=64)
    model.resize_token_embeddings(384)  # new rows lie closer to each other than distances in float32 tell apart
    ids = torch.tensor([[260, *ids_of("user Zoë 東京"), 330, *ids_of("a word "), 340, *range(300, 384)]])
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.model._ids_of(embeds), ids)
    assert_equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
        assert torch.equal(model.model._ids_of(embeds), ids)


@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "with a new head"])
def test_fresh_weights_are_those_of_the_table(loaded, tmp_path):
    config = tiny_config(
        hidden_size=64,
        trunk_hidden_size=96,
        patching="learned",
        ngram_rows=512,
        **MIXERS["both"],
    )
    model = STLMForCausalLM(config)
    if loaded:  # of a checkpoint without the trunk
        weights = {name: weight for name, weight in model.state_dict().items() if "trunk" not in name}
        model.save_pretrained(tmp_path, state_dict=weights)
        model = STLMForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            assert not weight.any(), name
        elif "rule" in name:
            assert torch.equal(weight, torch.eye(64)), name
        elif "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            tables = ("embed_tokens.weight", "ngram_tables.weight", "following.weight", "length.weight")
            small = name.endswith((*tables, "start.weight", "conv.weight"))
            expected = 0.02 if small else weight.shape[1] ** -0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.3 if weight.numel() < 512 else 0.1), name


@torch.no_grad()
def test_a_document_starts_wherever_positions_do_not_go_on():
    # The rest of a document that was cut starts at any number.
    model = tiny_model(**MIXERS["both"])
    ids = torch.tensor([[i for row in ROWS for i in row]])
    positions = torch.cat([torch.arange(len(row)) + 7 * number for number, row in enumerate(ROWS)])[None]
    alone = torch.cat([model(torch.tensor([row])).logits[0] for row in ROWS])
    assert_equal(model(ids, position_ids=positions).logits[0], alone)


@torch.no_grad()
def test_attentions_to_and_from_padding_are_zero():
    model = tiny_model(**MIXERS["attention"]).model
    model.set_attn_implementation("eager")
    inputs = batch(ROWS, "left")
    for weights in model(**inputs, output_attentions=True).attentions:
        for row, mask in zip(weights, inputs["attention_mask"]):
            assert not row[:, mask == 0].any() and not row[:, :, mask == 0].any()
            torch.testing.assert_close(row[:, mask == 1].sum(-1), torch.ones(2, int(mask.sum())))


@torch.no_grad()
def test_the_last_hidden_states_are_the_last_hidden_state_on_either_side():
    model = tiny_model().model
    for side in ("left", "right"):
        inputs = batch(ROWS, side)
        out = model(**inputs, output_hidden_states=True)
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        for b, ids in enumerate(ROWS):
            if side == "right":
                assert (out.last_hidden_state[b, len(ids) :] == out.last_hidden_state[b, len(ids) - 1]).all()


def test_training_weights_in_bfloat16_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr("modeling_stlm.modeling_stlm.logger.warning_once", said.append)
    ids = torch.tensor([ids_of(TEXT)])
    tiny_model().train()(ids)
    model = tiny_model().to(torch.bfloat16)
    model(ids)
    with torch.no_grad():
        model.train()(ids)
    model.requires_grad_(False)(ids)
    assert not said, "no weight moves, or none is in bfloat16"
    model.requires_grad_(True)(ids)
    assert len(said) == 1 and "dtype=torch.float32" in said[0]


@torch.no_grad()
def test_patches_that_the_router_did_not_end_are_taken_whole():
    model = tiny_model(patching="learned", patch_bytes=2, max_patch_bytes=3)
    for ids in (ROWS[0], [byte for pair in zip(ROWS[0], [258] * 60) for byte in pair]):
        assert_equal(model(torch.tensor([ids])).logits[0], reference.logits(model, ids))


@pytest.mark.parametrize("options", [{}, MIXERS["attention"]])
def test_dropout_of_attention_acts_in_training_alone(options):
    model, ids = tiny_model(attention_dropout=0.5, **options), torch.tensor([ids_of(TEXT)])
    plain = tiny_model(**options)(ids).logits
    assert torch.equal(model(ids).logits, plain)
    assert not torch.allclose(model.train()(ids).logits, plain)


@torch.no_grad()
def test_a_dropout_of_everything_leaves_the_residual_stream():
    model = tiny_model(**MIXERS["both"])
    model.train()
    kinds = set()

    def is_the_identity(module, args, output):
        kinds.add(type(module).__name__)
        assert torch.equal(output, args[0])

    for module in model.modules():
        if "dropout" in vars(module):
            module.dropout = 1.0
            module.register_forward_hook(is_the_identity)
    model(torch.tensor([ids_of(TEXT)]))
    assert kinds == {"STLMByteLayer", "STLMTrunkAttentionBlock", "STLMTrunkFeedForwardBlock"}


def test_fresh_embeddings_convolutions_and_the_start_have_the_spread_of_the_config():
    weights = []
    for spread in (0.02, 0.2):
        torch.manual_seed(0)
        weights.append(dict(STLMForCausalLM(tiny_config(initializer_range=spread)).named_parameters()))
    narrow, wide = weights
    spread = {name for name, weight in narrow.items() if not torch.equal(weight, wide[name])}
    ends = ("embed_tokens", "ngram_tables", "following", "length", "conv", "start")
    assert spread == {name for name in narrow if name.removesuffix(".weight").endswith(ends)}
    for name in spread:
        torch.testing.assert_close(10 * narrow[name], wide[name])
        assert 0.01 < narrow[name].std() < 0.03


def test_a_cache_is_made_where_the_config_says_so():
    ids = torch.tensor([ids_of(TEXT)])
    assert tiny_model()(ids).cache is None
    assert tiny_model(use_cache=True)(ids).cache is not None
