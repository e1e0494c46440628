# SPDX-License-Identifier: Apache-2.0
"""Boundaries, pooling and unpooling against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_stlm.patching_stlm import (
    PatchState,
    Rule,
    byte_events,
    byte_kinds,
    find_boundaries,
    hash_weights,
    index_patches,
    kind_weights,
    pool_patches,
    prefix_edges,
    step_boundary,
    step_table,
    unpool_patches,
)

from . import reference
from .tiny import TEXT, ids_of, tiny_config


CONTEXT = 4
# Long words, multi-byte characters, whole and broken, specials and runs of spaces.
pieces = st.sampled_from(
    [b"word", b" ", b"a", b"  \n", b"\xe6\x9d\xb1", b"\xf0\x9f\x98\x80", b"\xc3\xab", b"\xe6", b"x" * 9]
)
texts = st.lists(st.one_of(pieces, st.binary(max_size=5)), max_size=12).map(lambda parts: list(b"".join(parts)))
documents = (
    st.lists(st.one_of(texts, st.just([258])), min_size=1, max_size=4)
    .map(lambda parts: [i for part in parts for i in part])
    .filter(len)
)
rules = st.fixed_dictionaries(
    {
        "patching": st.sampled_from(["spacelike", "fixed", "vocabulary", "entropy"]),
        "patch_vocabulary": st.just("word ord Ġa aĠ xxxxxx xx æĿ± ðŁĺĢ ĠĠĠ Ċ <pad>"),
        "entropy_order": st.integers(1, 4),
        "entropy_rows": st.integers(1, 40),
        "patch_bytes": st.integers(1, 7),
        "max_patch_bytes": st.integers(2, 9),
        "max_patch_characters": st.integers(1, 3),
    }
)


def surprise_of(config) -> list[bool]:
    return [row % 3 == 1 for row in range(config.entropy_rows)]


def rule_of(config) -> Rule:
    cap_bytes = config.patch_bytes if config.patching == "fixed" else config.max_patch_bytes
    options = (config.patching == "spacelike", cap_bytes, config.max_patch_characters)
    steps = step_table(*options)
    if config.patching == "vocabulary":
        options = (*options, prefix_edges(config.pieces, config.max_patch_bytes - 1))
    elif config.patching == "entropy":
        surprise = torch.tensor(surprise_of(config)).float()
        options = (*options, None, surprise, 0.5, torch.tensor(hash_weights(config.entropy_order)))
    return Rule(byte_kinds(), byte_events(), kind_weights(), steps, *options)


def expected_boundaries(ids, config) -> list[bool]:
    return reference.boundaries(ids, config, surprise_of(config))


def pool(states, index) -> torch.Tensor:
    """Mean and last byte of every patch (B, P, 2 D)."""
    sums, last = pool_patches(states, states, index)
    return torch.cat([sums / index.num_bytes.clamp(min=1)[..., None], last], -1)


def find(config, context, num_bytes, state, lengths=None, positions=None):
    return find_boundaries(rule_of(config), context, num_bytes, state, lengths, positions)


def empty(num_rows: int) -> PatchState:
    return PatchState(torch.zeros(num_rows, dtype=torch.long), torch.zeros(num_rows, dtype=torch.long))


def with_context(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[-1] * CONTEXT + row for row in rows])


def whole(config, ids):
    return find(config, with_context([ids]), len(ids), empty(1))


@given(documents, rules)
def test_boundaries_equal_a_state_machine(ids, rule):
    config = tiny_config(**rule)
    found = whole(config, ids)
    assert found.boundary[0].tolist() == expected_boundaries(ids, config)
    sizes = [t - max((e for e in range(t) if found.boundary[0, e]), default=-1) for t in range(len(ids))]
    assert found.patch_bytes[0].tolist() == sizes


@given(documents, rules, st.integers(0, 255))
def test_boundaries_of_a_prefix_are_the_prefix_of_the_boundaries(ids, rule, other):
    config = tiny_config(**rule)
    boundary = whole(config, ids).boundary
    for t in range(1, len(ids)):
        assert torch.equal(whole(config, ids[:t]).boundary, boundary[:, :t])
    changed = [*ids[:-1], other]
    assert torch.equal(whole(config, changed).boundary[:, :-1], boundary[:, :-1])


@given(documents, rules, st.lists(st.integers(1, 6), min_size=1))
def test_pieces_give_the_boundaries_of_the_whole(ids, rule, sizes):
    config = tiny_config(**rule)
    context, state, found, start = with_context([ids]), empty(1), [], 0
    while start < len(ids):
        size = min(sizes[len(found) % len(sizes)], len(ids) - start)
        piece = find(config, context[:, start : start + CONTEXT + size], size, state)
        found.append(piece.boundary)
        state, start = piece.state, start + size
    expected = whole(config, ids)
    assert torch.equal(torch.cat(found, 1), expected.boundary)
    assert all(torch.equal(a, b) for a, b in zip(state, expected.state))


@given(documents, rules)
def test_steps_of_one_byte_give_the_boundaries_of_the_whole(ids, rule):
    config = tiny_config(**rule)
    context, state, found = with_context([ids]), empty(1), []
    for t in range(len(ids)):
        boundary, state = step_boundary(rule_of(config), context[:, : CONTEXT + t + 1], state)
        found.append(boundary)
    expected = whole(config, ids)
    assert torch.equal(torch.stack(found, 1), expected.boundary)
    assert [int(part) for part in state] == [int(part) for part in expected.state]


@given(st.lists(documents, min_size=2, max_size=4), rules)
def test_rows_of_different_lengths_do_not_touch(rows, rule):
    config = tiny_config(**rule)
    longest = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])
    found = find(
        config, with_context([row + [256] * (longest - len(row)) for row in rows]), longest, empty(len(rows)), lengths
    )
    for b, row in enumerate(rows):
        alone = whole(config, row)
        assert torch.equal(found.boundary[b, : len(row)], alone.boundary[0])
        assert not found.boundary[b, len(row) :].any()
        assert [int(part[b]) for part in found.state] == [int(part[0]) for part in alone.state]


@given(st.lists(documents, min_size=1, max_size=4), rules)
def test_packed_documents_are_patched_and_pooled_apart(rows, rule):
    config = tiny_config(**rule)
    ids = [i for row in rows for i in row]
    positions = torch.tensor([[t for row in rows for t in range(len(row))]])
    found = find(config, with_context([ids]), len(ids), empty(1), positions=positions)
    assert found.boundary[0].tolist() == [end for row in rows for end in expected_boundaries(row, config)]

    states = torch.randn(1, len(ids), 3)
    pooled = pool(states, index_patches(found))
    expected, start = [], 0
    for row in rows:
        for patch in reference.patches(expected_boundaries(row, config)):
            inside = states[0, start + patch[0] : start + patch[-1] + 1]
            expected.append(torch.cat([inside.mean(0), inside[-1]]))
        start += len(row)
    assert pooled.shape[1] == max(1, len(expected))
    if expected:
        torch.testing.assert_close(pooled[0], torch.stack(expected))


def test_pooling_has_the_gradient_of_a_loop():
    ids, config = ids_of(TEXT), tiny_config()
    states = torch.randn(1, len(ids), 4, dtype=torch.float32, requires_grad=True)
    weight = None
    found = whole(config, ids)
    pooled = pool(states, index_patches(found))
    weight = torch.randn_like(pooled)
    (gradient,) = torch.autograd.grad((pooled * weight).sum(), states)
    loop = torch.stack(
        [
            torch.cat([states[0, patch].mean(0), states[0, patch[-1]]])
            for patch in reference.patches(expected_boundaries(ids, config))
        ]
    )
    (expected,) = torch.autograd.grad((loop * weight[0]).sum(), states)
    torch.testing.assert_close(gradient, expected)


def test_unpooling_gives_each_byte_its_patch_or_the_start():
    patches, start = torch.randn(2, 3, 4), torch.randn(4)
    seen = torch.tensor([[-1, 0, 0, 2], [-1, -1, 1, 1]])
    out = unpool_patches(patches, seen, start)
    for b in range(2):
        for t in range(4):
            expected = start if seen[b, t] < 0 else patches[b, seen[b, t]]
            assert torch.equal(out[b, t], expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a word, and", "a |word,| and"),
        ("\n\nThe end.  ", "\n\nThe |end.|  "),
        ("snake_case(x)", "snake_|case(|x)|"),
        ("don't", "don'|t"),
    ],
)
def test_spacelike_patches_are_words_with_what_follows(text, expected):
    boundary = whole(tiny_config(), ids_of(text)).boundary[0].tolist()
    assert "".join(c + "|" * end for c, end in zip(text, boundary)) == expected


def test_patches_of_a_vocabulary_end_with_the_byte_that_proves_the_end_of_a_piece():
    config = tiny_config(patching="vocabulary", patch_vocabulary="The Ġtrunk Ġrun s Ġonce .")
    text = "The trunk runs once."
    boundary = whole(config, ids_of(text)).boundary[0].tolist()
    assert "".join(c + "|" * end for c, end in zip(text, boundary)) == "The |trunk |runs| |once.|"


def test_chinese_patches_are_whole_characters():
    text = "東京都庁舎前駅"
    boundary = whole(tiny_config(max_patch_characters=2), ids_of(text)).boundary[0].tolist()
    assert [t + 1 for t, end in enumerate(boundary) if end] == [6, 12, 18]
