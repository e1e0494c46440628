# SPDX-License-Identifier: Apache-2.0
"""Adapters of peft, on layers that are called several times among others."""

import itertools
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import Trainer

from modeling_stlm import STLMCommittee, STLMForCausalLM
from modeling_stlm.training.corpus import PackedWindows, write_corpus

from .tiny import SHARING, TEXT, assert_equal, ids_of, randomize, tiny_config
from .trainers import TOKENIZER, arguments, losses


IDS = torch.tensor([ids_of(TEXT)])
ROWS = torch.tensor([ids_of(TEXT)[start : start + 50] for start in (0, 20, 45)])
KINDS = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


def tiny_base(sharing: str = "middle", **overrides) -> STLMForCausalLM:
    return randomize(STLMForCausalLM(tiny_config(**SHARING[sharing], **overrides)))


def lora(**options) -> LoraConfig:
    # Adapters that start as random matrices: with those that start as nothing, everything would be equal.
    return LoraConfig(**({"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options))


def adapted(base: STLMForCausalLM, **options) -> PeftModel:
    return get_peft_model(base, lora(**options)).eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, ids: torch.Tensor = IDS, **kwargs) -> torch.Tensor:
    return model(ids, **kwargs).logits


def origin(name: str, schedule: list[tuple[int, int]]) -> str:
    """Name in the model with shared layers of what is called `name` in a model with a layer for every pass."""

    def shared(match: re.Match) -> str:
        kind, number = match.groups()
        return f"{kind}_blocks.{schedule[int(number)][kind == 'feed_forward']}."

    return re.sub(r"(attention|feed_forward)_blocks\.(\d+)\.", shared, name)


def with_a_layer_for_every_pass(model: PeftModel, **options) -> PeftModel:
    """The same function of the same weights, adapters included, without any sharing: the slow truth."""
    schedule = model.config.trunk_schedule
    apart = adapted(STLMForCausalLM(tiny_config(num_trunk_layers=len(schedule))), **options)
    state = model.state_dict()
    apart.load_state_dict({name: state[origin(name, schedule)] for name in apart.state_dict()})
    return apart


def test_all_linear_is_every_matrix_but_the_head():
    model = adapted(tiny_base())
    found = {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    linear = {name for name, module in tiny_base().named_modules() if isinstance(module, torch.nn.Linear)}
    assert found == linear - {"lm_head"}
    assert {name.split(".")[1] for name in found} == {
        "ngram_embedding",
        "local_encoder",
        "patcher",
        "trunk",
        "local_decoder",
    }


def test_adapters_of_a_committee_leave_the_heads_of_its_members_alone():
    committee = STLMCommittee.from_members([tiny_base(), tiny_base()])
    untouched = logits_of(committee)
    model = adapted(committee, exclude_modules=r".*\.lm_head", task_type="CAUSAL_LM")
    found = {name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    linear = {name for name, module in committee.named_modules() if type(module) is torch.nn.Linear}
    assert not any("lm_head" in name for name in found) and {"members.0.lm_head", "members.1.lm_head"} <= linear
    expected = logits_of(model)
    assert (expected - untouched).abs().max() > 0.1
    assert_equal(logits_of(model.merge_and_unload()), expected)


@KINDS
@pytest.mark.parametrize("sharing", [name for name in SHARING if name != "none"])
def test_an_adapter_of_a_shared_layer_gets_the_gradients_of_all_its_passes(sharing, use_dora):
    model = adapted(tiny_base(sharing), use_dora=use_dora)
    apart = with_a_layer_for_every_pass(model, use_dora=use_dora)
    schedule, direction = model.config.trunk_schedule, torch.randn(1, IDS.shape[1], 320, dtype=torch.double)
    outputs = [each.double()(IDS).logits for each in (model, apart)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-9, atol=1e-9)
    for output in outputs:
        (output * direction).sum().backward()
    expected: dict[str, torch.Tensor] = {}
    passes: dict[str, int] = {}
    for name, parameter in apart.named_parameters():
        if parameter.requires_grad:
            name = origin(name, schedule)
            expected[name] = expected.get(name, 0) + parameter.grad
            passes[name] = passes.get(name, 0) + 1
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == expected.keys() and max(passes.values()) > 1
    for name, parameter in trained.items():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-7)


@KINDS
def test_merged_weights_give_the_logits_of_the_adapter(use_dora):
    model = adapted(tiny_base(), use_dora=use_dora)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert type(merged) is STLMForCausalLM
    assert_equal(logits_of(merged), expected)
    assert (logits_of(tiny_base()) - expected).abs().max() > 0.1


@KINDS
def test_without_its_adapters_the_model_is_what_it_was(use_dora):
    base = tiny_base()
    expected, state = logits_of(base), {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, use_dora=use_dora)
    assert (logits_of(model) - expected).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    base = model.unload()
    assert type(base) is STLMForCausalLM and base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert torch.equal(logits_of(base), expected)


@KINDS
def test_an_adapter_trains_generates_saves_and_loads(tmp_path, use_dora):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora))
    windows = PackedWindows(write_corpus(tmp_path / "corpus.bin", [TEXT] * 3, TOKENIZER), TOKENIZER, block_size=64)
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=20), train_dataset=windows)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    model.eval()
    options = {"input_ids": IDS, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**options, use_cache=True), model.generate(**options, use_cache=False))
    model.save_pretrained(tmp_path / "adapter")
    fresh = STLMForCausalLM.from_pretrained(tmp_path / "base")
    unchanged = logits_of(fresh)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert (logits_of(loaded) - unchanged).abs().max() > 0.1


@pytest.mark.parametrize("names", [["model.embed_tokens"], ["lm_head"]], ids=["embedding", "head"])
def test_a_trained_copy_of_the_embedding_stays_tied_to_the_head(tmp_path, names):
    base = tiny_base()
    base(IDS, labels=IDS).loss.backward()
    gradient = base.model.embed_tokens.weight.grad.clone()  # through both ends of the model
    base.save_pretrained(tmp_path / "base")
    # Adapters that start as nothing, so that this is the base's gradient.
    options = {"modules_to_save": names, "ensure_weight_tying": True, "init_lora_weights": True}
    model = adapted(base, **options)
    copy = model.get_input_embeddings().modules_to_save["default"].weight
    assert model.get_output_embeddings().modules_to_save["default"].weight is copy
    assert [name for name, _ in model.named_parameters() if "modules_to_save" in name] == [
        "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    ]
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(copy.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())

    with torch.no_grad():
        copy.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    fresh = STLMForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    expected = logits_of(model)
    assert torch.equal(logits_of(loaded), expected)
    with model.disable_adapter():
        assert (logits_of(model) - expected).abs().max() > 0.1
    merged = loaded.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_equal(logits_of(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert_equal(logits_of(STLMForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_embed_tokens_without_a_path_names_no_other_table():
    # peft compares how names end.
    model = adapted(tiny_base(), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    saved = [name.split(".")[-4] for name, _ in model.named_parameters() if "modules_to_save" in name]
    assert saved == ["embed_tokens"]


def two_adapters() -> PeftModel:
    model = adapted(tiny_base())
    model.add_adapter("second", lora(r=2))
    return model.eval()


def test_adapters_switch():
    model = two_adapters()
    first = logits_of(model)
    model.set_adapter("second")
    second = logits_of(model)
    assert (first - second).abs().max() > 0.1
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits_of(model), second)


def test_every_row_has_its_own_adapter():
    model, names = two_adapters(), ["second", "__base__", "default"]
    mixed = logits_of(model, ROWS, adapter_names=names)
    generated = model.generate(
        input_ids=ROWS, adapter_names=names, max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None
    )
    for row, name in enumerate(names):
        alone = ROWS[row : row + 1]
        if name == "__base__":
            with model.disable_adapter():
                expected, new = logits_of(model, alone), greedy(model, alone)
        else:
            model.set_adapter(name)
            expected, new = logits_of(model, alone), greedy(model, alone)
        assert_equal(mixed[row : row + 1], expected)
        assert torch.equal(generated[row : row + 1], new)


def greedy(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None)


def test_an_adapter_for_each_row_refuses_a_cache():
    # With a cache pooling and the trunk run for the rows whose patch just ended, and peft counts rows in every layer. It
    # refuses rather than giving a row the adapter of another; `use_cache=False` is the way, as the test above has it.
    with pytest.raises(
        ValueError, match=r"`adapter_names` should be the same as the number of inputs, but got 3 and \d"
    ):
        two_adapters().generate(
            input_ids=ROWS, adapter_names=["second", "__base__", "default"], max_new_tokens=12, use_cache=True
        )


FEED_FORWARD = r"model\.trunk\.feed_forward_blocks\.1\.feed_forward\.(up|down)_proj"


def adapt_only_pass(model: PeftModel, number: int, num_passes: int) -> None:
    """Let the adapter of a shared layer work in one of its passes.

    peft gives every row the adapter named in `adapter_names`; a hook names that of the pass. Passes are counted by
    calls, so not with gradient checkpointing, which calls again in the backward pass, and not when merged.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            calls = itertools.count()

            def name_adapter(module, args, kwargs, calls=calls):
                name = "default" if next(calls) % num_passes == number else "__base__"
                return args, kwargs | {"adapter_names": [name] * len(args[0])}

            module.register_forward_pre_hook(name_adapter, with_kwargs=True)


@pytest.mark.parametrize("number", range(3))
def test_an_adapter_on_one_pass_of_a_shared_layer(number):
    model = adapted(tiny_base(), target_modules=FEED_FORWARD)
    everywhere = logits_of(model)
    # The reference has a layer for every pass, with adapters of nothing in the other passes.
    apart = with_a_layer_for_every_pass(model, target_modules=FEED_FORWARD.replace("1", "[123]"))
    passes = [i for i, (_, block) in enumerate(model.config.trunk_schedule) if block == 1]
    assert passes == [1, 2, 3]
    with torch.no_grad():
        for name, parameter in apart.named_parameters():
            if "lora_B" in name and f"feed_forward_blocks.{passes[number]}." not in name:
                parameter.zero_()
    adapt_only_pass(model, number, len(passes))
    expected = logits_of(apart)
    assert_equal(logits_of(model), expected)
    assert (expected - everywhere).abs().max() > 0.1

    apart_gradients = {}
    for each in (model, apart):
        each(IDS, labels=IDS).loss.backward()
    for name, parameter in apart.named_parameters():
        if parameter.requires_grad and f"feed_forward_blocks.{passes[number]}." in name:
            apart_gradients[origin(name, model.config.trunk_schedule)] = parameter.grad
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == apart_gradients.keys() and len(gradients) == 4
    for name, gradient in gradients.items():
        largest = gradient.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(gradient, apart_gradients[name], rtol=0, atol=1e-4 * largest)

    options = {"input_ids": IDS, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**options), apart.generate(**options, use_cache=False))


def test_what_peft_cannot_do_on_one_pass_of_a_shared_layer():
    model = adapted(tiny_base(), target_modules=FEED_FORWARD, use_dora=True)
    adapt_only_pass(model, 0, 3)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA is enabled"):
        logits_of(model)
    # Copies of layers that share weights would give every pass its own adapters, but peft looks for `model.layers`.
    with pytest.raises(ValueError, match="Could not locate the layers attribute"):
        adapted(tiny_base(), layer_replication=[[0, 2], [1, 3]])


def test_an_adapter_folder_is_small_and_names_no_shared_layer_twice(tmp_path):
    model = adapted(tiny_base())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in trained.values())
    assert sum("trunk.feed_forward_blocks" in name for name in saved) == 2 * 2 * 3


@pytest.mark.parametrize("options", [{"trainable_token_indices": [116]}, {"target_modules": ["embed_tokens"]}])
def test_embeddings_of_an_adapter_are_known_for_their_ids(options):
    model = adapted(tiny_base(), **({"target_modules": ["q_proj", "up_proj"]} | options))
    if "trainable_token_indices" in options:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens" in name:
                    parameter.add_(0.5)
    embeds = model.get_input_embeddings()(IDS)
    assert_equal(logits_of(model, None, inputs_embeds=embeds), logits_of(model))
