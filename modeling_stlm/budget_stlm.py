# SPDX-License-Identifier: Apache-2.0
"""Parameters by group and FLOPs per byte: one source for README, presets, benchmarks and tests."""

from torch import nn


class BudgetMixin:
    """Adds `parameter_budget` and `flops_per_byte` to the models."""

    def parameter_budget(self) -> dict[str, dict[str, int]]:
        """Parameters by group, `{"stored": {...}, "effective": {...}}`, each with a `"total"`.

        Stored parameters are those of the checkpoint. Effective ones count a block of the trunk once per pass, and the
        tied head in addition to the embedding: what an untied model of the same computation would store.
        """
        base = self.base_model
        groups = {
            "byte embedding": [base.embed_tokens],
            "n-gram embedding": [*filter(None, [base.ngram_embedding])],
            "match embedding": [*filter(None, [base.match_embedding])],
            "in-context n-gram embedding": [*filter(None, [base.context_ngram_embedding])],
            "local encoder": [base.local_encoder],
            "patching": [base.patcher],
            "trunk": [base.trunk],
            "local decoder": [base.local_decoder, base.final_norm],
        }
        stored = {name: sum(map(_count, modules)) for name, modules in groups.items()}
        stored["heads"] = sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in base.parameters())
        stored["total"] = sum(stored.values())
        total = sum(p.numel() for p in self.parameters())
        assert stored["total"] == total, f"groups sum to {stored['total']}, the model has {total} parameters"

        effective = {name: count for name, count in stored.items() if name != "total"}
        schedule = self.config.trunk_schedule
        own = filter(None, [base.trunk.own_matrices])
        effective["trunk"] = (
            _count(base.trunk.final_norm)
            + sum(map(_count, own))
            + sum(
                _count(base.trunk.attention_blocks[attention]) + _count(base.trunk.feed_forward_blocks[feed_forward])
                for attention, feed_forward in schedule
            )
        )
        head = self.get_output_embeddings()
        if head is not None and self.config.tie_word_embeddings:
            effective["heads"] += head.weight.numel()
        effective["total"] = sum(effective.values())
        return {"stored": stored, "effective": effective}

    def flops_per_byte(self, bytes_per_patch: float, context_bytes: int = 1024) -> float:
        """Floating-point operations of one forward pass, per byte; training costs three times as many.

        A multiply-add counts as two. Counted are matrix products and attention scores; norms, activations and table
        look-ups are not.

        Args:
            bytes_per_patch (`float`): average length of a patch in the text at hand.
            context_bytes (`int`): length of the text, of which attention of the trunk sees half on average, all of it
                with `is_causal=False`, within its window.
        """
        base, config = self.base_model, self.config
        per_byte = 2 * (_matmul_parameters(base.local_encoder) + _matmul_parameters(base.local_decoder))
        per_byte += 2 * config.conv_kernel_size * config.hidden_size * config.byte_mixers.count("conv")
        window = config.attention_window_bytes if config.is_causal else 2 * config.attention_window_bytes - 1
        window = min(window, context_bytes)
        per_byte += 4 * window * config.num_attention_heads * config.head_dim * config.byte_mixers.count("attention")
        for module in filter(None, [base.ngram_embedding, base.patcher.rule]):
            per_byte += 2 * _matmul_parameters(module)
        head = self.get_output_embeddings()
        if head is not None:
            per_byte += 2 * head.weight.numel()
        trunk = base.trunk
        per_patch = 2 * (_matmul_parameters(base.patcher.patch_proj) + _matmul_parameters(base.patcher.byte_proj))
        patches = context_bytes / bytes_per_patch
        beyond = max(0, patches - (config.trunk_window_patches or patches))
        patches_seen = (patches - (beyond and beyond**2 / patches)) / (2 if config.is_causal else 1)
        attention_width = config.trunk_num_attention_heads * config.trunk_head_dim
        per_patch += sum(2 * _matmul_parameters(own) for own in filter(None, [trunk.own_matrices]))
        for attention, feed_forward in config.trunk_schedule:
            per_patch += 2 * _matmul_parameters(trunk.attention_blocks[attention])
            per_patch += 2 * _matmul_parameters(trunk.feed_forward_blocks[feed_forward])
            per_patch += 4 * patches_seen * attention_width
        return per_byte + per_patch / bytes_per_patch


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matmul_parameters(module: nn.Module) -> int:
    return sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))
