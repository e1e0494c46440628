# SPDX-License-Identifier: Apache-2.0
"""Training with moved embeddings equals the same training by hand, and leaves nothing behind."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer

from modeling_stlm.training.adversarial import AdversarialTrainer

from .tiny import randomize, tiny_config
from .trainers import RAGGED, TOKENIZER, arguments, assert_same_training, losses, weights


DATA = [{"input_ids": ids, "labels": i % 2} for i, ids in enumerate(RAGGED)]
PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "max_steps": 1, "learning_rate": 0.5}


def classifier():
    return randomize(AutoModelForSequenceClassification.from_config(tiny_config(is_causal=False, num_labels=2)))


def trainer_of(folder, model, trainer_class=AdversarialTrainer, norm=None, data=DATA, **options):
    keywords = {} if norm is None else {"norm": norm}
    return trainer_class(
        model,
        arguments(folder, **(PLAIN | options)),
        train_dataset=data,
        processing_class=TOKENIZER,
        **keywords,
    )


def gradients(model, rows) -> dict[str, torch.Tensor]:
    """Of the mean loss of the rows, one after the other and without padding."""
    for row in rows:
        loss = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        (loss / len(rows)).backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    return found


def tables_of(model) -> dict[str, torch.nn.Parameter]:
    ends = ("embed_tokens.weight", "ngram_tables.weight", "following.weight", "length.weight")
    return {name: value for name, value in model.named_parameters() if name.endswith(ends)}


def both_halves(model, rows, norm) -> dict[str, torch.Tensor]:
    """Gradients of the rows as they are plus those with all tables moved by `norm` along their gradient."""
    first = gradients(model, rows)
    tables = tables_of(model)
    assert len(tables) == 4
    length = torch.cat([first[name].flatten() for name in tables]).norm()
    for name, table in tables.items():
        table.data += norm * first[name] / length
    second = gradients(model, rows)
    for name, table in tables.items():
        table.data -= norm * first[name] / length
    return {name: value + second[name] for name, value in first.items()}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_that_of_both_halves(accumulate, tmp_path):
    model, reference = classifier(), classifier()
    start, size = weights(model), 6 // accumulate
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate, "seed": 3}
    trainer = trainer_of(tmp_path, model, norm=3.0, train_sampling_strategy="sequential", **options)
    trainer.train()
    plain = gradients(reference, DATA)
    batches = [DATA[i : i + size] for i in range(0, 6, size)]
    steps = [both_halves(reference, batch, 3.0) for batch in batches]
    step = {name: sum(each[name] for each in steps) / len(steps) for name in plain}
    assert max((step[name] - 2 * plain[name]).abs().max() for name in plain) > 1e-3  # the move matters
    with torch.no_grad():
        for name, value in reference.named_parameters():
            value -= 0.5 * step[name]
    assert_same_training(model, reference, start)


def test_without_a_move_it_is_plain_training(tmp_path):
    models = [classifier(), classifier()]
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2}
    ours = trainer_of(tmp_path, models[0], norm=0, **options)
    plain = trainer_of(tmp_path, models[1], Trainer, **options)
    for trainer in (ours, plain):
        trainer.train()
    assert losses(ours) == losses(plain) != []
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one, other)


def test_an_error_in_the_second_half_leaves_the_weights_as_they_were(tmp_path):
    model = classifier()
    start, calls = weights(model), []

    def fail_at_the_second(module, args):
        calls.append({name: value.detach().clone() for name, value in tables_of(model).items()})
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    model.model.trunk.register_forward_pre_hook(fail_at_the_second)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer_of(tmp_path, model, norm=2.0).train()
    moved = torch.cat([(calls[1][name] - calls[0][name]).flatten() for name in calls[0]]).norm()
    torch.testing.assert_close(moved, torch.tensor(2.0))
    for name, value in model.named_parameters():
        assert torch.equal(value, start[name])


def test_what_it_refuses(tmp_path):
    for norm in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"norm={norm} must be at least 0 and finite"):
            trainer_of(tmp_path, classifier(), norm=norm)
    model = classifier()
    for table in tables_of(model).values():
        table.requires_grad_(False)
    with pytest.raises(ValueError, match="no embedding table of STLMForSequenceClassification is trained"):
        trainer_of(tmp_path, model)
