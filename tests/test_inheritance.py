# SPDX-License-Identifier: Apache-2.0
"""Smaller models from larger ones, deeper ones from shallower ones."""

import argparse
import importlib
import re
import sys

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModelForCausalLM

from modeling_stlm import (
    STLMForCausalLM,
    STLMForMaskedLM,
    STLMForMultipleChoice,
    STLMForQuestionAnswering,
    STLMForSequenceClassification,
    STLMForTokenClassification,
    STLMModel,
    STLMTokenizer,
)
from modeling_stlm.training.inheritance import evenly, grow, inherit

from .test_examples import ROOT, run
from .test_examples import small_text as small_text  # a fixture
from .tiny import MIXERS, PATCHING, SHARING, TEXT, ids_of, randomize, tiny_config, tiny_model


sys.path.insert(0, str(ROOT / "examples"))
IDS = torch.tensor([ids_of(TEXT)])
BATCH = {"input_ids": IDS, "labels": IDS}
LARGE = {
    "hidden_size": 20,
    "intermediate_size": 31,
    "trunk_hidden_size": 27,
    "trunk_intermediate_size": 40,
    "trunk_num_attention_heads": 9,
    "trunk_num_key_value_heads": 3,
    "trunk_head_dim": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "ngram_embedding_size": 8,
}
SMALL = LARGE | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "trunk_hidden_size": 24,
    "trunk_intermediate_size": 32,
    "trunk_num_attention_heads": 4,
    "trunk_num_key_value_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "ngram_embedding_size": 6,
}
HEADS = (STLMForSequenceClassification, STLMForTokenClassification, STLMForQuestionAnswering, STLMForMultipleChoice)


def some(count: int, total: int) -> torch.Tensor:
    """A random choice, ascending."""
    return torch.randperm(total)[:count].sort().values


def place(large: nn.Module, small: nn.Module, *indices: torch.Tensor | None) -> None:
    """The weight of `small` at `indices` of each axis of that of `large`, which is near zero elsewhere."""
    weight = torch.randn(large.weight.shape) * 1e-4
    indices = [torch.arange(n) if index is None else index for index, n in zip(indices, weight.shape, strict=True)]
    weight[torch.meshgrid(*indices, indexing="ij")] = small.weight.detach()
    large.weight.data = weight


def blocks(index: torch.Tensor, repeats: int, total: int) -> torch.Tensor:
    """`index` in each of several stretches of `total`."""
    return torch.cat([index + i * total for i in range(repeats)])


def channels(index: torch.Tensor, width: int) -> torch.Tensor:
    """The rows of heads `index` of `width` channels."""
    return torch.cat([torch.arange(i * width, (i + 1) * width) for i in index.tolist()])


def place_attention(large, small, width: torch.Tensor) -> None:
    groups = some(small.num_key_value_heads, large.num_key_value_heads)
    kept, per_group = small.num_key_value_groups, large.num_key_value_groups
    queries = torch.cat([g * per_group + some(kept, per_group) for g in groups.tolist()])
    queries, groups = channels(queries, large.head_dim), channels(groups, large.head_dim)
    place(large.q_proj, small.q_proj, queries, width)
    place(large.k_proj, small.k_proj, groups, width)
    place(large.v_proj, small.v_proj, groups, width)
    place(large.o_proj, small.o_proj, width, queries)
    place(large.q_norm, small.q_norm, None)
    place(large.k_norm, small.k_norm, None)


def place_feed_forward(large, small, width: torch.Tensor) -> None:
    neurons = some(small.up_proj.out_features, large.up_proj.out_features)
    place(large.up_proj, small.up_proj, neurons, width)
    place(large.down_proj, small.down_proj, width, neurons)


def place_byte_layer(large, small, width: torch.Tensor) -> None:
    place(large.mixer_norm, small.mixer_norm, width)
    place(large.feed_forward_norm, small.feed_forward_norm, width)
    place_feed_forward(large.feed_forward, small.feed_forward, width)
    if hasattr(small.mixer, "q_proj"):
        return place_attention(large.mixer, small.mixer, width)
    inner = some(small.mixer.conv.out_channels, large.mixer.conv.out_channels)
    place(large.mixer.in_proj, small.mixer.in_proj, blocks(inner, 3, large.mixer.conv.out_channels), width)
    place(large.mixer.conv, small.mixer.conv, inner, None, None)
    return place(large.mixer.out_proj, small.mixer.out_proj, width, inner)


def hide(small: STLMModel, large: STLMModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the weights of `small` to random places of `large`, module by module; returns the widths."""
    sizes = small.config, large.config
    width, trunk_width = (some(*(getattr(c, n) for c in sizes)) for n in ("hidden_size", "trunk_hidden_size"))
    narrow = some(*(c.ngram_embedding_size for c in sizes))
    place(large.embed_tokens, small.embed_tokens, None, width)
    place(large.ngram_embedding.ngram_tables, small.ngram_embedding.ngram_tables, None, narrow)
    inputs = blocks(narrow, 5, large.config.ngram_embedding_size)
    place(large.ngram_embedding.ngram_proj, small.ngram_embedding.ngram_proj, width, inputs)
    place(large.match_embedding.following, small.match_embedding.following, None, width)
    place(large.match_embedding.length, small.match_embedding.length, None, width)
    place(large.context_ngram_embedding.following, small.context_ngram_embedding.following, None, width)
    for kind in ("local_encoder", "local_decoder"):
        for theirs, ours in zip(getattr(large, kind), getattr(small, kind), strict=True):
            place_byte_layer(theirs, ours, width)
    both = blocks(width, 2, large.config.hidden_size)
    place(large.patcher.patch_proj, small.patcher.patch_proj, trunk_width, both)
    place(large.patcher.byte_proj, small.patcher.byte_proj, width, trunk_width)
    place(large.patcher.start, small.patcher.start, width)
    if small.config.patching == "learned":
        place(large.patcher.rule.q_proj, small.patcher.rule.q_proj, width, width)
        place(large.patcher.rule.k_proj, small.patcher.rule.k_proj, width, width)
    for theirs, ours in zip(large.trunk.attention_blocks, small.trunk.attention_blocks, strict=True):
        place(theirs.attention_norm, ours.attention_norm, trunk_width)
        place_attention(theirs.attention, ours.attention, trunk_width)
    for theirs, ours in zip(large.trunk.feed_forward_blocks, small.trunk.feed_forward_blocks, strict=True):
        place(theirs.feed_forward_norm, ours.feed_forward_norm, trunk_width)
        place_feed_forward(theirs.feed_forward, ours.feed_forward, trunk_width)
    place(large.trunk.final_norm, small.trunk.final_norm, trunk_width)
    place(large.final_norm, small.final_norm, width)
    return width, trunk_width


def assert_same_weights(model: nn.Module, expected: nn.Module) -> None:
    state, reference = model.state_dict(), expected.state_dict()
    assert state.keys() == reference.keys()
    for name, value in state.items():
        assert torch.equal(value, reference[name]), name


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("mixers", MIXERS)
def test_the_important_slices_of_every_weight_are_inherited(sharing, mixers):
    options = SHARING[sharing] | MIXERS[mixers]
    small, large = (STLMForCausalLM(tiny_config(**(sizes | options))) for sizes in (SMALL, LARGE))
    randomize(small)
    hide(small.model, large.model)
    assert_same_weights(inherit(large, small.config), small)


@pytest.mark.parametrize("options", [{"patching": "learned"}, {"is_causal": False}, {"ngram_embedding_size": None}])
def test_wide_ngrams_routers_and_encoders_inherit(options):
    small, large = (STLMModel(tiny_config(**(sizes | options))) for sizes in (SMALL, LARGE))
    randomize(small)
    if small.config.ngram_embedding_size is None:
        randomize(large)
        wide = inherit(large, small.config).ngram_embedding.ngram_tables.weight
        columns = [large.ngram_embedding.ngram_tables.weight[:, i] for i in range(20)]
        assert all(any(torch.equal(column, other) for other in columns) for column in wide.T)
    else:
        hide(small, large)
        assert_same_weights(inherit(large, small.config), small)


@pytest.mark.parametrize("head", HEADS)
def test_heads_inherit_and_load(head, tmp_path):
    small, large = (head(tiny_config(**sizes)) for sizes in (SMALL, LARGE))
    randomize(small)
    width, _ = hide(small.model, large.model)
    last = "qa_outputs" if head is STLMForQuestionAnswering else "score"
    place(getattr(large, last), getattr(small, last), None, width)
    if getattr(small, last).bias is not None:
        getattr(large, last).bias.data = getattr(small, last).bias.detach().clone()
    inherited = inherit(large.eval(), small.config)
    assert_same_weights(inherited, small)
    assert not inherited.training
    inherited.save_pretrained(tmp_path)
    assert_same_weights(head.from_pretrained(tmp_path), small)


@pytest.mark.parametrize("options", [*SHARING.values(), *PATCHING.values()])
def test_the_same_sizes_are_the_same_function(options, tmp_path):
    model = tiny_model(**options)
    inherited = inherit(model, model.config)
    assert inherited.config is not model.config and torch.equal(inherited(IDS).logits, model(IDS).logits)
    inherited.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("head", [STLMForCausalLM, STLMForMaskedLM])
def test_a_head_of_its_own_is_inherited(head):
    options = {"tie_word_embeddings": False, "is_causal": head is STLMForCausalLM}
    model = randomize(head(tiny_config(**options)))
    for make in (inherit, grow):
        assert torch.equal(make(model, model.config)(IDS).logits, model(IDS).logits)
    small, large = (head(tiny_config(**(sizes | options))) for sizes in (SMALL, LARGE))
    randomize(small)
    width, _ = hide(small.model, large.model)
    place(large.lm_head, small.lm_head, None, width)
    assert_same_weights(inherit(large, small.config), small)


@pytest.mark.parametrize("make", [inherit, grow])
@pytest.mark.parametrize("target", ["q_proj", "following"])
def test_a_model_with_adapters_is_refused(make, target):
    model = inject_adapter_in_model(LoraConfig(target_modules=[target], init_lora_weights=False), tiny_model())
    with pytest.raises(ValueError, match=rf"no parameter \S*{target}\.weight: merge adapters first"):
        make(model, tiny_config())


@pytest.mark.parametrize("make", [inherit, grow])
def test_match_embeddings_may_be_added(make):
    model = tiny_model(match_bytes=0)
    with_matches = make(model, tiny_config(match_bytes=4, match_doublings=1))
    assert with_matches.model.match_embedding is not None
    torch.testing.assert_close(with_matches(IDS).logits, model(IDS).logits, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"cannot (inherit|grow): expected match_bytes=2, got 0"):
        make(tiny_model(), tiny_config(match_bytes=0))


@pytest.mark.parametrize("make", [inherit, grow])
def test_ngrams_of_the_document_may_be_added(make):
    model = tiny_model(context_ngram_orders=[])
    larger = make(model, tiny_config(context_ngram_orders=[2, 4], context_ngram_places=5))
    assert larger.model.context_ngram_embedding.following.weight.shape[0] == 2 * 258
    torch.testing.assert_close(larger(IDS).logits, model(IDS).logits, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"cannot (inherit|grow): expected context_ngram_orders=\[1, 3\], got \[1\]"):
        make(tiny_model(), tiny_config(context_ngram_orders=[1]))
    for field, value, got in (("context_ngram_places", 3, 5), ("match_doublings", 2, 1)):
        with pytest.raises(ValueError, match=f"cannot (inherit|grow): expected {field}={value}, got {got}"):
            make(tiny_model(), tiny_config(**{field: got}))


def test_layers_are_sampled_evenly_with_first_and_last():
    assert evenly(3, 7, only=0) == [0, 3, 6] and evenly(4, 5, only=0)[::3] == [0, 4] and evenly(1, 5, only=2) == [2]
    for stored in range(1, 12):
        for kept in range(2, stored + 1):
            chosen = evenly(kept, stored, only=0)
            assert (
                chosen[0] == 0 and chosen[-1] == stored - 1 and len(set(chosen)) == kept and sorted(chosen) == chosen
            )
    model = tiny_model(num_trunk_layers=5, num_local_encoder_layers=3, num_local_decoder_layers=3)
    inherited = inherit(model, tiny_config(num_trunk_layers=3, num_local_encoder_layers=2, num_local_decoder_layers=1))
    for kind, chosen in {"attention_blocks": [0, 2, 4], "feed_forward_blocks": [0, 2, 4]}.items():
        for ours, source in zip(getattr(inherited.model.trunk, kind), chosen, strict=True):
            assert_same_weights(ours, getattr(model.model.trunk, kind)[source])
    assert_same_weights(inherited.model.local_encoder[1], model.model.local_encoder[2])
    assert_same_weights(inherited.model.local_decoder[0], model.model.local_decoder[2])


def test_stored_blocks_and_not_passes_are_sampled():
    model = tiny_model(layer_sharing="middle", num_trunk_layers=8, num_unique_trunk_layers=3)
    inherited = inherit(model, tiny_config(layer_sharing="middle", num_trunk_layers=4, num_unique_trunk_layers=3))
    for ours, source in zip(inherited.model.trunk.attention_blocks, model.model.trunk.attention_blocks, strict=True):
        assert_same_weights(ours, source)


def test_taylor_importance_is_the_gradient_times_the_weight_on_the_data():
    model, config = tiny_model(), tiny_config(intermediate_size=10)
    feed_forward = model.model.local_encoder[0].feed_forward
    with torch.no_grad():  # a neuron of large weights that nobody reads
        feed_forward.up_proj.weight[3] = 10.0
        feed_forward.down_proj.weight[:, 3] = 0.0
    texts = [IDS[:, :50], IDS[:, 50:120]]
    batches = ({"input_ids": text, "labels": text} for text in texts)
    inherited = inherit(model, config, "taylor", batches)
    assert all(parameter.grad is None for parameter in model.parameters())

    sum(model(input_ids=text, labels=text).loss for text in texts).backward()
    up, down = feed_forward.up_proj.weight, feed_forward.down_proj.weight
    scores = [
        ((up[i] * up.grad[i]).abs().sum() + (down[:, i] * down.grad[:, i]).abs().sum()).item() for i in range(24)
    ]
    best = sorted(sorted(range(24), key=lambda i: -scores[i])[:10])
    assert 3 not in best
    assert torch.equal(inherited.model.local_encoder[0].feed_forward.up_proj.weight, up[best])
    by_size = inherit(model, config).model.local_encoder[0].feed_forward.up_proj.weight
    assert any(torch.equal(row, up[3]) for row in by_size)


@pytest.mark.parametrize("head", [*HEADS, STLMForMaskedLM])
def test_every_head_has_gradients_and_other_rows(head):
    options = {"is_causal": False} if head is STLMForMaskedLM else {}
    model = randomize(head(tiny_config(**options)))
    two = IDS[:, :100].view(2, 50)
    batch = {
        STLMForSequenceClassification: {"input_ids": two, "labels": torch.tensor([0, 1])},
        STLMForTokenClassification: {"input_ids": two, "labels": two % 2},
        STLMForQuestionAnswering: {
            **{"input_ids": two, "start_positions": torch.tensor([3, 4]), "end_positions": torch.tensor([5, 6])}
        },
        STLMForMultipleChoice: {"input_ids": two[None], "labels": torch.tensor([1])},
        STLMForMaskedLM: {"input_ids": two, "labels": two},
    }[head]
    inherited = inherit(
        model, tiny_config(ngram_rows=11, hidden_size=8, intermediate_size=8, **options), "taylor", [batch]
    )
    assert inherited(input_ids=batch["input_ids"])[0].isfinite().all()
    tables = [inherit(model, tiny_config(ngram_rows=11, **options), data=d) for d in (None, [batch])]
    assert not torch.equal(*(m.model.ngram_embedding.ngram_tables.weight for m in tables))


BIGRAMS = {"ngram_orders": [2], "ngram_word_bytes": 0}


def digest(first: int, second: int) -> int:
    return ((first + 1) + (second + 1) * 65599) % (2**31 - 1)


@pytest.mark.parametrize(("old", "new"), [(32, 8), (8, 32), (12, 8)])
def test_rows_that_agree_in_the_hash_are_merged(old, new):
    model = tiny_model(ngram_rows=old, **BIGRAMS)
    table = model.model.ngram_embedding.ngram_tables.weight
    inherited = inherit(model, tiny_config(ngram_rows=new, **BIGRAMS)).model.ngram_embedding.ngram_tables.weight
    rows = {}  # the old rows of all n-grams of each new row
    for first in range(-1, 256):
        for second in range(256):
            rows.setdefault(digest(first, second) % new, set()).add(digest(first, second) % old)
    assert rows.keys() == set(range(new))
    for row, sources in rows.items():
        weights = [table[source].square().sum() for source in sources]
        expected = sum(weight * table[source] for weight, source in zip(weights, sources)) / sum(weights)
        torch.testing.assert_close(inherited[row], expected)


def test_ngrams_of_the_data_take_their_rows_along():
    model = tiny_model(ngram_rows=37, **BIGRAMS)
    table = model.model.ngram_embedding.ngram_tables.weight
    config = tiny_config(ngram_rows=11, **BIGRAMS)
    text = ids_of("an n-gram and another")
    padded = {
        "input_ids": torch.tensor([[256] * 3 + text]),
        "attention_mask": torch.tensor([[0] * 3 + [1] * len(text)]),
    }
    inherited = inherit(model, config, data=[padded])
    rows = {}
    for first, second in zip([-1, *text], text):
        rows.setdefault(digest(first, second) % 11, []).append(digest(first, second) % 37)
    assert 1 < len(rows) < 11
    merged = inherit(model, config).model.ngram_embedding.ngram_tables.weight
    for row in range(11):
        expected = table[rows[row]].mean(0) if row in rows else merged[row]
        torch.testing.assert_close(inherited.model.ngram_embedding.ngram_tables.weight[row], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 17}, "hidden_size of at most 16, got 17"),
        ({"trunk_hidden_size": 28, "trunk_head_dim": 6}, "trunk_hidden_size of at most 24, got 28"),
        ({"intermediate_size": 25}, "intermediate_size of at most 24, got 25"),
        ({"num_trunk_layers": 3}, r"num_unique_trunk_layers \(stored attention blocks\) of at most 2, got 3"),
        ({"num_local_decoder_layers": 2}, "num_local_decoder_layers of at most 1, got 2"),
        ({"ngram_embedding_size": 7}, "ngram_embedding_size of at most 6, got 7"),
        ({"ngram_embedding_size": None}, "ngram_embedding_size='a number', got None"),
        ({"ngram_orders": [2, 3]}, r"ngram_orders=\[2, 3, 4, 5\], got \[2, 3\]"),
        ({"vocab_size": 384}, "vocab_size=320, got 384"),
        ({"patching": "fixed"}, "patching='spacelike', got 'fixed'"),
        ({"trunk_num_attention_heads": 2, "trunk_head_dim": 12}, "trunk_head_dim=6, got 12"),
        (
            {"trunk_num_attention_heads": 6, "trunk_num_key_value_heads": 3, "trunk_head_dim": 6},
            "key_value_heads of at most 2, got 3",
        ),
        (
            {"trunk_num_attention_heads": 3, "trunk_num_key_value_heads": 1, "trunk_head_dim": 6},
            "head of at most 2, got 3",
        ),
        ({"byte_mixers": ["attention"] * 3}, "the same mixer"),
        ({"num_labels": 3}, "num_labels=2, got 3"),
        ({"sharing_lora_rank": 2}, "sharing_lora_rank=0, got 2"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=True, got False"),
        ({"rope_theta": 10.0}, r"rope_theta=10000\.0, got 10\.0"),
        ({"trunk_window_patches": 3}, "trunk_window_patches=None, got 3"),
    ],
)
def test_a_config_that_cannot_inherit_is_refused_by_field(changes, message):
    with pytest.raises(ValueError, match=message):
        inherit(tiny_model(), tiny_config(**changes))


def test_a_window_of_bytes_that_attend_is_kept():
    mixers = {"byte_mixers": ["attention"] * 3}
    with pytest.raises(ValueError, match="attention_window_bytes=64, got 3"):
        inherit(tiny_model(**mixers), tiny_config(**mixers, attention_window_bytes=3))
    inherit(tiny_model(), tiny_config(attention_window_bytes=3))  # nothing reads it


def test_a_head_of_its_own_does_not_become_the_embedding():
    with pytest.raises(ValueError, match="tie_word_embeddings=False, got True"):
        inherit(tiny_model(tie_word_embeddings=False), tiny_config())


def test_data_that_says_nothing_of_importance_is_refused():
    model = tiny_model()
    for data in (None, []):
        with pytest.raises(ValueError, match="'taylor' needs data"):
            inherit(model, model.config, "taylor", data)
    with pytest.raises(ValueError, match=r"needs batches with labels, got \['input_ids'\]"):
        inherit(model, model.config, "taylor", [{"input_ids": IDS}])
    frozen = tiny_model()
    frozen.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is frozen"):
        inherit(frozen, tiny_config(), "taylor", [{"input_ids": torch.tensor([[97]]), "labels": torch.tensor([[97]])}])
    with pytest.raises(ValueError, match="must be 'l2' or 'taylor'"):
        inherit(model, model.config, "l1")


def test_bfloat16_and_the_generation_config_are_inherited():
    model = tiny_model().to(torch.bfloat16)
    model.generation_config.top_p = 0.5
    inherited = inherit(model, tiny_config(ngram_rows=16, hidden_size=8), "taylor", [BATCH])
    assert inherited.dtype == torch.bfloat16 and inherited.generation_config.top_p == 0.5
    assert inherited(IDS).logits.isfinite().all()


DEEPER = {
    "none": {"num_trunk_layers": 5},
    "immediate": {"num_trunk_layers": 8, "num_unique_trunk_layers": 5},
    "cycle": {"num_trunk_layers": 6, "num_unique_trunk_layers": 3},
    "middle": {"num_trunk_layers": 7, "num_unique_trunk_layers": 5},
    "ffn": {"num_trunk_layers": 5, "num_unique_trunk_layers": 4},
}


@pytest.mark.parametrize("sharing", SHARING)
def test_a_deeper_model_starts_as_the_same_function(sharing, tmp_path):
    model = tiny_model(**SHARING[sharing])
    grown = grow(model, tiny_config(**(SHARING[sharing] | DEEPER[sharing])))
    assert len(grown.config.trunk_schedule) > len(model.config.trunk_schedule)
    logits = grown(IDS).logits
    torch.testing.assert_close(logits, model(IDS).logits, atol=1e-6, rtol=0)
    grown.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, logits)
    # The new blocks learn: their output projections have gradients.
    grown(**BATCH).loss.backward()
    new = [p for n, p in grown.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight")) and not p.any()]
    assert new and all(parameter.grad.abs().max() > 0 for parameter in new)


def test_new_blocks_are_copies_between_the_first_and_the_last():
    model = tiny_model()
    grown = grow(model, tiny_config(num_trunk_layers=4))
    ours, theirs = grown.model.trunk.feed_forward_blocks, model.model.trunk.feed_forward_blocks
    assert_same_weights(ours[0], theirs[0])
    assert_same_weights(ours[3], theirs[1])
    for block in ours[1:3]:
        assert not block.feed_forward.down_proj.weight.any()
        assert torch.equal(block.feed_forward.up_proj.weight, theirs[0].feed_forward.up_proj.weight)


def test_shared_layers_may_be_stored_apart():
    model = tiny_model(**SHARING["cycle"])
    grown = grow(model, tiny_config(num_trunk_layers=4))
    assert len(grown.model.trunk.attention_blocks) == 4
    torch.testing.assert_close(grown(IDS).logits, model(IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("head", [STLMForMaskedLM, STLMForSequenceClassification])
def test_encoders_grow_by_layers_of_bytes(head):
    mixers = {"byte_mixers": ["conv", "attention", "conv", "conv", "conv"], "num_local_decoder_layers": 2}
    model = randomize(head(tiny_config(is_causal=False)))
    grown = grow(model, tiny_config(is_causal=False, num_local_encoder_layers=3, **mixers))
    torch.testing.assert_close(grown(IDS).logits, model(IDS).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sharing", "changes", "message"),
    [
        ("none", {"num_trunk_layers": 4, "hidden_size": 20}, "cannot grow: expected (head_dim=8|hidden_size=16), got"),
        ("none", {"num_trunk_layers": 1}, "attention_blocks 0 0 1 1, got attention_blocks 0 0"),
        ("cycle", {"num_trunk_layers": 6}, "cannot run more often"),
        ("cycle", {"sharing_lora_rank": 1}, "sharing_lora_rank=0, got 1"),
        (
            "none",
            {"byte_mixers": ["attention", "conv", "conv"]},
            "local_encoder conv conv, got local_encoder attention",
        ),
    ],
)
def test_a_config_without_room_for_the_function_is_refused(sharing, changes, message):
    with pytest.raises(ValueError, match=message):
        grow(tiny_model(**SHARING[sharing]), tiny_config(**(SHARING[sharing] | changes)))


def test_the_example_prints_steps_to_equal_loss(small_text, tmp_path):
    sizes = ["--checkpoint", ROOT / "examples" / "checkpoints" / "stlm-3m", "--set", "trunk_intermediate_size=216"]
    training = ["--max_steps", 4, "--batch_size", 2, "--train", small_text, "--validation", small_text]
    printed = run("inherit.py", *sizes, "ngram_rows=1448", *training, "--output", tmp_path / "run", cwd=tmp_path)
    table = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert [int(step) for step, *_ in table] == [0, 1, 2, 3, 4]
    assert all(float(inherited) < float(random) for _, random, inherited in table)
    reached = re.findall(
        r"([\d.]+) bits per byte: (\d) steps from random weights, from inherited ones (\d) steps", printed
    )
    assert [steps for _, *steps in reached] == [["2", "0"], ["4", "0"]]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert loaded.config.trunk_intermediate_size == 216 and loaded.config.use_cache


def test_the_example_makes_a_third_of_the_shipped_checkpoint(monkeypatch):
    example, pretrain = importlib.import_module("inherit"), importlib.import_module("pretrain")
    monkeypatch.setattr(sys, "argv", ["inherit.py"])
    args = example.parse_arguments()
    larger = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32)
    smaller = inherit(larger, pretrain.load_config(args.checkpoint, args.set, is_checkpoint=True))
    assert 0.28 < smaller.num_parameters() / larger.num_parameters() < 0.35
    message = r"num_attention_heads=4 must be a multiple of num_key_value_heads=8"
    with pytest.raises(SystemExit, match=message):  # before anything is trained
        pretrain.load_config(args.checkpoint, ["num_attention_heads=4"], is_checkpoint=True)


def test_a_checkpoint_of_the_hub_inherits(small_text, tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "models--me--tiny"
    tiny_model().save_pretrained(folder / "snapshots" / "abc")
    STLMTokenizer().save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    options = ["--checkpoint", "me/tiny", "--set", "intermediate_size=8", "--max_steps", 1, "--batch_size", 1]
    options += ["--train", small_text, "--validation", small_text, "--output", "run"]
    run("inherit.py", *options, cwd=tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.intermediate_size == 8


def test_steps_to_a_loss_lie_on_the_lines_between_evaluations():
    example = importlib.import_module("inherit")
    curve = {0: 8.0, 10: 4.0, 20: 2.0}
    assert [example.steps_to(loss, curve) for loss in (9.0, 8.0, 5.0, 2.0, 1.0)] == [0, 0, 7.5, 20, None]


def test_texts_that_are_too_short_to_inherit_with_are_named(tmp_path):
    example = importlib.import_module("inherit")
    args = argparse.Namespace(train=[f"{tmp_path}/*.txt"], validation=None, output=tmp_path / "run")
    for i in range(5):
        (tmp_path / f"{i}.txt").touch()
    names = " ".join(f"{tmp_path}/{i}.txt" for i in range(3)) + " and 2 more"
    with pytest.raises(SystemExit, match=f"^--train {names}: there is no text: every document is empty. Take longer"):
        example.make_windows(args, STLMTokenizer())
    (tmp_path / "3.txt").write_text("A few words.")
    with pytest.raises(SystemExit, match=f"^--train {names}: .* holds 14 ids .*, fewer than one window of 1024. Take"):
        example.make_windows(args, STLMTokenizer())
