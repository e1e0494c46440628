# SPDX-License-Identifier: Apache-2.0
"""The same function with smaller matrices, for AdamW at its usual rates.

Muon leaves matrices of a root mean square near 0.4 (`stlm-3m`), ten times that of a BERT. AdamW moves every weight by about the
rate, whatever its size, so at the usual rates such matrices hardly turn. Every matrix follows a norm, with at most a
homogeneous function between: its size can be moved into the scale of that norm.

    rescale(model)  # then any optimizer, or `save_pretrained`
"""

import math

import torch
from torch import nn

from modeling_stlm.layers_stlm import (
    STLMAttention,
    STLMByteLayer,
    STLMShortConv,
    STLMTrunkAttentionBlock,
    STLMTrunkFeedForwardBlock,
)
from modeling_stlm.modeling_stlm import STLMPreTrainedModel


USUAL = 0.04  # root mean square of the matrices of a BERT or a GPT-2, which the usual rates are for
DEGREES = {"relu": 1, "relu2": 2}  # f(c x) = c**degree f(x) for c > 0


@torch.no_grad()
def rescale(model: STLMPreTrainedModel, size: float = USUAL) -> STLMPreTrainedModel:
    """Bring the matrices of the layers to a root mean square near `size`, in place. The function stays the same.

    Factors are powers of two, so weights keep all their bits. Embeddings and heads are left as they are.

    Raises:
        ValueError: if passes of the trunk have matrices of their own (`sharing_lora_rank`).
    """
    config = model.config
    if config.sharing_lora_rank:
        raise ValueError(
            f"sharing_lora_rank={config.sharing_lora_rank}: expected 0, passes without matrices of their own"
        )
    degree = DEGREES.get(config.hidden_act)
    for module in model.modules():
        if isinstance(module, STLMByteLayer):
            shrink_mixer(module.mixer_norm, module.mixer, size)
        elif isinstance(module, STLMTrunkAttentionBlock):
            shrink_mixer(module.attention_norm, module.attention, size)
        if isinstance(module, STLMByteLayer | STLMTrunkFeedForwardBlock):
            feed_forward = module.feed_forward
            outer = [feed_forward.down_proj] if degree else []
            shrink(module.feed_forward_norm, [feed_forward.up_proj], outer, degree or 1, size)
    base = model.base_model
    shrink(base.trunk.final_norm, [base.patcher.byte_proj], [], 1, size)
    return model


def shrink_mixer(norm: nn.Module, mixer: nn.Module, size: float) -> None:
    if isinstance(mixer, STLMShortConv):  # the product of two gates and what they let pass
        shrink(norm, [mixer.in_proj], [mixer.out_proj], 3, size)
    elif isinstance(mixer, STLMAttention):  # queries and keys have norms of their own
        shrink(norm, [mixer.q_proj, mixer.k_proj, mixer.v_proj], [mixer.o_proj], 1, size)


def shrink(norm: nn.Module, inner: list[nn.Linear], outer: list[nn.Linear], degree: int, size: float) -> None:
    """Divide the matrices after a norm, and those after a function of them of that degree; the norm's scale makes up for it."""
    scale = power_of_two(inner, size)
    more = power_of_two(outer, size, degree)
    norm.weight *= scale * more
    for linear in inner:
        linear.weight /= scale
    for linear in outer:
        linear.weight /= more**degree


def power_of_two(linears: list[nn.Linear], size: float, degree: int = 1) -> float:
    """The one whose power of that degree brings the root mean square of the matrices closest to `size`."""
    values = torch.cat([linear.weight.flatten() for linear in linears]) if linears else torch.zeros(1)
    mean_square = float(values.float().square().mean())
    return 2.0 ** round(math.log2(mean_square**0.5 / size) / degree) if mean_square else 1.0
