# SPDX-License-Identifier: Apache-2.0
"""What arguments of `Trainer` and collators of the library promise holds for rows that are patched and padded."""

import optuna
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, Trainer, set_seed

from modeling_stlm import STLMForCausalLM, STLMTokenizer
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator
from modeling_stlm.training.optimizer import MuonRecipe

from .tiny import SHARING, batch, tiny_config, tiny_model
from .trainers import RAGGED, arguments, assert_same_training, losses, weights


ROWS = [{"input_ids": ids} for ids in RAGGED * 2]
NUM_TARGETS = [len(ids) - 1 for ids in RAGGED]
# On the right: on the left, `num_items_in_batch` of the library counts the first byte of a row, which nothing predicts.
PAD = DataCollatorForLanguageModeling(STLMTokenizer(padding_side="right"), mlm=False)


def train(folder, model=None, data_collator=PAD, rows=ROWS, **options) -> Trainer:
    """Steps over `rows` in their order. SGD: the steps of Adam would hide the scale of gradients."""
    set_seed(5)
    options = {"optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential", "max_steps": 3} | options
    model = tiny_model() if model is None else model
    trainer = Trainer(
        model=model.train(), args=arguments(folder, **options), train_dataset=rows, data_collator=data_collator
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("split", [(2, 2), (1, 4)], ids=["2x2", "1x4"])
def test_accumulated_micro_batches_of_ragged_rows_are_the_whole_batch(tmp_path, split):
    start = weights(tiny_model())
    whole = train(tmp_path, per_device_train_batch_size=4)
    parts = train(tmp_path, per_device_train_batch_size=split[0], gradient_accumulation_steps=split[1])
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert_same_training(parts.model, whole.model, start)


def test_flattened_documents_train_as_padded_rows(tmp_path):
    start = weights(tiny_model())
    padded = train(tmp_path, per_device_train_batch_size=4)
    flat = train(
        tmp_path, data_collator=DataCollatorWithFlattening(return_tensors="pt"), per_device_train_batch_size=4
    )
    assert losses(flat) == pytest.approx(losses(padded), rel=1e-5)
    assert_same_training(flat.model, padded.model, start)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_rows_is_that_of_the_rows_alone(side):
    model = tiny_model()
    inputs = DataCollatorForLanguageModeling(STLMTokenizer(padding_side=side), mlm=False)(ROWS[: len(RAGGED)])
    assert inputs["input_ids"].tolist() == batch(RAGGED, side)["input_ids"].tolist()
    assert torch.equal(inputs["labels"] != -100, inputs["attention_mask"] == 1)
    counts = [count for count in NUM_TARGETS if count]
    with torch.no_grad():
        alone = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in RAGGED if len(ids) > 1]
        expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
        assert model(**inputs).loss.item() == pytest.approx(expected, rel=1e-5)
        gap = torch.cat([inputs["input_ids"], inputs["input_ids"][:, :1]], 1)  # of one byte, between two that are seen
        mask = torch.ones_like(gap)
        mask[:, 5] = 0
        ids = [row[keep] for row, keep in zip(gap, mask.bool())]
        whole = torch.stack(ids)
        assert model(gap, mask, labels=gap.masked_fill(mask == 0, -100)).loss.item() == pytest.approx(
            model(whole, labels=whole).loss.item(), rel=1e-5
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_bits_per_byte_of_padded_rows_are_those_of_the_rows_alone(side, tmp_path):
    def evaluate(data_collator, batch_size):
        evaluator = BitsPerByteEvaluator()
        options = {"batch_eval_metrics": True, "per_device_eval_batch_size": batch_size}
        hooks = {"preprocess_logits_for_metrics": evaluator.nats, "compute_metrics": evaluator}
        trainer = Trainer(tiny_model(), arguments(tmp_path, **options), data_collator=data_collator, **hooks)
        found = trainer.evaluate(ROWS)
        return found["eval_bits_per_byte"], found["eval_bytes"]

    pad = DataCollatorForLanguageModeling(STLMTokenizer(padding_side=side), mlm=False)
    alone, num_bytes = evaluate(pad, 1)
    bits, seen = evaluate(pad, len(ROWS))
    assert seen == num_bytes == sum(sum(i < 256 for i in ids[1:]) for ids in RAGGED * 2)
    assert bits == pytest.approx(alone, rel=1e-5)


def test_checkpointed_gradients_are_the_same_also_with_dropout(tmp_path):
    calls = {False: 0, True: 0}
    trained = {}
    for checkpointing in calls:
        model = tiny_model(**SHARING["cycle"], hidden_dropout=0.1)
        start = weights(model)

        def count(module, args, kwargs, checkpointing=checkpointing):
            calls[checkpointing] += 1

        model.model.trunk.attention_blocks[0].attention.register_forward_pre_hook(count, with_kwargs=True)
        options = {"activation_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
        trained[checkpointing] = train(tmp_path, model, activation_checkpointing=checkpointing, **options)
    assert calls[True] == 2 * calls[False] > 0  # it ran again in the backward pass
    assert losses(trained[True]) == losses(trained[False])
    reference = weights(trained[False].model)
    assert any((reference[name] - first).abs().max() > 1e-2 for name, first in start.items())
    for name, parameter in trained[True].model.named_parameters():
        assert torch.equal(parameter, reference[name]), name


def test_bf16_computes_in_bfloat16_and_keeps_the_weights_in_float32(tmp_path):
    seen = set()
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    half = train(tmp_path, model, bf16=True)
    full = train(tmp_path)
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), rel=0.02)


def test_label_smoothing_smooths_the_next_byte(tmp_path):
    # The library shifts labels for the classes in its table of causal language models; importing ours adds them.
    model, inputs = tiny_model(), PAD(ROWS[: len(RAGGED)])
    trainer = Trainer(model=model, args=arguments(tmp_path, label_smoothing_factor=0.5), train_dataset=ROWS)
    with torch.no_grad():
        nats = -model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
        targets = inputs["labels"][:, 1:]
        smoothed = 0.5 * nats.gather(-1, targets.clamp(min=0)[..., None])[..., 0] + 0.5 * nats.mean(-1)
        expected = smoothed[targets != -100].mean()
        torch.testing.assert_close(trainer.compute_loss(model, dict(inputs)), expected, rtol=1e-5, atol=0)
        unshifted = nats.gather(-1, inputs["labels"][:, :-1].clamp(min=0)[..., None])[..., 0]
        for other in (model(**inputs).loss, (0.5 * unshifted + 0.5 * nats.mean(-1))[targets != -100].mean()):
            assert (other - expected).abs() > 1e-3


def test_neftune_disturbs_embeddings_within_its_bound_while_training(tmp_path):
    alpha, ids, seen = 5.0, torch.tensor([RAGGED[0]]), []
    with torch.no_grad():
        clean = tiny_model()(ids, output_hidden_states=True).hidden_states[0]
    model = tiny_model()
    model.model.local_encoder[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    noisy = train(tmp_path, model, neftune_noise_alpha=alpha, max_steps=1, per_device_train_batch_size=1)
    bound = alpha / clean[0].numel() ** 0.5
    assert 0.5 * bound < (seen[0] - clean).abs().max() < 1.01 * bound
    assert losses(noisy) != losses(train(tmp_path, max_steps=1, per_device_train_batch_size=1))
    with torch.no_grad():  # and no longer, once the training is over
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "muon"])
def test_every_optimizer_lowers_the_loss(tmp_path, optimizer):
    options, recipe = {"optim": optimizer, "learning_rate": 0.1 if optimizer == "sgd" else 1e-2}, {}
    if optimizer == "muon":
        recipe = {"optimizer_cls_and_kwargs": (MuonRecipe, {"muon_lr": 0.02, "adamw_lr": 1e-2})}
        options = {}
    args = arguments(tmp_path, max_steps=20, per_device_train_batch_size=6, **options)
    model = STLMForCausalLM(tiny_config(**SHARING["middle"]))
    trainer = Trainer(model=model, args=args, train_dataset=ROWS, data_collator=PAD, **recipe)
    trainer.train()
    assert losses(trainer)[-1] < 0.93 * losses(trainer)[0]


def test_a_search_finds_the_learning_rate_that_learns(tmp_path):
    args = arguments(tmp_path, max_steps=8, per_device_train_batch_size=6, eval_strategy="steps", eval_steps=8)
    trainer = Trainer(
        model_init=lambda trial: STLMForCausalLM(tiny_config()),
        args=args,
        train_dataset=ROWS,
        eval_dataset=ROWS[: len(RAGGED)],
        data_collator=PAD,
    )
    rates = {"learning_rate": [1e-7, 1e-2]}
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates["learning_rate"])},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        direction="minimize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler(rates),
    )
    assert best.hyperparameters == {"learning_rate": 1e-2}
    assert best.objective < 5.6  # nats; a fresh model has log 320 = 5.77


@pytest.mark.slow
def test_a_compiled_training_has_the_losses_of_the_plain_one(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start = weights(tiny_model())
    model = tiny_model()
    options = {"rows": ROWS[:1] * 4, "per_device_train_batch_size": 4}  # one shape, as windows of a corpus have
    compiled = train(tmp_path, model, torch_compile=True, **options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain = train(tmp_path, **options)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert_same_training(model, plain.model, start)
