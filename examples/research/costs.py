# SPDX-License-Identifier: Apache-2.0
"""Effective parameters and floating-point operations per byte, of STLM and of a Llama."""

import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from modeling_stlm import STLMForCausalLM


@torch.no_grad()
def bytes_per_patch(model: STLMForCausalLM, windows: torch.Tensor) -> float:
    """Average length of the patches of `windows (B, T)`."""
    was_training = model.training
    boundaries = model.eval().model(windows, output_boundaries=True, use_cache=False).boundaries
    model.train(was_training)
    return windows.numel() / int(boundaries.sum())


def effective_parameters(model: PreTrainedModel) -> int:
    """What an untied model of the same computation would store."""
    if isinstance(model, STLMForCausalLM):
        return model.parameter_budget()["effective"]["total"]
    return model.num_parameters() + model.lm_head.weight.numel() * model.config.tie_word_embeddings


def flops_per_byte(model: PreTrainedModel, bytes_per_unit: float, context_bytes: int = 1024) -> float:
    """Of one forward pass; training costs three times as many. A unit is a patch of STLM or a token of a Llama."""
    if isinstance(model, STLMForCausalLM):
        return model.flops_per_byte(bytes_per_unit, context_bytes)
    return llama_flops_per_token(model, context_bytes / bytes_per_unit) / bytes_per_unit


def llama_flops_per_token(model: LlamaForCausalLM, context_tokens: float) -> float:
    config = model.config
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    attention = 4 * context_tokens / 2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 2 * (matrices + config.vocab_size * config.hidden_size) + attention
