# SPDX-License-Identifier: Apache-2.0
"""A smaller model from the weights of a larger one (PanGu-pi Pro, arXiv:2402.02791), and a deeper one from a shallower.

`inherit` takes layers evenly, first and last included, and within them the heads, neurons and channels that matter most.
The paper also learns masks: of the 6.0 points that these gain over random weights in its ablation, importance by l2 gains
4.9 and by Taylor 5.8. `grow` adds residual blocks that are the identity at the start.
"""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import nn

from modeling_stlm.batching_stlm import STLMBatch
from modeling_stlm.configuration_stlm import STLMConfig
from modeling_stlm.embedding_stlm import STLMNgramEmbedding
from modeling_stlm.layers_stlm import OutputProjection
from modeling_stlm.modeling_stlm import STLMPreTrainedModel


LAYER = re.compile(r"\b(local_encoder|local_decoder|attention_blocks|feed_forward_blocks)\.(\d+)\b")
SAME = (
    "vocab_size",
    "patching",
    "ngram_orders",
    "ngram_word_bytes",
    "hidden_act",
    "conv_kernel_size",
    "is_causal",
    "match_bytes",
    "match_doublings",
    "context_ngram_orders",
    "context_ngram_places",
    "trunk_head_dim",
    "trunk_window_patches",
    "num_labels",
    "rope_theta",
    "norm_eps",
    "tie_word_embeddings",
)
OF_ATTENTION = ("head_dim", "attention_window_bytes")  # the same where bytes attend
AT_MOST = (
    "hidden_size",
    "intermediate_size",
    "num_local_encoder_layers",
    "num_local_decoder_layers",
    "trunk_hidden_size",
    "trunk_intermediate_size",
)
# `grow` may change these: depth, and what plays no part in the function.
FREE_TO_GROW = {
    "num_local_encoder_layers",
    "num_local_decoder_layers",
    "byte_mixers",
    "num_trunk_layers",
    "num_unique_trunk_layers",
    "layer_sharing",
    "num_hidden_layers",
    "hidden_dropout",
    "attention_dropout",
    "classifier_dropout",
    "initializer_range",
    "ratio_loss_weight",
    "max_position_embeddings",
    "use_cache",
}
# What a model without them may get: the field that says so, the module, and a field that tells more. They start at zero.
ADDED = {
    "match_bytes": ("match_embedding", "match_doublings"),
    "context_ngram_orders": ("context_ngram_embedding", "context_ngram_places"),
}

Scores = dict[str, torch.Tensor]
Block = tuple[str, int]  # list of blocks and index


def inherit(
    model: STLMPreTrainedModel,
    config: STLMConfig,
    importance: Literal["l2", "taylor"] = "l2",
    data: Iterable[dict[str, torch.Tensor]] | None = None,
) -> STLMPreTrainedModel:
    """A model of the class of `model` with the sizes of `config`, made of slices of the weights of `model`.

    Stored blocks of the trunk, and layers of the local encoder and decoder, are sampled evenly; the first and the last
    one are kept. Feed-forward neurons, channels of convolutions and heads (key/value heads with their best queries) are
    chosen in each layer; `hidden_size`, `trunk_hidden_size` and `ngram_embedding_size` once for all matrices that share
    them. With a config of the same sizes and lengths of patches the function stays the same. Embeddings of
    matches and of in-context n-grams that `model` does not have start at zero.

    N-gram tables of another number of rows: see [`merge_rows`] and, given `data`, [`rehash`].

    Args:
        config (`STLMConfig`): not larger than that of `model` in any size; of the same vocabulary, patching, n-grams and
            widths of heads; tied where `model` is.
        importance (`str`, defaults to `"l2"`):
            Of a slice: the sum of its squared weights, or the sum of `|weight * gradient|` over its weights, the
            first-order Taylor estimate of what the loss on `data` would change without them.
        data (iterable of `dict`, *optional*): batches with `labels`, read once. With `"l2"` for n-gram tables only.

    Raises:
        ValueError: if a field of `config` does not allow it (it is named), if `model` has adapters that are not merged,
            or if `"taylor"` comes without data.
    """
    check_sizes(model.config, config)
    if importance not in ("l2", "taylor"):
        raise ValueError(f"importance={importance!r} must be 'l2' or 'taylor'")
    smaller = type(model)(copy.deepcopy(config)).to(device=model.device, dtype=model.dtype)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sources = present({name: source_of(name, model, smaller) for name, _ in smaller.named_parameters()}, model)
    scores = {name: weight.float().square() for name, weight in weights.items()}
    gradients, rows = {}, None
    if data is not None:
        gradients, rows = read_data(model, smaller, data, importance == "taylor")
    if importance == "taylor":
        if not gradients:
            raise ValueError("importance='taylor' needs data: batches with labels, and there was none")
        scores = {name: (weight.float() * gradients[name]).abs() for name, weight in weights.items()}

    kept = choose(smaller, sources, scores, model.config)
    with torch.no_grad():
        for name, parameter in smaller.named_parameters():
            if name not in sources:
                parameter.zero_()
                continue
            weight = weights[sources[name]]
            for axis, along in enumerate(axes_of(sources[name], model.config)):
                if along is not None:
                    weight = (
                        members(weight, axis, along).index_select(axis + 1, kept[along.group]).flatten(axis, axis + 2)
                    )
            if name.endswith("ngram_tables.weight") and weight.shape != parameter.shape:
                weight = resize_tables(weight, model.config.ngram_rows, config.ngram_rows, rows)
            parameter.copy_(weight)
    return finish(smaller, model)


def check_sizes(larger: STLMConfig, smaller: STLMConfig) -> None:
    """Raise a `ValueError` that names the first field that keeps a model of `smaller` from inheriting."""
    check_own_matrices(larger, smaller)
    has_attention = "attention" in smaller.byte_mixers
    for name, value in kinds_of(larger, has_attention).items():
        if name in fields_to_add(larger):
            continue  # new ones start at zero
        if value != (got := kinds_of(smaller, has_attention)[name]):
            raise ValueError(f"cannot inherit: expected {name}={value!r}, got {got!r}")
    for name, size in sizes_of(larger, has_attention).items():
        if size < (got := sizes_of(smaller, has_attention)[name]):
            raise ValueError(f"cannot inherit: expected {name} of at most {size}, got {got}")


def fields_to_add(config: STLMConfig) -> set[str]:
    """Those of embeddings that a model of `config` does not have."""
    return {name for field, (_, of) in ADDED.items() if not getattr(config, field) for name in (field, of)}


def check_own_matrices(*configs: STLMConfig) -> None:
    if ranks := [config.sharing_lora_rank for config in configs if config.sharing_lora_rank]:
        raise ValueError(
            f"expected sharing_lora_rank=0, got {ranks[0]}: matrices of passes are neither cut nor copied"
        )


def kinds_of(config: STLMConfig, has_attention: bool) -> dict:
    """What weights were trained for. Every other field is a size that may shrink, or a length of patches."""
    kinds = {name: getattr(config, name) for name in (*SAME, *(OF_ATTENTION if has_attention else ()))}
    return kinds | {"ngram_embedding_size": None if config.ngram_embedding_size is None else "a number"}


def sizes_of(config: STLMConfig, has_attention: bool) -> dict[str, int]:
    attention, feed_forward = (1 + max(indices) for indices in zip(*config.trunk_schedule))
    sizes = {name: getattr(config, name) for name in AT_MOST} | {
        "ngram_embedding_size": config.ngram_embedding_size or 0,
        "num_unique_trunk_layers (stored attention blocks)": attention,
        "num_unique_trunk_layers (stored feed-forward blocks)": feed_forward,
    }
    for level in ("trunk_", "") if has_attention else ("trunk_",):
        heads, groups = (getattr(config, f"{level}num_{kind}_heads") for kind in ("attention", "key_value"))
        sizes[f"{level}num_key_value_heads"] = groups
        sizes[f"{level}num_attention_heads per key/value head"] = heads // groups
    return sizes


def present(sources: dict[str, str], model: STLMPreTrainedModel) -> dict[str, str]:
    """`sources` without those of `ADDED` that are new; raise a `ValueError` if `model` lacks any other."""
    weights = dict(model.named_parameters())
    missing = {name: source for name, source in sources.items() if source not in weights}
    for name, source in missing.items():
        if not any(f"{module}." in name and not getattr(model.config, field) for field, (module, _) in ADDED.items()):
            raise ValueError(f"the model has no parameter {source}: merge adapters first")
    return {name: source for name, source in sources.items() if name not in missing}


# Layers


def evenly(kept: int, stored: int, only: int) -> list[int]:
    """`kept` of `stored` layers, first and last among them; `only` if it is one."""
    return [only] if kept == 1 else [(i * (stored - 1) + (kept - 1) // 2) // (kept - 1) for i in range(kept)]


def source_of(name: str, larger: STLMPreTrainedModel, smaller: STLMPreTrainedModel) -> str:
    """The parameter of `larger` that parameter `name` of `smaller` is a slice of."""
    found = LAYER.search(name)
    if found is None:
        return name
    kind, index = found[1], int(found[2])
    stored, kept = (layers_of(model)[kind] for model in (larger, smaller))
    # One layer of several: that next to the bytes, in the trunk the one in the middle.
    only = {"local_encoder": 0, "local_decoder": len(stored) - 1}.get(kind, len(stored) // 2)
    source = evenly(len(kept), len(stored), only)[index]
    if kind.startswith("local_") and type(stored[source].mixer) is not type(kept[index].mixer):
        raise ValueError(
            f"cannot inherit: byte_mixers={smaller.config.byte_mixers}, where {kind} layer {index} would inherit from "
            f"layer {source} of byte_mixers={larger.config.byte_mixers}: expected the same mixer"
        )
    return LAYER.sub(f"{kind}.{source}", name)


def layers_of(model: STLMPreTrainedModel) -> dict[str, nn.ModuleList]:
    base = model.base_model
    return {"local_encoder": base.local_encoder, "local_decoder": base.local_decoder} | {
        "attention_blocks": base.trunk.attention_blocks,
        "feed_forward_blocks": base.trunk.feed_forward_blocks,
    }


# Slices


class Axis(NamedTuple):
    """An axis of a parameter along which members of a group are chosen; it is laid out as outer x members x inner."""

    group: str  # a size of the config, or the parts of one module
    outer: int = 1
    inner: int = 1


def axes_of(name: str, config: STLMConfig) -> tuple[Axis | None, ...]:
    """What each axis of a parameter consists of; `None`: it is kept whole."""
    path, _, module = name.rpartition(".")[0].rpartition(".")
    in_trunk = ".trunk." in f".{path}."
    byte_width, trunk_width = Axis("hidden_size"), Axis("trunk_hidden_size")
    width, head_dim = (trunk_width, config.trunk_head_dim) if in_trunk else (byte_width, config.head_dim)
    queries, keys = (Axis(f"{path}.{kind}", inner=head_dim) for kind in ("queries", "keys"))
    channels, neurons, narrow = Axis(f"{path}.channels"), Axis(f"{path}.neurons"), Axis("ngram_embedding_size")
    num_tables = len(config.ngram_orders) + (config.ngram_word_bytes > 0)
    if name.endswith(".bias"):
        return (None,)
    if path.endswith("rule"):  # the router of "learned"
        return width, width
    axes = {
        "embed_tokens": (None, width),
        "lm_head": (None, width),
        "following": (None, width),
        "length": (None, width),
        "ngram_tables": (None, narrow if config.ngram_embedding_size else width),
        "ngram_proj": (width, narrow._replace(outer=num_tables)),
        "in_proj": (channels._replace(outer=3), width),
        "conv": (channels, None, None),
        "out_proj": (width, channels),
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "q_norm": (None,),
        "k_norm": (None,),
        "up_proj": (neurons, width),
        "down_proj": (width, neurons),
        "patch_proj": (trunk_width, byte_width._replace(outer=2)),  # mean and last byte
        "byte_proj": (byte_width, trunk_width),
        "start": (width,),
        "score": (None, width),
        "qa_outputs": (None, width),
    }
    norms = ("mixer_norm", "attention_norm", "feed_forward_norm", "final_norm")
    return (axes | dict.fromkeys(norms, (width,)))[module]


def members(tensor: torch.Tensor, axis: int, along: Axis) -> torch.Tensor:
    """`tensor` with `axis` split into outer, members and inner."""
    return tensor.unflatten(axis, (along.outer, -1, along.inner))


def choose(
    smaller: STLMPreTrainedModel, sources: dict[str, str], scores: Scores, config: STLMConfig
) -> dict[str, torch.Tensor]:
    """Indices of the members to keep of every group, ascending."""
    totals, counts = defaultdict(float), {}
    for name, source in sources.items():
        for axis, along in enumerate(axes_of(source, config)):
            if along is not None:
                score = members(scores[source], axis, along).transpose(0, axis + 1)
                totals[along.group] = totals[along.group] + score.flatten(1).sum(1)
                counts[along.group] = smaller.get_parameter(name).shape[axis] // (along.outer * along.inner)
    kept = {group: strongest(total, counts[group]) for group, total in totals.items()}
    for group in kept:
        if group.endswith(".queries"):
            keys = group.replace(".queries", ".keys")
            kept[group], kept[keys] = strongest_heads(totals[group], totals[keys], counts[group], counts[keys])
    return kept


def strongest(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.topk(count).indices.sort().values


def strongest_heads(
    queries: torch.Tensor, keys: torch.Tensor, num_heads: int, num_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of query heads and of key/value heads: the strongest queries of the strongest groups.

    Args:
        queries (`torch.Tensor` of shape `(H,)`), keys (`torch.Tensor` of shape `(groups,)`): scores of the heads.
    """
    best = queries.unflatten(0, (len(keys), -1)).topk(num_heads // num_groups, dim=1)  # (groups, queries of a group)
    groups = strongest(keys + best.values.sum(1), num_groups)
    first = torch.arange(len(keys), device=keys.device)[:, None] * (len(queries) // len(keys))
    return (best.indices.sort(1).values + first)[groups].flatten(), groups


def read_data(
    model: STLMPreTrainedModel, smaller: STLMPreTrainedModel, data: Iterable[dict], wants_gradients: bool
) -> tuple[Scores, list[tuple[torch.Tensor, torch.Tensor]] | None]:
    """Gradients of the loss, summed over the batches, and the rows (n,) of both models that n-grams fall into."""
    gradients, rows, was_training = {}, [], model.training
    has_other_rows = (
        model.base_model.ngram_embedding is not None and model.config.ngram_rows != smaller.config.ngram_rows
    )
    model.eval()
    try:
        for batch in data:
            batch = {name: value.to(model.device) for name, value in batch.items()}
            if wants_gradients:
                for name, gradient in gradients_of(model, batch).items():
                    gradients[name] = gradients.get(name, 0) + gradient
            if has_other_rows:
                rows.append(tuple(ngram_rows(one.base_model.ngram_embedding, batch) for one in (model, smaller)))
    finally:
        model.train(was_training)
    return gradients, rows or None


def gradients_of(model: STLMPreTrainedModel, batch: dict[str, torch.Tensor]) -> Scores:
    """Of the loss of a batch, zero where a parameter plays no part; `.grad` stays as it is."""
    loss = model(**batch, use_cache=False).loss
    if loss is None:
        raise ValueError(f"importance='taylor' needs batches with labels, got {sorted(batch)}")
    names, parameters = zip(*model.named_parameters())
    if frozen := [name for name, parameter in zip(names, parameters) if not parameter.requires_grad]:
        raise ValueError(
            f"importance='taylor' needs gradients of all weights, but {frozen[0]} is frozen: requires_grad_()"
        )
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return {name: gradient.float() for name, gradient in zip(names, gradients)}


# N-grams


@torch.no_grad()
def ngram_rows(embedding: STLMNgramEmbedding, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows of the n-gram tables that are looked up for the valid bytes of a batch, flat."""
    names = ("input_ids", "attention_mask", "position_ids")
    ids, mask, positions = (batch[name].flatten(0, -2) if name in batch else None for name in names)
    layout = STLMBatch.of(ids, mask, position_ids=positions)
    context = torch.cat([ids.new_full((len(ids), embedding.longest), -1), layout.compact(ids)], dim=1)
    looked_up = []
    with embedding.ngram_tables.register_forward_pre_hook(lambda _, rows: looked_up.append(rows[0])):
        embedding(context, layout)
    (rows,) = looked_up  # (B, T, tables)
    return rows.flatten() if layout.is_valid is None else rows[layout.is_valid].flatten()


def resize_tables(
    tables: torch.Tensor, old: int, new: int, rows: list[tuple[torch.Tensor, torch.Tensor]] | None
) -> torch.Tensor:
    """`tables (tables * old, E)` with `new` rows each, in float32."""
    merged = torch.cat([merge_rows(table, new) for table in tables.split(old)])
    return merged if rows is None else rehash(tables, merged, rows)


def merge_rows(table: torch.Tensor, num_rows: int) -> torch.Tensor:
    """`table (rows, E)` for n-grams that hash modulo `num_rows`.

    All that is known of an n-gram in row r is that its hash is r modulo `rows`, and so modulo the greatest common divisor
    g of both numbers: a new row is a mean of the old rows that agree with it modulo g. Where `num_rows` divides `rows`,
    these are exactly the rows whose n-grams it gets; where `rows` divides `num_rows`, it is the row of its n-grams.
    Rows weigh by their squared norm, which is small where training saw few n-grams. With a small g little is left:
    choose numbers that divide, and give `data`. `stlm-10m` with the trunk of `stlm-3m` and 7,880 instead of 39,400 rows
    has 3.07 bits per byte by a plain mean, 2.66 by this one, and 2.36 with 64 kB of text, 2.29 with 512 kB.
    """
    common = math.gcd(len(table), num_rows)
    table = table.float().unflatten(0, (-1, common))  # (rows / g, g, E)
    weight = table.square().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((table * weight).sum(0) / weight.sum(0)).repeat(num_rows // common, 1)


def rehash(tables: torch.Tensor, merged: torch.Tensor, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """`merged`, where each row that n-grams of the data fall into is the mean of their old rows over all occurrences."""
    old, new = (torch.cat(indices) for indices in zip(*rows))
    sums = torch.zeros_like(merged).index_add_(0, new, tables.float()[old])
    counts = torch.bincount(new, minlength=len(merged))[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), merged)


# Deeper


def grow(model: STLMPreTrainedModel, config: STLMConfig) -> STLMPreTrainedModel:
    """A deeper model of the class of `model` that computes the same function.

    Passes of the larger depth run copies of the blocks of `model` in their order. Blocks in between are copies of the
    block before them whose output projection is zero: the identity until they are trained. Depth and layer sharing may
    change in any way that leaves room for that; a block that is stored once and shared cannot run more often. Embeddings
    of matches and of in-context n-grams may be added: they start at zero.

    Args:
        config (`STLMConfig`): equal to that of `model` but for depth, layer sharing and dropout; embeddings of matches and
            of in-context n-grams may be added where there are none.

    Raises:
        ValueError: if another field differs, if no choice of new blocks leaves the function as it is, or if `model` has
            adapters that are not merged.
    """
    check_own_matrices(model.config, config)
    free = FREE_TO_GROW | fields_to_add(model.config)
    for name in sorted(STLMConfig.__annotations__.keys() - free | {"num_labels"}):
        expected, got = (getattr(one, name) for one in (model.config, config))
        if expected != got:
            raise ValueError(f"cannot grow: expected {name}={expected!r}, got {got!r}; only depth may change")
    deeper = type(model)(copy.deepcopy(config)).to(device=model.device, dtype=model.dtype)
    copies, new = plan_growth(model.config, config)
    blocks = {name: block_of(name) for name, _ in deeper.named_parameters()}
    sources = {name: name for name, block in blocks.items() if block is None}
    sources |= {n: LAYER.sub("{}.{}".format(*copies[block]), n) for n, block in blocks.items() if block in copies}
    sources = present(sources, model)
    with torch.no_grad():
        for name, parameter in deeper.named_parameters():
            block = blocks[name]
            if block in new and isinstance(deeper.get_submodule(name.rpartition(".")[0]), OutputProjection):
                parameter.zero_()
            elif name in sources:
                parameter.copy_(model.get_parameter(sources[name]))
            elif block is None:
                parameter.zero_()
    return finish(deeper, model)


def block_of(name: str) -> Block | None:
    """List and index of the block that a parameter belongs to."""
    found = LAYER.search(name)
    return None if found is None else (found[1], int(found[2]))


class Step(NamedTuple):
    """A residual block that runs."""

    block: Block
    mixer: str = ""  # of a layer of bytes


def steps_of(config: STLMConfig) -> list[list[Step]]:
    """The residual blocks of local encoder, trunk and local decoder in the order in which they run."""
    num_encoder, num_byte_layers = config.num_local_encoder_layers, config.num_byte_layers
    layers = [("local_encoder", i) for i in range(num_encoder)]
    layers += [("local_decoder", i) for i in range(num_byte_layers - num_encoder)]
    layers = [Step(block, mixer) for block, mixer in zip(layers, config.byte_mixers)]
    trunk = [
        Step(block)
        for attention, feed_forward in config.trunk_schedule
        for block in (("attention_blocks", attention), ("feed_forward_blocks", feed_forward))
    ]
    return [layers[:num_encoder], trunk, layers[num_encoder:]]


def plan_growth(shallow: STLMConfig, deep: STLMConfig) -> tuple[dict[Block, Block], set[Block]]:
    """For each stored block of the deep model the block it is a copy of, and those that start as the identity.

    A new block of a kind that does not run before it (a mixer that is new) is no copy and keeps its fresh weights.
    """
    copies, new = {}, set()
    for target, source in zip(steps_of(deep), steps_of(shallow), strict=True):
        found = align(tuple(target), tuple(source))
        if found is None:
            raise ValueError(
                f"cannot grow: expected new stored blocks between those of the model, which run as {describe(source)}, got "
                f"{describe(target)}. Store more blocks (num_unique_trunk_layers): one that is shared cannot run more "
                "often without a change of the function"
            )
        before = {}  # the last copied block of each kind
        for step, copied in zip(target, found):
            kind = step.block[0], step.mixer
            if copied is not None:
                before[kind] = copies[step.block] = copied.block
            elif step.block not in new:
                new.add(step.block)
                copies |= {step.block: before[kind]} if kind in before else {}
    return copies, new


def describe(steps: list[Step]) -> str:
    return steps[0].block[0] + " " + " ".join(step.mixer or str(step.block[1]) for step in steps)


def align(target: tuple[Step, ...], source: tuple[Step, ...]) -> tuple[Step | None, ...] | None:
    """For each step of `target` the step of `source` that it runs, or `None` for the identity.

    Those that are not the identity are `source`, in order; a block is the same every time it runs. Among the ways to do
    that, the first and last step of `source` stay first and last if possible, and the others are spread evenly.
    """
    unit = 2 if target[0].block[0] == "attention_blocks" else 1  # steps of a layer
    num_deep, num_shallow = len(target) // unit, len(source) // unit

    @cache
    def rest(t: int, s: int, decided: tuple[tuple[Step, Step | None], ...]) -> tuple[Step | None, ...] | None:
        """The same for `target[t:]` and `source[s:]`, given what was decided for blocks that run again."""
        if len(target) - t < len(source) - s:
            return None
        if t == len(target):
            return ()
        step, choices = target[t], dict(decided)
        fits = s < len(source) and (step.block[0], step.mixer) == (source[s].block[0], source[s].mixer)
        copied = [source[s]] if fits else []
        is_due = t // unit * (num_shallow - 1) >= s // unit * (num_deep - 1)
        for choice in [*copied, None] if is_due else [None, *copied]:
            if choices.get(step, choice) != choice:
                continue
            later = tuple(
                (one, chosen) for one, chosen in (choices | {step: choice}).items() if one in target[t + 1 :]
            )
            if (tail := rest(t + 1, s + (choice is not None), later)) is not None:
                return choice, *tail
        return None

    return rest(0, 0, ())


def finish(model: STLMPreTrainedModel, source: STLMPreTrainedModel) -> STLMPreTrainedModel:
    """`model` with the mode and the generation config of `source`."""
    if source.can_generate():
        model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)
