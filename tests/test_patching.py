# SPDX-License-Identifier: Apache-2.0
"""Boundaries, pooling and unpooling against loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_stlm.batching_stlm import STLMBatch
from modeling_stlm.patching_stlm import PatchState, byte_pieces
from modeling_stlm.trunk_stlm import STLMPatcher, pool_patches, unpool_patches

from . import reference
from .tiny import TEXT, ids_of, tiny_config


WIDTH = 16

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
        "patching": st.sampled_from(["spacelike", "fixed", "vocabulary"]),
        "patch_vocabulary": st.just("word ord Ġa aĠ xxxxxx xx æĿ± ðŁĺĢ ĠĠĠ Ċ <pad>"),
        "patch_bytes": st.integers(1, 7),
        "max_patch_bytes": st.integers(2, 9),
        "max_patch_characters": st.integers(1, 3),
    }
)


def positions_of(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([[t for row in rows for t in range(len(row))]])


class Piecewise:
    """The patcher of a config over pieces of a text: where patches end, their pooled vectors, the state."""

    def __init__(self, config, num_rows: int = 1):
        self.patcher = STLMPatcher(config)
        torch.nn.init.normal_(self.patcher.start.weight)
        self.state = self.patcher.fresh_state(num_rows, torch.device("cpu"))
        self.ends, self.pooled = [], []

    def feed(self, ids: list[list[int]], hidden_states=None, lengths=None, position_ids=None) -> "Piecewise":
        ids = torch.tensor(ids)
        time = torch.arange(ids.shape[1])
        valid = None if lengths is None else time < torch.tensor(lengths)[:, None]
        batch = STLMBatch.of(ids, valid, position_ids=position_ids)
        if hidden_states is None:
            hidden_states = torch.zeros(*ids.shape, WIDTH)
        context = torch.cat([self.state.last_ids, ids], 1)
        found = self.patcher.find_ends(hidden_states, context, batch, self.state)
        most = int(found.ends.sum(1).max())
        patches, state = pool_patches(hidden_states, found.ends, batch, self.state, most)
        self.patches = patches
        self.ends.append(found.ends)
        self.pooled += [patches.pooled[b, : patches.counts[b]] for b in range(len(ids))]
        num_valid = ids.shape[1] if lengths is None else torch.tensor(lengths)
        kept = torch.arange(context.shape[1] - ids.shape[1])
        last = context.gather(1, (torch.zeros_like(ids[:, :1]) + torch.as_tensor(num_valid).reshape(-1, 1)) + kept)
        self.state = state._replace(last_ids=last, rule_state=found.rule_state, num_bytes=state.num_bytes + num_valid)
        return self


def whole(config, ids: list[int]) -> torch.Tensor:
    """Ends (1, T) of one text."""
    return Piecewise(config).feed([ids]).ends[0]


def same(first: PatchState, second: PatchState, row: int = 0) -> bool:
    names = "last_ids", "num_bytes", "num_patches", "open_bytes", "open_sum", "rule_state"
    return all(torch.allclose(getattr(first, name)[row], getattr(second, name)[0], atol=1e-5) for name in names)


@given(documents, rules)
def test_boundaries_equal_a_state_machine(ids, rule):
    config = tiny_config(**rule)
    fed = Piecewise(config).feed([ids])
    expected = reference.boundaries(ids, config)
    assert fed.ends[0][0].tolist() == expected
    done = reference.patches(expected)
    assert int(fed.state.num_patches) == len(done)
    assert int(fed.state.open_bytes) == len(ids) - sum(map(len, done))


@given(documents, rules, st.integers(0, 255))
def test_boundaries_of_a_prefix_are_the_prefix_of_the_boundaries(ids, rule, other):
    config = tiny_config(**rule)
    ends = whole(config, ids)
    for t in range(1, len(ids)):
        assert torch.equal(whole(config, ids[:t]), ends[:, :t])
    changed = [*ids[:-1], other]
    assert torch.equal(whole(config, changed)[:, :-1], ends[:, :-1])


@given(documents, rules, st.lists(st.integers(1, 6), min_size=1))
def test_pieces_give_the_patches_and_the_state_of_the_whole(ids, rule, sizes):
    config, states = tiny_config(**rule), torch.randn(1, len(ids), WIDTH)
    pieces, start = Piecewise(config), 0
    while start < len(ids):
        end = min(start + sizes[len(pieces.ends) % len(sizes)], len(ids))
        pieces.feed([ids[start:end]], states[:, start:end])
        start = end
    expected = Piecewise(config).feed([ids], states)
    assert torch.equal(torch.cat(pieces.ends, 1), expected.ends[0])
    torch.testing.assert_close(torch.cat(pieces.pooled), torch.cat(expected.pooled), atol=1e-5, rtol=1e-5)
    assert same(pieces.state, expected.state)


@given(st.lists(documents, min_size=2, max_size=4), rules)
def test_rows_of_different_lengths_do_not_touch(rows, rule):
    config = tiny_config(**rule)
    longest, lengths = max(map(len, rows)), [len(row) for row in rows]
    states = torch.randn(len(rows), longest, WIDTH)
    together = Piecewise(config, len(rows)).feed([row + [256] * (longest - len(row)) for row in rows], states, lengths)
    for b, row in enumerate(rows):
        alone = Piecewise(config).feed([row], states[b : b + 1, : len(row)])
        assert torch.equal(together.ends[0][b, : len(row)], alone.ends[0][0])
        assert not together.ends[0][b, len(row) :].any()
        torch.testing.assert_close(together.pooled[b], alone.pooled[0], atol=1e-5, rtol=1e-5)
        assert same(together.state, alone.state, b)


@given(st.lists(documents, min_size=1, max_size=4), rules)
def test_packed_documents_are_patched_and_pooled_apart(rows, rule):
    config = tiny_config(**rule)
    ids = [i for row in rows for i in row]
    states = torch.randn(1, len(ids), WIDTH)
    fed = Piecewise(config).feed([ids], states, position_ids=positions_of(rows))
    assert fed.ends[0][0].tolist() == [end for row in rows for end in reference.boundaries(row, config)]
    expected, start = [states.new_zeros(0, 2 * WIDTH)], 0
    for row in rows:
        for patch in reference.patches(reference.boundaries(row, config)):
            inside = states[0, start + patch[0] : start + patch[-1] + 1]
            expected.append(torch.cat([inside.mean(0), inside[-1]])[None])
        start += len(row)
    torch.testing.assert_close(fed.pooled[0], torch.cat(expected))


def test_pooling_has_the_gradient_of_a_loop():
    ids, config = ids_of(TEXT), tiny_config()
    states = torch.randn(1, len(ids), WIDTH, requires_grad=True)
    (pooled,) = Piecewise(config).feed([ids], states).pooled
    weight = torch.randn_like(pooled)
    (gradient,) = torch.autograd.grad((pooled * weight).sum(), states)
    loop = torch.stack(
        [
            torch.cat([states[0, patch].mean(0), states[0, patch[-1]]])
            for patch in reference.patches(reference.boundaries(ids, config))
        ]
    )
    (expected,) = torch.autograd.grad((loop * weight).sum(), states)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_unpooling_gives_each_byte_its_last_complete_patch_or_the_start(packed):
    rows, config = [ids_of("ab cd ef"), ids_of("gh"), ids_of(" i j")], tiny_config()
    ids = [i for row in rows for i in row]
    if not packed:
        rows = [ids]
    fed = Piecewise(config).feed([ids], position_ids=positions_of(rows))
    batch = STLMBatch.of(torch.tensor([ids]), position_ids=positions_of(rows))
    fresh = fed.patcher.fresh_state(1, torch.device("cpu"))
    new = torch.randn(1, fed.patches.pooled.shape[1], WIDTH)
    seen, visible = unpool_patches(new, fed.ends[0], batch, fresh)
    expected, number, start = [], -1, 0
    for row in rows:
        first = number + 1
        for end in reference.boundaries(row, config):
            number += end
            expected.append(new[0, number] if number >= first else fed.patcher.start.weight)
        start += len(row)
    assert torch.equal(seen[0], torch.stack(expected))
    assert torch.equal(visible[0], expected[-1])


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
    boundary = whole(tiny_config(), ids_of(text))[0].tolist()
    assert "".join(c + "|" * end for c, end in zip(text, boundary)) == expected


def test_patches_of_a_vocabulary_end_with_the_byte_that_proves_the_end_of_a_piece():
    config = tiny_config(patching="vocabulary", patch_vocabulary="The Ġtrunk Ġrun s Ġonce .")
    text = "The trunk runs once."
    boundary = whole(config, ids_of(text))[0].tolist()
    assert "".join(c + "|" * end for c, end in zip(text, boundary)) == "The |trunk |runs| |once.|"


def test_pieces_of_a_vocabulary_are_bytes():
    assert byte_pieces("<pad> Ġthe æĿ± Ċ") == [b"<pad>", b" the", "東".encode(), b"\n"]
    with pytest.raises(ValueError, match=r"1 pieces that are not .*\['▁the'\]"):
        STLMPatcher(tiny_config(patching="vocabulary", patch_vocabulary="a ▁the b"))


def test_chinese_patches_are_whole_characters():
    text = "東京都庁舎前駅"
    boundary = whole(tiny_config(max_patch_characters=2), ids_of(text))[0].tolist()
    assert [t + 1 for t, end in enumerate(boundary) if end] == [6, 12, 18]


@pytest.mark.parametrize("size", range(1, 13))
def test_characters_are_counted_across_pieces(size):
    ids, config = ids_of("東京 都庁舎前駅😀東京"), tiny_config(max_patch_characters=4, max_patch_bytes=64)
    pieces = Piecewise(config)
    for start in range(0, len(ids), size):
        pieces.feed([ids[start : start + size]])
    expected = Piecewise(config).feed([ids])
    assert expected.ends[0][0].nonzero()[:, 0].tolist() == [6, 18, 31]
    assert torch.equal(torch.cat(pieces.ends, 1), expected.ends[0])
    assert same(pieces.state, expected.state)
