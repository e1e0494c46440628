# SPDX-License-Identifier: Apache-2.0
"""Tiny models that pool, and the text they are tested on."""

import torch

from modeling_stlm import STLMConfig, STLMForCausalLM


TEXT = (
    "The trunk runs once per patch; 3.5% of all bytes (or so) end one.\n\n"
    "Zoë saw 東京都 and сорок слов… 😀😀😀😀 — aVeryLongWordWithoutAnySpaceInIt_at_all!!!   \tEnd.\n"
)

# Start of a program in which neither package can be imported, also where an editable install has import hooks.
WITHOUT_PACKAGES = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_stlm", "tokenization_stlm"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""

# Difference of float32 logits between two orders of summation, relative to the largest logit: measured below 2e-6.
RTOL = 1e-5

SHARING = {
    "none": {},
    "immediate": {"layer_sharing": "immediate", "num_trunk_layers": 6, "num_unique_trunk_layers": 4},
    "cycle": {"layer_sharing": "cycle", "num_trunk_layers": 4, "num_unique_trunk_layers": 2},
    "middle": {"layer_sharing": "middle", "num_trunk_layers": 5, "num_unique_trunk_layers": 3},
    "ffn": {"layer_sharing": "ffn", "num_trunk_layers": 4, "num_unique_trunk_layers": 3},
}
PATCHING = {
    "spacelike": {},
    "fixed": {"patching": "fixed", "patch_bytes": 5},
    "vocabulary": {
        "patching": "vocabulary",
        "patch_vocabulary": "the Ġtrunk Ġrun Ġper al ong ord æĿ±äº¬ Word ĊĊ <pad>",
    },
    "learned": {"patching": "learned"},
}
MIXERS = {
    "conv": {},
    "attention": {"byte_mixers": ["attention"] * 3, "attention_window_bytes": 6},
    "both": {
        "byte_mixers": ["conv", "attention", "conv"],
        "attention_window_bytes": 9,
        "conv_kernel_size": 3,
        "trunk_window_patches": 3,
    },
}


def tiny_config(**overrides) -> STLMConfig:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_local_encoder_layers": 2,
        "num_local_decoder_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "ngram_rows": 32,
        "ngram_embedding_size": 6,
        "match_bytes": 2,
        "match_doublings": 2,
        "context_ngram_orders": [1, 3],
        "context_ngram_places": 3,
        "max_patch_bytes": 12,
        "trunk_hidden_size": 24,
        "trunk_intermediate_size": 32,
        "trunk_num_attention_heads": 4,
        "num_trunk_layers": 2,
        "use_cache": False,  # a test of the cache asks for it
    }
    return STLMConfig(**(sizes | overrides))


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights everywhere: a fresh model hides mistakes behind output projections of zero.

    With larger matrices the squares of the feed-forward layers multiply rounding: some kinds of CPU come to `RTOL`.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.25 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1))
    return model.eval()


def tiny_model(**overrides) -> STLMForCausalLM:
    return randomize(STLMForCausalLM(tiny_config(**overrides)))


def ids_of(text: str | bytes) -> list[int]:
    return list(text.encode() if isinstance(text, str) else text)


def batch(texts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """Padded `input_ids` and `attention_mask`."""
    longest = max(map(len, texts))
    pads = [longest - len(text) for text in texts]
    left = side == "left"
    return {
        "input_ids": torch.tensor([[256] * p * left + t + [256] * p * (not left) for t, p in zip(texts, pads)]),
        "attention_mask": torch.tensor(
            [[0] * p * left + [1] * len(t) + [0] * p * (not left) for t, p in zip(texts, pads)]
        ),
    }


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of summation."""
    largest = expected.abs().max().item()
    assert largest > 0.1, "logits of nothing prove nothing"
    torch.testing.assert_close(actual, expected, atol=RTOL * largest, rtol=0)
