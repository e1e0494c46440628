# SPDX-License-Identifier: Apache-2.0
"""A step with moved embeddings equals the same step by hand, and the model is as before."""

import copy

import peft
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, Trainer

from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.adversarial import AdversarialTrainer, adversarial_move

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


def moved_loss(model, row, smoothing: float = 0.0) -> torch.Tensor:
    """Half the loss of a row as it is and half that of the row with moved embeddings, without padding."""
    ids, label = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    seen, moves = [], [0]

    def look_up(module, args, output):
        seen.append(output)
        return output + moves[-1]

    handle = model.get_input_embeddings().register_forward_hook(look_up)
    first = F.cross_entropy(model(ids).logits, label, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(first, seen, retain_graph=True)
    unit = seen[0].detach().square().mean().sqrt()
    moves.append(EPSILON * unit * gradient / gradient.norm())
    second = F.cross_entropy(model(ids).logits, label, label_smoothing=smoothing)
    handle.remove()
    assert second > first + 1e-4, "the move raises the loss"
    return (first + second) / 2


@pytest.mark.parametrize(
    "options",
    [{}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, {"activation_checkpointing": True}],
    ids=["batch", "accumulated", "checkpointing"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_step_is_the_mean_of_rows_as_they_are_and_moved(options, smoothing, tmp_path):
    model, reference = classifier(), classifier()
    start = weights(model)
    options = {"per_device_train_batch_size": 6, "label_smoothing_factor": smoothing} | options
    trainer = trainer_of(tmp_path, model, epsilon=EPSILON, **options)
    trainer.train()
    losses_by_hand = [moved_loss(reference, row, smoothing) for row in DATA]
    sum(losses_by_hand).div(len(DATA)).backward()
    with torch.no_grad():
        for value in reference.parameters():
            value -= 0.5 * value.grad
    assert_same_training(model, reference, start)
    assert losses(trainer) == pytest.approx([sum(losses_by_hand).item() / len(DATA)], abs=1e-4)
    hooks = [hook.__module__ for hook in model.get_input_embeddings()._forward_hooks.values()]
    assert AdversarialTrainer.__module__ not in hooks


def test_without_a_move_it_is_plain_training(tmp_path):
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


def test_padding_is_not_moved_and_counts_for_nothing():
    model, rows = classifier(), RAGGED[:3]
    layer, moves = model.get_input_embeddings(), []

    def move_of(inputs):
        seen = []
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output) or output.retain_grad())
        model(**inputs).logits.square().sum().backward()
        handle.remove()
        return adversarial_move(seen[0], EPSILON)

    for ids in rows:
        moves.append(move_of({"input_ids": torch.tensor([ids])})[0])
    padded = move_of(batch(rows, "right"))
    for row, move in zip(padded, moves):
        torch.testing.assert_close(row[: len(move)], move, atol=1e-5, rtol=1e-3)
        assert not row[len(move) :].any()


@pytest.mark.parametrize("gradient", [0.0, float("inf"), float("nan")])
def test_rows_without_a_finite_gradient_stay(gradient):
    embeddings = torch.randn(2, 3, 4, dtype=torch.float16, requires_grad=True)
    embeddings.grad = torch.full((2, 3, 4), gradient, dtype=torch.float16)
    embeddings.grad[1] = 1e-7  # the squares are zero in float16
    move = adversarial_move(embeddings, 2.0)
    assert not move[0].any()
    expected = 2.0 * embeddings[1].detach().float().square().mean().sqrt()
    torch.testing.assert_close(move[1].float().norm(), expected, rtol=2e-3, atol=0)


def test_adapters_train_with_moved_embeddings(tmp_path):
    trained = {}
    for epsilon in (0, EPSILON):
        torch.manual_seed(0)
        model = peft.get_peft_model(classifier(), peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS"))
        assert not model.get_input_embeddings().weight.requires_grad
        trainer = trainer_of(tmp_path, model, epsilon=epsilon, per_device_train_batch_size=6, label_names=["labels"])
        trainer.train()
        trained[epsilon] = (
            losses(trainer)[0],
            copy.deepcopy(model.base_model.model.score.modules_to_save.default.weight),
        )
    assert trained[EPSILON][0] > trained[0][0] + 1e-4
    assert not torch.allclose(trained[EPSILON][1], trained[0][1])


def test_a_tied_head_stays_where_it_is(tmp_path):
    model, heads = randomize(STLMForCausalLM(tiny_config())), []
    model.lm_head.register_forward_pre_hook(lambda module, args: heads.append(module.weight.detach().clone()))
    data = [{"input_ids": ids_of("some words"), "labels": ids_of("some words")}]
    trainer_of(tmp_path, model, epsilon=EPSILON, data=data, per_device_train_batch_size=1).train()
    assert len(heads) == 2 and torch.equal(*heads)


def test_what_it_refuses(tmp_path, monkeypatch):
    for epsilon in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"epsilon={epsilon} must be at least 0 and finite"):
            trainer_of(tmp_path, classifier(), epsilon=epsilon)
    with pytest.raises(ValueError, match="use torch_compile=False or epsilon=0"):
        trainer_of(tmp_path, classifier(), epsilon=1, torch_compile=True)
    model = classifier()
    embedded = [{"inputs_embeds": model.get_input_embeddings()(torch.tensor(RAGGED[0])).detach(), "labels": 1}]
    trainer = AdversarialTrainer(
        model, arguments(tmp_path, **PLAIN, remove_unused_columns=False), train_dataset=embedded, epsilon=1
    )
    with pytest.raises(ValueError, match="no embedding that was looked up: pass input_ids"):
        trainer.train()
    monkeypatch.setattr(type(arguments(tmp_path)), "n_gpu", 2)
    with pytest.raises(ValueError, match="expected a process for each GPU, got one for 2"):
        trainer_of(tmp_path, model, epsilon=1)
