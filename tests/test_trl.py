# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning and preference optimization with the unchanged trainers of trl, on the chat template."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from modeling_stlm import STLMForCausalLM

from .tiny import SHARING, randomize, tiny_config
from .trainers import TOKENIZER, arguments, losses


START, END = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
TURNS = [
    [("user", "hi"), ("assistant", "Zoë here. ")],
    [("system", "Be brief!"), ("user", "two and two"), ("assistant", "four"), ("user", "sure?"), ("assistant", "yes")],
    [("user", "東京?"), ("assistant", "A city of many words, and more.")],
    [("user", "x"), ("assistant", "y")],
]
CHATS = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in TURNS])
# trl asks for checkpointing by a name that transformers has renamed, and for bfloat16; neither is for these numbers.
PLAIN = {"activation_checkpointing": False, "bf16": False}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def ids_and_labels(turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """ChatML by hand. Targets are what the assistant says and the mark that ends it."""
    ids, labels = [], []
    for role, text in turns:
        head, body = [START, *f"{role}\n".encode()], [*text.encode(), END]
        ids += [*head, *body, ord("\n")]
        labels += [-100] * len(head) + (body if role == "assistant" else [-100] * len(body)) + [-100]
    return ids, labels


def log_probabilities(model: torch.nn.Module, ids: list[int], targets: list[int]) -> torch.Tensor:
    """Of the targets that are not -100, of one row alone."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(targets[1:])
    kept = targets != -100
    return logits[kept].gather(-1, targets[kept, None])[:, 0]


def tiny_chat_model() -> STLMForCausalLM:
    return randomize(STLMForCausalLM(tiny_config(**SHARING["middle"])))


def sft(folder, model, **options) -> SFTTrainer:
    peft_config = options.pop("peft_config", None)
    defaults = {"assistant_only_loss": True, "per_device_train_batch_size": len(TURNS)}
    args = arguments(folder, SFTConfig, **(PLAIN | defaults | options))
    return SFTTrainer(model, args, train_dataset=CHATS, processing_class=TOKENIZER, peft_config=peft_config)


def test_only_what_the_assistant_says_is_a_target(tmp_path):
    rows = sft(tmp_path, tiny_chat_model()).train_dataset
    assert len(rows) == len(TURNS)
    for row, turns in zip(rows, TURNS):
        assert (row["input_ids"], row["labels"]) == ids_and_labels(turns)


def test_only_the_completion_is_a_target(tmp_path):
    turns = [("user", "hi"), ("assistant", "Zoë")]
    (user, assistant) = ({"role": role, "content": text} for role, text in turns)
    rows = Dataset.from_list([{"prompt": [user], "completion": [assistant]}])
    args = arguments(tmp_path, SFTConfig, **PLAIN)
    (row,) = SFTTrainer(tiny_chat_model(), args, train_dataset=rows, processing_class=TOKENIZER).train_dataset
    ids, labels = ids_and_labels(turns)
    assert row["input_ids"] == ids
    assert row["labels"] == [*labels[:-1], ord("\n")]  # the line end after the last mark counts for trl


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_free": True, "max_length": None}, {"packing": True, "packing_strategy": "bfd", "max_length": 130}],
    ids=["padded", "flattened", "packed"],
)
def test_the_loss_is_that_of_the_conversations_alone(tmp_path, options):
    trainer = sft(tmp_path, tiny_chat_model(), **options)
    (inputs,) = trainer.get_train_dataloader()
    model = tiny_chat_model()
    nats = -torch.cat([log_probabilities(model, *ids_and_labels(turns)) for turns in TURNS])
    assert (inputs["labels"] != -100).sum() == len(nats)
    lengths = [len(ids_and_labels(turns)[0]) for turns in TURNS]
    if options:
        assert inputs["input_ids"].shape == (1, sum(lengths)) and "attention_mask" not in inputs
        assert (inputs["position_ids"] == 0).sum() == len(TURNS)
    else:
        assert inputs["input_ids"].shape == (len(TURNS), max(lengths))
    if options.get("packing"):
        assert 1 < len(trainer.train_dataset) < len(TURNS)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), inputs)
    torch.testing.assert_close(loss, nats.mean(), rtol=1e-5, atol=0)


def test_padded_flattened_and_packed_conversations_train_alike(tmp_path):
    results = [
        losses_of_sft(tmp_path, options)
        for options in ({}, {"padding_free": True, "max_length": None}, {"packing": True, "max_length": 130})
    ]
    assert results[0][-1] < results[0][0]
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    assert results[2] == pytest.approx(results[0], rel=1e-4)


def losses_of_sft(folder, options) -> list[float]:
    trainer = sft(folder, tiny_chat_model(), learning_rate=1e-3, max_steps=4, **options)
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_assistant_learns_its_answers(tmp_path, peft_config):
    trainer = sft(tmp_path, tiny_chat_model(), peft_config=peft_config, max_steps=25, activation_checkpointing=True)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]


PAIRS = [("two and two?", "four", "five, or so"), ("東京?", "a city", "Zoë"), ("say x", "x x x", "y")]
PREFERENCES = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in PAIRS
    ]
)


def log_probability_of_answer(model: torch.nn.Module, prompt: str, answer: str) -> torch.Tensor:
    ids, labels = ids_and_labels([("user", prompt), ("assistant", answer)])
    labels[-1] = ids[-1]  # trl: all after the generation prompt
    return log_probabilities(model, ids, labels).sum()


def dpo_loss_by_hand(policy: torch.nn.Module, reference, beta: float) -> torch.Tensor:
    """Of `policy` against `reference[prompt, answer]`, arXiv:2305.18290."""
    margins = [
        (log_probability_of_answer(policy, prompt, chosen) - reference[prompt, chosen])
        - (log_probability_of_answer(policy, prompt, rejected) - reference[prompt, rejected])
        for prompt, chosen, rejected in PAIRS
    ]
    return -torch.nn.functional.logsigmoid(beta * torch.stack(margins)).mean()


@pytest.mark.parametrize("kind", ["reference_given", "reference_of_the_folder", "lora"])
def test_preferences_raise_the_margin_over_the_reference(tmp_path, kind):
    model, options = tiny_chat_model(), {}
    model.save_pretrained(tmp_path / "start")
    start = STLMForCausalLM.from_pretrained(tmp_path / "start")
    reference = {
        (prompt, answer): log_probability_of_answer(start, prompt, answer)
        for prompt, *answers in PAIRS
        for answer in answers
    }
    if kind == "reference_given":
        options = {"ref_model": start}
    elif kind == "reference_of_the_folder":
        model = STLMForCausalLM.from_pretrained(tmp_path / "start")
    else:
        options = {"peft_config": LORA}
    args = arguments(
        tmp_path,
        DPOConfig,
        beta=0.1,
        **PLAIN,
        max_steps=8,
        per_device_train_batch_size=len(PAIRS),
        learning_rate=1e-2 if kind == "lora" else 1e-3,
    )
    trainer = DPOTrainer(model, args=args, train_dataset=PREFERENCES, processing_class=TOKENIZER, **options)
    trainer.train()
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    assert losses(trainer)[0] == pytest.approx(math.log(2), rel=1e-4)  # policy and reference are one
    assert margins[0] == pytest.approx(0, abs=1e-4) and margins[-1] > 0.1
    assert losses(trainer)[-1] < losses(trainer)[0]

    (inputs,) = trainer.get_train_dataloader()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), inputs)
    torch.testing.assert_close(loss, dpo_loss_by_hand(trainer.model, reference, args.beta), rtol=1e-3, atol=1e-5)
    # The reference has not moved.
    for (prompt, answer), expected in reference.items():
        if kind == "lora":
            with trainer.model.disable_adapter():
                assert log_probability_of_answer(trainer.model, prompt, answer) == expected
        else:
            assert log_probability_of_answer(trainer.ref_model, prompt, answer) == expected
