# SPDX-License-Identifier: Apache-2.0
"""Slow and obvious: one document at a time, byte by byte, written from the design and not from the code.

Only modules without a notion of patches are borrowed from the model (norms, linear layers, feed-forward, the trunk).
"""

import copy

import torch

from modeling_stlm.patching_stlm import byte_pieces


def kind(byte: int) -> str:
    if byte >= 256:
        return "special"
    if chr(byte) in "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        return "word"
    return "word" if byte >= 128 else "space"


def completes_character(ids: list[int], t: int) -> bool:
    """Whether a character of three or four bytes is complete at t."""
    for length, first, last in ((3, 0xE0, 0xEF), (4, 0xF0, 0xF7)):
        lead = t - length + 1
        if lead >= 0 and first <= ids[lead] <= last and all(0x80 <= b <= 0xBF for b in ids[lead + 1 : t + 1]):
            return True
    return False


def piece_boundaries(ids: list[int], config) -> list[bool]:
    """A patch ends at the byte with which what was read since is the start of no piece."""
    longest = config.max_patch_bytes - 1
    known = {piece[:n] for piece in byte_pieces(config.patch_vocabulary) for n in range(1, longest + 1)} | {
        bytes([b]) for b in range(256)
    }
    ends, read = [], b""
    for byte in ids:
        more = read + bytes([byte]) if byte < 256 else None
        ends.append(more not in known)
        read = more if more in known else bytes([byte]) if byte < 256 else b""
    return ends


def boundaries(ids: list[int], config, routed: list[bool] | None = None) -> list[bool]:
    """`routed` is what the router of "learned" wants."""
    if not config.is_causal:
        ids = [ord("a") if byte == config.mask_token_id else byte for byte in ids]
    if config.patching == "vocabulary":
        ends = piece_boundaries(ids, config)
        return ends if config.is_causal else [*ends[:-1], True]
    ends, characters, since_anchor = [], 0, 0
    for t, byte in enumerate(ids):
        since_anchor += 1
        anchor = kind(byte) == "special"
        cap = config.patch_bytes if config.patching == "fixed" else config.max_patch_bytes
        if config.patching == "learned":
            anchor = anchor or routed[t]
        if config.patching == "spacelike":
            word_ends = kind(byte) == "space" and t > 0 and kind(ids[t - 1]) == "word"
            anchor = anchor or word_ends
            if anchor:
                characters = 0
            elif completes_character(ids, t):
                characters += 1
                anchor = characters % config.max_patch_characters == 0
        ends.append(anchor or since_anchor % cap == 0)
        if anchor:
            since_anchor = 0
    if not config.is_causal:
        ends[-1] = True
    return ends


def patches(ends: list[bool]) -> list[list[int]]:
    """Bytes of each completed patch."""
    done, current = [], []
    for t, end in enumerate(ends):
        current.append(t)
        if end:
            done.append(current)
            current = []
    return done


def ngram_rows(ids: list[int], t: int, config) -> list[int]:
    """Rows of the table of n-grams: one for each length, one for the word that byte t goes on with."""
    grams = [[ids[t - back] if t - back >= 0 else -1 for back in range(order)] for order in config.ngram_orders]
    if config.ngram_word_bytes:
        gram = [ids[t]]
        for back in range(1, config.ngram_word_bytes):
            i = t - back
            word_ends = i >= 0 and (
                kind(ids[i]) == "special" or (kind(ids[i]) == "space" and i > 0 and kind(ids[i - 1]) == "word")
            )
            if i < 0 or word_ends:
                break
            gram.append(ids[i])
        grams.append(gram + [-1] * (config.ngram_word_bytes - len(gram)))
    rows = []
    for table, gram in enumerate(grams):
        digest = 0
        for byte in gram:
            digest = (digest * 65599 + byte + 1) % (2**31 - 1)
        rows.append(digest % config.ngram_rows + config.ngram_rows * table)
    return rows


def ngrams(model, ids: list[int], t: int) -> torch.Tensor:
    """What the n-grams that end at byte t add to its embedding: (D,)."""
    embedding = model.ngram_embedding
    found = embedding.ngram_tables.weight[ngram_rows(ids, t, model.config)]
    return found.sum(0) if embedding.ngram_proj is None else embedding.ngram_proj.weight @ found.flatten()


def matches(model, ids: list[int], t: int) -> torch.Tensor:
    """What the last of the longest earlier places with the same bytes adds to the embedding of byte t: (D,)."""
    n, embedding = model.config.match_bytes, model.match_embedding
    ids, longest, found = [min(id, 256) for id in ids], 0, (0, 0)
    for last in range(t - 1, n - 2, -1):
        length = next((m for m in range(last + 1) if ids[last - m] != ids[t - m]), last + 1)
        doublings = [k for k in range(model.config.match_doublings + 1) if length >= n * 2**k]
        if doublings and n * 2 ** max(doublings) > longest:
            longest, found = n * 2 ** max(doublings), (ids[last + 1] + 1, min(6, length // n))
    return embedding.following.weight[found[0]] + embedding.length.weight[found[1]]


def context_ngrams(model, ids: list[int], t: int) -> torch.Tensor:
    """What followed the last places of the n-grams that end at byte t, added to its embedding: (D,)."""
    config, embedding = model.config, model.context_ngram_embedding
    ids, found = [min(id, 256) for id in ids], []
    for table, n in enumerate(config.context_ngram_orders):
        ends = [s for s in range(n - 1, t) if ids[s - n + 1 : s + 1] == ids[t - n + 1 : t + 1]] if t >= n - 1 else []
        rows = [0] * config.context_ngram_places + [ids[s + 1] + 1 for s in ends]
        rows = [row + 258 * table for row in rows[-config.context_ngram_places :]]
        found.append(embedding.following.weight[rows].mean(0))
    return sum(found)


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Rotary embedding of one head (K,) at one position."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = torch.tensor(position / theta ** (2 * i / x.shape[-1]), dtype=x.dtype)
        out[i] = x[i] * angle.cos() - x[i + half] * angle.sin()
        out[i + half] = x[i + half] * angle.cos() + x[i] * angle.sin()
    return out


def attention(module, x: torch.Tensor, window: int | None) -> torch.Tensor:
    """x (T, D); `window` bytes or patches are seen, all earlier ones if it is `None`."""
    config, num_steps = module.config, len(x)
    heads, kv_heads, width = module.num_heads, module.num_key_value_heads, module.head_dim
    query = module.q_norm(module.q_proj(x).view(num_steps, heads, width))
    key = module.k_norm(module.k_proj(x).view(num_steps, kv_heads, width))
    value = module.v_proj(x).view(num_steps, kv_heads, width)
    query, key = (
        torch.stack(
            [torch.stack([rotate(x[t, h], t, config.rope_theta) for h in range(x.shape[1])]) for t in range(len(x))]
        )
        for x in (query, key)
    )
    rows, reach = [], window or num_steps
    for t in range(num_steps):
        seen = slice(max(0, t - reach + 1), t + 1 if config.is_causal else t + reach)
        out = []
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = key[seen, group] @ query[t, head] / width**0.5
            out.append(scores.softmax(0) @ value[seen, group])
        rows.append(torch.cat(out))
    return module.o_proj(torch.stack(rows))


def feed_forward(module, x: torch.Tensor, activation: str) -> torch.Tensor:
    up = module.up_proj(x)
    return module.down_proj({"relu2": up.clamp(min=0) ** 2, "silu": up / (1 + torch.exp(-up))}[activation])


def short_conv(mixer, x: torch.Tensor, is_causal: bool) -> torch.Tensor:
    num_after = 0 if is_causal else (mixer.kernel_size - 1) // 2
    gate_in, gate_out, inputs = mixer.in_proj(x).chunk(3, dim=-1)
    inputs = gate_in * inputs
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(inputs[0])
        for tap in range(mixer.kernel_size):
            s = t + num_after - (mixer.kernel_size - 1 - tap)
            if 0 <= s < len(x):
                row = row + mixer.conv.weight[:, 0, tap] * inputs[s]
        rows.append(row)
    return mixer.out_proj(gate_out * torch.stack(rows))


def byte_layer(layer, x: torch.Tensor, config) -> torch.Tensor:
    normed = layer.mixer_norm(x)
    if hasattr(layer.mixer, "q_proj"):
        x = x + attention(layer.mixer, normed, config.attention_window_bytes)
    else:
        x = x + short_conv(layer.mixer, normed, config.is_causal)
    return x + feed_forward(layer.feed_forward, layer.feed_forward_norm(x), config.hidden_act)


def own_block(module, block, i: int, kind: int):
    """A block with the weights that it has in pass i."""
    if module.own_matrices is None or not module.own_matrices[i][kind]:
        return block
    block = copy.deepcopy(block)
    for name, linear in block.named_modules():
        if isinstance(linear, torch.nn.Linear):
            narrow, wide = module.own_matrices[i][kind][name.split(".")[-1]]
            linear.weight.data += (wide.weight @ narrow.weight).data
    return block


def trunk(module, x: torch.Tensor, config) -> torch.Tensor:
    """x (P, G)."""
    for i, (attention_block, feed_forward_block) in enumerate(config.trunk_schedule):
        block = own_block(module, module.attention_blocks[attention_block], i, 0)
        x = x + attention(block.attention, block.attention_norm(x), config.trunk_window_patches)
        block = own_block(module, module.feed_forward_blocks[feed_forward_block], i, 1)
        x = x + feed_forward(block.feed_forward, block.feed_forward_norm(x), config.hidden_act)
    return module.final_norm(x)


def router(module, x: torch.Tensor) -> list[float]:
    """How unlike each byte of x (T, D) is to the one before it: 0 the same direction, 1 the opposite one."""
    sure = [0.5]
    for t in range(1, len(x)):
        query, key = module.q_proj(x[t]), module.k_proj(x[t - 1])
        sure.append(float(1 - query @ key / query.norm() / key.norm()) / 2)
    return sure


def hidden_states(model, ids: list[int]) -> torch.Tensor:
    """Last hidden state (T, D) of `STLMModel` for one document."""
    config = model.config
    x = model.embed_tokens.weight[ids]
    if model.ngram_embedding is not None:
        x = torch.stack([row + ngrams(model, ids, t) for t, row in enumerate(x)])
    if model.match_embedding is not None:
        x = torch.stack([row + matches(model, ids, t) for t, row in enumerate(x)])
    if model.context_ngram_embedding is not None:
        x = torch.stack([row + context_ngrams(model, ids, t) for t, row in enumerate(x)])
    for layer in model.local_encoder:
        x = byte_layer(layer, x, config)
    patcher = model.patcher
    sure = router(patcher.rule, x) if config.patching == "learned" else None
    done = patches(boundaries(ids, config, sure and [p >= 0.5 for p in sure]))
    seen = [patcher.start.weight] * len(ids)
    if done:
        pooled = torch.stack([torch.cat([x[patch].mean(0), x[patch[-1]]]) for patch in done])
        out = patcher.byte_proj(trunk(model.trunk, patcher.patch_proj(pooled), config))  # (P, D)
        if sure:
            for p in range(1, len(done)):
                share = sure[done[p][-1]]
                if share >= 0.5:  # an end that the cap or a special token made is taken whole
                    out[p] = share * out[p] + (1 - share) * out[p - 1]
        for t in range(len(ids)):
            if config.is_causal:
                complete = [p for p, patch in enumerate(done) if patch[-1] <= t]
            else:
                complete = [p for p, patch in enumerate(done) if t in patch]
            if complete:
                seen[t] = out[complete[-1]]
    x = x + torch.stack(seen)
    for layer in model.local_decoder:
        x = byte_layer(layer, x, config)
    return model.final_norm(x)


def logits(language_model, ids: list[int]) -> torch.Tensor:
    """(T, V)"""
    return hidden_states(language_model.model, ids) @ language_model.lm_head.weight.T
