# SPDX-License-Identifier: Apache-2.0
"""Weights of eight and four bits through torchao, on the shipped checkpoint."""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerAxis
from transformers import AutoModelForCausalLM, TorchAoConfig

from .test_examples import ROOT
from .tiny import ids_of


SHIPPED = ROOT / "examples" / "checkpoints" / "stlm-3m"
SHAKESPEARE = next((ROOT / "examples" / "data").glob("*.txt")).read_bytes()[:8192]


@torch.no_grad()
def bits_per_byte(model) -> float:
    ids = torch.tensor(list(SHAKESPEARE)).view(-1, 1024)
    return model(ids, labels=ids, use_cache=False).loss.item() / torch.log(torch.tensor(2.0)).item()


@pytest.mark.parametrize(
    ("quantization", "loss"),
    [
        (Int8WeightOnlyConfig(), 0.002),
        # Measured 0.049, and 0.007 before the weights had read ten times as much; eight bits far less.
        (IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0)), 0.07),
    ],
    ids=["int8", "int4"],
)
def test_quantized_weights_load_generate_save_and_load_again(tmp_path, quantization, loss):
    plain = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        SHIPPED, dtype=torch.float32, quantization_config=TorchAoConfig(quantization)
    )
    names = [type(module.weight).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(set(names)) == 2 and names.count("Parameter") == 1, (
        "all linear layers but the head, tied to the embedding"
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before, after = bits_per_byte(plain), bits_per_byte(model)
    print(f"bits per byte {before:.4f} {after:.4f}")
    assert 0 < abs(after - before) < loss * before
    prompt = {"input_ids": torch.tensor([ids_of("The history of the")]), "max_new_tokens": 30, "do_sample": False}
    text = model.generate(**prompt, use_cache=True)
    assert torch.equal(text, model.generate(**prompt, use_cache=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**prompt), text) and bits_per_byte(again) == after
