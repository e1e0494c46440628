# SPDX-License-Identifier: Apache-2.0
"""Match embeddings and in-context n-grams: for each byte, what followed where the same bytes stood before."""

import random

import pytest
import torch
from transformers import DynamicCache

from modeling_stlm.embedding_stlm import last_equal

from .tiny import batch, tiny_model


def slow_match(ids: list[int], t: int, n: int, doublings: int = 0) -> tuple[int, int]:
    """Id that followed the last of the longest matches plus one, and class of its length; zeros if there is none."""
    found = {}  # doublings of n that a match has at least: of the last such place
    for last in range(t - 1, n - 2, -1):
        length = 0
        while length <= last and ids[last - length] == ids[t - length]:
            length += 1
        for doubling in range(doublings + 1):
            if length >= n * 2**doubling:
                found.setdefault(doubling, (ids[last + 1] + 1, min(6, length // n)))
    return found[max(found)] if found else (0, 0)


def telling_model(n: int, doublings: int = 0):
    """A model whose match embedding is what was found, in two channels."""
    model = tiny_model(match_bytes=n, match_doublings=doublings)
    for channel, table in enumerate((model.model.match_embedding.following, model.model.match_embedding.length)):
        table.weight.data.zero_()
        table.weight.data[:, channel] = torch.arange(len(table.weight))
    return model


def outputs_of(module: torch.nn.Module, model, calls) -> torch.Tensor:
    """What a module of `model` gives over several calls with one cache: (B, T, D)."""
    found = []
    handle = module.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        for inputs in calls:
            model(**inputs)
    handle.remove()
    return torch.cat(found, 1)


def told(model, *calls: dict) -> list[list[tuple[int, int]]]:
    """For each row, what each byte is told, over several calls with one cache."""
    found = outputs_of(model.model.match_embedding, model, calls)
    return [[(int(byte), int(length)) for byte, length, *_ in row] for row in found]


def repetitive(num_bytes: int, seed: int = 0) -> list[int]:
    """Ids among four, a special token among them, with a long copy at the end."""
    choice = random.Random(seed)
    ids = [choice.choice([97, 97, 98, 256]) for _ in range(num_bytes * 3 // 5)]
    return ids + ids[: num_bytes - len(ids)]


@pytest.mark.parametrize("n", range(2, 7))
@pytest.mark.parametrize("doublings", [0, 1, 3])
def test_bytes_are_told_what_followed_the_last_match_and_its_length(n, doublings):
    ids = repetitive(150)
    expected = [slow_match(ids, t, n, doublings) for t in range(len(ids))]
    assert {length for _, length in expected} >= {0, 1, 6}
    assert doublings != 1 or expected != [slow_match(ids, t, n) for t in range(len(ids))]
    assert told(telling_model(n, doublings), {"input_ids": torch.tensor([ids])}) == [expected]


def test_a_long_match_goes_before_a_later_short_one():
    ids = [*b"one two; a two, one two"]
    assert slow_match(ids, len(ids) - 1, 3)[0] == ord(",") + 1
    assert slow_match(ids, len(ids) - 1, 3, 1) == (ord(";") + 1, 2)
    assert told(telling_model(3, 1), {"input_ids": torch.tensor([ids])})[0][-1] == (ord(";") + 1, 2)


def test_all_special_tokens_are_alike_and_match():
    model = telling_model(2)
    assert told(model, {"input_ids": torch.tensor([[258, 97, 98, 259, 97]])}) == [[(0, 0)] * 4 + [(99, 1)]]


@pytest.mark.parametrize("sizes", [[1] * 60, [40, 1, 1, 18], [3, 5, 20, 1, 31]])
def test_matches_reach_back_into_earlier_calls(sizes):
    ids, model = repetitive(60), telling_model(2, 2)
    cache, calls = DynamicCache(config=model.config), torch.tensor([ids]).split(sizes, dim=1)
    expected = [slow_match(ids, t, 2, 2) for t in range(len(ids))]
    assert told(model, *({"input_ids": call, "cache": cache} for call in calls)) == [expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_there(side):
    texts, model = [repetitive(60), repetitive(35, seed=1)], telling_model(3, 1)
    inputs = batch(texts, side)
    rows = told(model, inputs | {"cache": DynamicCache(config=model.config)})  # compact: valid bytes first
    for text, row in zip(texts, rows):
        assert row[: len(text)] == [slow_match(text, t, 3, 1) for t in range(len(text))]


def test_matches_stay_in_their_document():
    documents, model = [repetitive(30), repetitive(25), repetitive(40)], telling_model(3, 2)
    inputs = {
        "input_ids": torch.cat([torch.tensor(ids) for ids in documents])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents])[None],
    }
    assert told(model, inputs) == [[slow_match(ids, t, 3, 2) for ids in documents for t in range(len(ids))]]


def test_embeddings_of_no_byte_match_nothing():
    model = telling_model(2)
    ids = torch.tensor([[97, 98, 97, 98, 97, 98, 97, 98]])
    embeds = model.model.embed_tokens(ids).detach()
    embeds[:, 4] += 1
    # The last byte matches the fourth, which the vector followed.
    nothing = (0, 0)
    assert told(model, {"inputs_embeds": embeds})[0] == [*[nothing] * 3, (98, 1), nothing, nothing, (99, 1), (0, 1)]


@pytest.mark.parametrize("num_new", [1, 2, 16, 17, 60])
@pytest.mark.parametrize("step", [1, 2])
def test_comparing_and_sorting_find_the_same_place(num_new, step):
    known = torch.randint(0, 4, (3, 60), generator=torch.Generator().manual_seed(0))
    index = torch.arange(60 - num_new, 60).expand(3, -1)

    def last(row: list[int], t: int, count: int) -> int:
        back = range(0, count * step, step)
        is_same = (s for s in range(back[-1], t) if all(row[s - b] == row[t - b] for b in back))
        return max(is_same, default=-1)

    expected = [
        [[last(row, t, count) for t in range(60 - num_new, 60)] for row in known.tolist()] for count in (1, 2, 4)
    ]
    found = last_equal(known, known.gather(1, index), index, step, 2)
    assert [places.tolist() for places in found] == expected


def test_a_longer_match_stays_in_its_document():
    documents = [[*b"xxab"], [*b"cd! cd? abcd"]]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    inputs = {"input_ids": torch.tensor([[*documents[0], *documents[1]]]), "position_ids": positions}
    expected = [slow_match(document, t, 2, 1) for document in documents for t in range(len(document))]
    assert told(telling_model(2, 1), inputs) == [expected]


PLACES = 3


def slow_followers(ids: list[int], t: int, n: int) -> list[int]:
    """Ids plus one that followed the last `PLACES` places of the n ids up to t, sorted, zeros for what is missing."""
    ends = [s for s in range(n - 1, t) if ids[s - n + 1 : s + 1] == ids[max(0, t - n + 1) : t + 1]]
    found = [ids[s + 1] + 1 for s in ends[-PLACES:]]
    return sorted([0] * (PLACES - len(found)) + found)


def followers(ids: list[int], orders: list[int]) -> list[list[list[int]]]:
    return [[slow_followers(ids, t, n) for n in orders] for t in range(len(ids))]


LETTERS = [0, 97 + 1, 98 + 1, 256 + 1]  # of `repetitive`, plus one; 0 for no such place


def counting_model(orders: list[int]):
    """A model that is told how often each of `LETTERS` followed, for each length in channels of its own."""
    model = tiny_model(context_ngram_orders=orders, context_ngram_places=PLACES)
    table = model.model.context_ngram_embedding.following.weight.data.zero_()
    for i in range(len(orders)):
        for channel, letter in enumerate(LETTERS):
            table[258 * i + letter, len(LETTERS) * i + channel] = PLACES
    return model


def counted(model, *calls: dict) -> list[list[list[list[int]]]]:
    """For each row, byte and length, the ids that followed."""
    found = outputs_of(model.model.context_ngram_embedding, model, calls)
    num_orders = len(model.config.context_ngram_orders)
    counts = found[..., : num_orders * len(LETTERS)].round().long().unflatten(-1, (num_orders, -1))
    return [
        [[[letter for letter, n in zip(LETTERS, order) for _ in range(n)] for order in byte] for byte in row]
        for row in counts.tolist()
    ]


@pytest.mark.parametrize("orders", [[1, 2, 3, 4], [6, 3], [5]])
@pytest.mark.parametrize("sizes", [[150], [1] * 150, [90, 1, 1, 17, 41], [2, 16, 5, 60, 16, 3, 48]])
def test_bytes_are_told_what_followed_the_last_places(orders, sizes):
    ids, model = repetitive(150), counting_model(orders)
    expected = followers(ids, orders)
    assert all(any(byte[i][j] for byte in expected) for i in range(len(orders)) for j in range(PLACES))
    cache, calls = DynamicCache(config=model.config), torch.tensor([ids]).split(sizes, dim=1)
    assert counted(model, *({"input_ids": call, "cache": cache} for call in calls)) == [expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_followed(side):
    texts, model = [repetitive(60), repetitive(35, seed=1)], counting_model([2, 3])
    inputs = batch(texts, side)
    rows = counted(model, inputs | {"cache": DynamicCache(config=model.config)})  # compact: valid bytes first
    for text, row in zip(texts, rows):
        assert row[: len(text)] == followers(text, [2, 3])


def test_places_stay_in_their_document():
    documents, model = [repetitive(30), repetitive(25), repetitive(40)], counting_model([1, 3])
    inputs = {
        "input_ids": torch.cat([torch.tensor(ids) for ids in documents])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids in documents])[None],
    }
    assert counted(model, inputs) == [[byte for ids in documents for byte in followers(ids, [1, 3])]]


@pytest.mark.parametrize("document", [[97] * 3, [97, 98] * 3, [97] * 4 + [98]])
def test_places_stay_in_their_document_in_a_short_call(document):
    model, num_bytes = counting_model([1, 2]), 2 * len(document)
    assert num_bytes <= 16  # which are compared, not sorted
    inputs = {"input_ids": torch.tensor([2 * document]), "position_ids": torch.arange(len(document)).repeat(1, 2)}
    assert counted(model, inputs) == [2 * followers(document, [1, 2])]


def test_places_are_found_again_after_a_crop():
    ids, model = repetitive(120), counting_model([1, 2, 4])
    cache = DynamicCache(config=model.config)
    counted(model, {"input_ids": torch.tensor([ids[:80] + [97] * 30]), "cache": cache})
    cache.crop(-40)
    rest = counted(model, {"input_ids": torch.tensor([ids[70:]]), "cache": cache})
    assert rest[0][-50:] == followers(ids, [1, 2, 4])[70:]
