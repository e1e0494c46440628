# SPDX-License-Identifier: Apache-2.0
"""A step with perturbed embeddings equals the same step by hand."""

import copy
from contextlib import contextmanager

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, Trainer, default_data_collator

from modeling_stlm import STLMForCausalLM, STLMForMultipleChoice
from modeling_stlm.training import adversarial
from modeling_stlm.training.adversarial import AdversarialTrainer, hooked_output, perturbation

from .tiny import batch, ids_of, randomize, tiny_config
from .trainers import RAGGED, TOKENIZER, arguments, assert_same_training, losses, weights


DATA = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(RAGGED)]
PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 1, "learning_rate": 0.5}
EPSILON = 4.0


def classifier():
    return randomize(AutoModelForSequenceClassification.from_config(tiny_config(is_causal=False, num_labels=2)))


def trainer_of(folder, model, trainer_class=AdversarialTrainer, data=DATA, epsilon=None, **options):
    keywords = {} if epsilon is None else {"epsilon": epsilon}
    return trainer_class(
        model, arguments(folder, **(PLAIN | options)), train_dataset=data, processing_class=TOKENIZER, **keywords
    )


def perturbed_loss(model, row, smoothing: float = 0.0) -> torch.Tensor:
    """Half the loss of a row as it is and half that of the row with perturbed embeddings, without padding."""
    ids, label = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    seen, changes = [], [0]

    def look_up(module, args, output):
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        seen.append(output)
        return output + changes[-1]

    handle = model.get_input_embeddings().register_forward_hook(look_up)
    first = F.cross_entropy(model(ids).logits, label, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(first, seen, retain_graph=True)
    unit = seen[0].detach().square().mean().sqrt()
    changes.append(EPSILON * unit * gradient / gradient.norm())
    second = F.cross_entropy(model(ids).logits, label, label_smoothing=smoothing)
    handle.remove()
    assert second > first + 1e-4, "the perturbation raises the loss"
    return (first + second) / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, {"activation_checkpointing": True}],
    ids=["batch", "accumulated", "checkpointing"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_is_the_mean_of_rows_as_they_are_and_perturbed(options, smoothing, tmp_path):
    model, reference = classifier(), classifier()
    start = weights(model)
    options = {"per_device_train_batch_size": 6, "label_smoothing_factor": smoothing} | options
    trainer = trainer_of(tmp_path, model, epsilon=EPSILON, **options)
    trainer.train()
    losses_by_hand = [perturbed_loss(reference, row, smoothing) for row in DATA]
    sum(losses_by_hand).div(len(DATA)).backward()
    with torch.no_grad():
        for value in reference.parameters():
            value -= 0.5 * value.grad
    assert_same_training(model, reference, start)
    assert losses(trainer) == pytest.approx([sum(losses_by_hand).item() / len(DATA)], abs=1e-4)
    hooks = [hook.__module__ for hook in model.get_input_embeddings()._forward_hooks.values()]
    assert AdversarialTrainer.__module__ not in hooks


def test_with_epsilon_zero_it_is_plain_training(tmp_path):
    models = [classifier(), classifier()]
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    ours = trainer_of(tmp_path, models[0], epsilon=0, **options)
    plain = trainer_of(tmp_path, models[1], Trainer, **options)
    for trainer in (ours, plain):
        trainer.train()
    assert losses(ours) == losses(plain) != []
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one, other)


def test_evaluation_is_that_of_the_library(tmp_path):
    model = classifier()
    scores = [
        trainer_of(tmp_path, model, kind, **keywords).evaluate(DATA)["eval_loss"]
        for kind, keywords in ((AdversarialTrainer, {"epsilon": EPSILON}), (Trainer, {}))
    ]
    assert scores[0] == scores[1]


def test_padding_is_not_perturbed_and_counts_for_nothing():
    model, rows = classifier(), RAGGED[:3]
    layer, expected = model.get_input_embeddings(), []

    def perturbation_of(inputs):
        seen = []
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output) or output.retain_grad())
        model(**inputs).logits.square().sum().backward()
        handle.remove()
        return perturbation(seen[0], EPSILON)

    for ids in rows:
        expected.append(perturbation_of({"input_ids": torch.tensor([ids])})[0])
    padded = perturbation_of(batch(rows, "right"))
    for row, alone in zip(padded, expected):
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=1e-3)
        assert not row[len(alone) :].any()


@pytest.mark.parametrize("gradient", [0.0, float("inf"), float("nan")])
def test_rows_without_a_finite_gradient_stay(gradient):
    embeddings = torch.randn(2, 3, 4, dtype=torch.float16, requires_grad=True)
    embeddings.grad = torch.full((2, 3, 4), gradient, dtype=torch.float16)
    embeddings.grad[1] = 1e-7  # the squares are zero in float16
    found = perturbation(embeddings, 2.0)
    assert not found[0].any()
    length = 2.0 * embeddings[1].detach().float().square().mean().sqrt()
    torch.testing.assert_close(found[1].float().norm(), length, rtol=2e-3, atol=0)


@pytest.mark.parametrize("saved", [None, ["score", "embed_tokens"]], ids=["frozen", "trained"])
def test_adapters_train_with_perturbed_embeddings(saved, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=saved, init_lora_weights=False
    )
    model = peft.get_peft_model(classifier(), config)
    reference, start = copy.deepcopy(model), weights(model)
    options = {"per_device_train_batch_size": 6, "label_names": ["labels"]}
    trainer_of(tmp_path, model, epsilon=EPSILON, **options).train()
    (sum(perturbed_loss(reference, row) for row in DATA) / len(DATA)).backward()
    trained = [value for value in reference.parameters() if value.requires_grad]
    with torch.no_grad():
        for value in trained:
            value -= 0.5 * value.grad
    assert len(trained) == (6 if saved else 5)
    assert_same_training(model, reference, start)


def test_each_choice_is_a_row(tmp_path):
    seen, model = [], randomize(STLMForMultipleChoice(tiny_config(is_causal=False)))
    ids = [ids_of("one choice"), ids_of("another on")]
    units = model.get_input_embeddings()(torch.tensor(ids)).square().mean((1, 2)).sqrt()
    model.model.local_encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    data = [{"input_ids": ids, "attention_mask": [[1] * 10] * 2, "labels": 0}]
    trainer = trainer_of(tmp_path, model, epsilon=EPSILON, data=data, per_device_train_batch_size=1)
    trainer.data_collator = default_data_collator
    trainer.train()
    torch.testing.assert_close((seen[1] - seen[0]).norm(dim=(1, 2)), EPSILON * units.detach())


def test_a_tied_head_stays_where_it_is(tmp_path):
    model, heads = randomize(STLMForCausalLM(tiny_config())), []
    model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(module.weight.detach().clone()))
    data = [{"input_ids": ids_of("some words"), "labels": ids_of("some words")}]
    trainer_of(tmp_path, model, epsilon=EPSILON, data=data, per_device_train_batch_size=1).train()
    assert len(heads) == 2 and torch.equal(*heads)


def test_evaluation_while_training_sees_the_model_as_it_is(tmp_path):
    model = classifier()
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = AdversarialTrainer(
        model,
        arguments(tmp_path, **(PLAIN | options)),
        train_dataset=DATA,
        eval_dataset=DATA,
        processing_class=TOKENIZER,
        epsilon=EPSILON,
    )
    trainer.train()
    found = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert found[-1] == pytest.approx(trainer_of(tmp_path, model, Trainer).evaluate(DATA)["eval_loss"], abs=1e-6)
    assert len(found) == 2 and found[0] != found[1]


def test_what_it_refuses(tmp_path):
    for epsilon in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"epsilon={epsilon} must be at least 0 and finite"):
            trainer_of(tmp_path, classifier(), epsilon=epsilon)
    for optimizer in ("lomo", "galore_adamw_layerwise"):
        with pytest.raises(ValueError, match=f"two backward passes, optim='{optimizer}' changes them: use epsilon=0"):
            trainer_of(tmp_path, classifier(), epsilon=1, optim=optimizer)
    prompted = peft.get_peft_model(
        classifier(),
        peft.PromptTuningConfig(
            task_type="SEQ_CLS", num_virtual_tokens=2, num_layers=1, token_dim=16, num_attention_heads=2
        ),
    )
    with pytest.raises(ValueError, match="prompt tuning passes embeddings"):
        trainer_of(tmp_path, prompted, epsilon=1)
    trainer_of(tmp_path, prompted, epsilon=0)


def test_a_loss_without_one_look_up_is_refused(tmp_path):
    model = classifier()
    looked_up = model.get_input_embeddings()(torch.tensor(RAGGED[0])).detach()
    options = PLAIN | {"remove_unused_columns": False}
    trainer = AdversarialTrainer(
        model, arguments(tmp_path, **options), train_dataset=[{"inputs_embeds": looked_up, "labels": 1}], epsilon=1
    )
    with pytest.raises(
        ValueError, match=r"one look-up in Embedding of \w+\.get_input_embeddings\(\), found 0: pass input_ids"
    ):
        trainer.train()

    twice = classifier()
    embed = twice.get_input_embeddings()
    twice.model.final_norm.register_forward_hook(
        lambda module, args, output: output + embed(torch.zeros(output.shape[:2], dtype=torch.long))
    )
    with pytest.raises(ValueError, match="found 2"):
        trainer_of(tmp_path, twice, epsilon=1).train()


def test_a_second_pass_that_looks_nothing_up_is_told(tmp_path, monkeypatch):
    model, calls = classifier(), []

    @contextmanager
    def first_alone(layer, function):
        calls.append(function)
        if len(calls) > 1:
            yield
            return
        with hooked_output(layer, function):
            yield

    monkeypatch.setattr(adversarial, "hooked_output", first_alone)
    with pytest.raises(ValueError, match="the second pass did not look up what the first did"):
        trainer_of(tmp_path, model, epsilon=1).train()
