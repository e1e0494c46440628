# SPDX-License-Identifier: Apache-2.0
"""Whatever wraps modules (offloading, adapters, observers, averages) sees every module on every path."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import DynamicCache, StaticCache

from modeling_stlm import STLMForCausalLM, STLMForMaskedLM

from .tiny import MIXERS, PATCHING, TEXT, assert_equal, batch, ids_of, randomize, tiny_config, tiny_model


IDS = torch.tensor([ids_of(TEXT)])
POSITIONS = torch.cat([torch.arange(30), torch.arange(IDS.shape[1] - 30)])[None]
CASES = [
    pytest.param(options, id=name)
    for name, options in {**PATCHING, **MIXERS, "encoder": {"is_causal": False, **MIXERS["both"]}}.items()
]


def build(options) -> torch.nn.Module:
    config = tiny_config(**options)
    return randomize((STLMForCausalLM if config.is_causal else STLMForMaskedLM)(config))


def paths(model) -> dict:
    """What runs the model in every way there is."""

    def crop_and_go_on():
        cache = DynamicCache(config=model.config)
        model(IDS[:, :40], cache=cache)
        cache.crop(-7)
        return model(IDS[:, 33:40], cache=cache)

    def step(make, num_past: int, num_new: int):
        cache = make()
        model(IDS[:, :num_past], cache=cache)
        return lambda: model(IDS[:, num_past : num_past + num_new], cache=cache)

    dynamic = lambda: DynamicCache(config=model.config)  # noqa: E731
    static = lambda: StaticCache(config=model.config, max_cache_len=IDS.shape[1])  # noqa: E731
    at_end = 3  # of "The ", which completes a patch, so that the trunk runs
    ways = {
        "long": lambda: model(IDS),
        "short": lambda: model(IDS[:, :5]),
        "packed": lambda: model(IDS, position_ids=POSITIONS),
        "padded": lambda: model(**batch([ids_of(TEXT), ids_of("ab cd")], "left")),
        "training": lambda: model.train()(IDS, labels=IDS).loss.backward() or model.eval(),
    }
    if model.config.is_causal:
        ways |= {
            "step": step(dynamic, at_end, 1),
            "chunk": step(dynamic, 20, 30),
            "static": step(static, at_end, 1),
            "crop": crop_and_go_on,
        }
    return ways


@pytest.mark.parametrize("options", CASES)
def test_every_module_with_weights_is_called_on_every_path(options):
    if options.get("patching") == "fixed":
        options = options | {"patch_bytes": 4}
    model = build(options)
    called, leaves = set(), {}
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            leaves[name] = module
            module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    assert len(leaves) > 20
    for way, run in paths(model).items():
        called.clear()
        run()
        missing = set(leaves) - called
        if way in ("step", "chunk", "static", "crop"):
            missing.discard("model.patcher.start")  # the state of the rows has it
        if way in ("step", "static") and options.get("patching") in (
            "learned",
            "vocabulary",
        ):  # may not end a patch at that byte
            missing = {name for name in missing if "trunk" not in name and "_proj" not in name}
        assert not missing, f"{way}: {sorted(missing)}"


@pytest.mark.parametrize(
    "kind", ["cpu", "disk", "device map", "device map, trunk on disk", "device map, half the trunk on disk"]
)
@torch.no_grad()
def test_offloaded_weights_write_the_same_bytes(kind, tmp_path):
    expected, model = tiny_model(use_cache=True, **MIXERS["both"]), tiny_model(use_cache=True, **MIXERS["both"])
    device = torch.device("cpu")
    if kind == "cpu":
        model = cpu_offload(model, execution_device=device)
    elif kind == "disk":
        model = disk_offload(model, str(tmp_path), execution_device=device)
    else:
        device_map = {"model.embed_tokens": "cpu", "model.ngram_embedding": "disk", "model.local_encoder": "disk"}
        device_map |= {"model.patcher": "disk", "model.local_decoder": "disk"}
        device_map |= {
            "model.match_embedding": "disk",
            "model.context_ngram_embedding": "disk",
            "model.final_norm": "disk",
            "lm_head": "cpu",
        }
        if "half" in kind:
            device_map |= {"model.trunk.attention_blocks": "cpu", "model.trunk.feed_forward_blocks": "disk"}
            device_map["model.trunk.final_norm"] = "disk"
        else:
            device_map["model.trunk"] = "disk" if "trunk" in kind else "cpu"
        model = dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    for text in (TEXT, "x", "ab cd"):
        ids = torch.tensor([ids_of(text)])
        assert_equal(model(ids).logits, expected(ids).logits)
        options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


@pytest.mark.parametrize(
    "adapter",
    [
        LoHaConfig(r=4, target_modules=["conv"], init_weights=False),
        LoKrConfig(r=4, target_modules=["conv"], init_weights=False),
        LoHaConfig(r=4, target_modules=["conv", "q_proj", "up_proj"], init_weights=False),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        LoraConfig(r=4, target_modules=["embed_tokens", "ngram_tables"], init_lora_weights=False),
    ],
    ids=["LoHa conv", "LoKr conv", "LoHa mixed", "LoRA linear", "LoRA embeddings"],
)
@torch.no_grad()
def test_adapters_act_the_same_in_long_and_short_calls(adapter):
    plain = tiny_model(**MIXERS["both"])
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(**MIXERS["both"]), adapter).eval()
    whole = model(input_ids=IDS, use_cache=False).logits
    assert (whole - plain(IDS).logits).abs().max() > 0.1, "the adapter does nothing"
    for sizes in ((1,), (5, 1, 20)):
        cache, parts, start = DynamicCache(config=plain.config), [], 0
        while start < IDS.shape[1]:
            end = min(IDS.shape[1], start + sizes[len(parts) % len(sizes)])
            parts.append(model(input_ids=IDS[:, start:end], cache=cache).logits)
            start = end
        assert_equal(torch.cat(parts, 1), whole)
    positions = torch.arange(IDS.shape[1]).repeat(2)[None]
    packed = model(input_ids=IDS.repeat(1, 2), position_ids=positions).logits
    assert_equal(packed[:, IDS.shape[1] :], whole)


@pytest.mark.parametrize("patching", PATCHING)
@torch.no_grad()
def test_the_average_of_equal_models_is_the_model(patching):
    model = tiny_model(**PATCHING[patching])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    assert_equal(average(IDS).logits, model(IDS).logits)
    assert not list(model.buffers()), "constants that are buffers are averaged and cast"


def test_no_module_name_with_weights_ends_another():
    # peft matches some of its options by the end of a name.
    names = set()
    for options in ({}, PATCHING["learned"], MIXERS["both"]):
        for name, module in build(options).named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                names.add(name.rpartition(".")[2])
    assert {"embed_tokens", "ngram_tables", "q_proj", "conv"} <= names
    assert not [(a, b) for a in names for b in names if a != b and a.endswith(b)]


def test_training_one_row_of_the_embedding_trains_no_other_table():
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [262, 263]})
    model = get_peft_model(tiny_model(**MIXERS["both"]), config)
    tokens = [name for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens" in name]
    assert tokens and all("embed_tokens" in name or "lm_head" in name for name in tokens), tokens
