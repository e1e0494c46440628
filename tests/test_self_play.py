# SPDX-License-Identifier: Apache-2.0
"""Self-play: the loss of the paper, the opponent of the round before, rounds that go on where they were cut."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.self_play import SelfPlayConfig, SelfPlayTrainer, continuations

from .test_distributed import run
from .tiny import ids_of, tiny_config
from .trainers import TOKENIZER, arguments, losses


ROWS = [
    {"prompt": "two and two? ", "completion": "four"},
    {"prompt": "東京? ", "completion": "a city, Zoë"},
    {"prompt": "say x ", "completion": "x x x"},
    {"prompt": "and ", "completion": "so on."},
]
EOS = TOKENIZER.eos_token_id
# trl asks for both by default, which is not for these numbers.
PLAIN = {"activation_checkpointing": False, "bf16": False}


def self_play(folder, num_rounds: int, rows=ROWS, **more) -> SelfPlayTrainer:
    metrics = more.pop("compute_round_metrics", None)
    set_seed(3)
    model = STLMForCausalLM(tiny_config(hidden_dropout=0.1, use_cache=True))
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "beta": 0.5, "learning_rate": 1e-2}
    args = arguments(folder, SelfPlayConfig, num_rounds=num_rounds, max_new_tokens=7, **(PLAIN | defaults | more))
    return SelfPlayTrainer(model, args, rows, TOKENIZER, metrics)


def log_probability(model: torch.nn.Module, prompt: str, completion: str) -> torch.Tensor:
    """Of the completion and the end of the text, given the prompt."""
    start, ids = len(ids_of(prompt)), [*ids_of(prompt + completion), EOS]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logits[t - 1, ids[t]] for t in range(start, len(ids)))


def loss_of_the_paper(policy, opponent, pairs: list[dict], scale: float) -> torch.Tensor:
    """arXiv:2401.01335 with the logistic loss."""
    margins = [
        scale
        * (log_probability(policy, p["prompt"], p["chosen"]) - log_probability(opponent, p["prompt"], p["chosen"]))
        - scale
        * (log_probability(policy, p["prompt"], p["rejected"]) - log_probability(opponent, p["prompt"], p["rejected"]))
        for p in pairs
    ]
    return torch.log1p(torch.exp(-torch.stack(margins))).mean()


def pairs_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]


def test_the_loss_is_that_of_the_paper(tmp_path):
    game = self_play(tmp_path, 0)
    game.train()
    trainer = game.round_trainer(1)
    (inputs,) = trainer.get_train_dataloader()
    trainer.train()
    model, pairs = trainer.model.eval(), pairs_of(tmp_path / "round-1")
    with torch.no_grad():
        loss = trainer.compute_loss(model, inputs)
    expected = loss_of_the_paper(model, game.load(0).eval(), pairs, scale=0.5)
    assert abs(expected - math.log(2)) > 0.05
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_the_opponent_is_the_model_of_the_round_before(tmp_path):
    game = self_play(tmp_path, 2)
    game.train()
    states = [load_file(tmp_path / f"round-{index}" / "model.safetensors") for index in range(3)]
    name = "model.local_encoder.0.feed_forward.up_proj.weight"
    assert not torch.equal(states[0][name], states[1][name]) and not torch.equal(states[1][name], states[2][name])
    assert all(torch.equal(game.model.get_parameter(key), value) for key, value in states[2].items())
    for index in (1, 2):
        before = game.load(index - 1)
        assert torch.equal(before.get_parameter(name), states[index - 1][name])
        set_seed(game.args.seed + index)
        texts = continuations(before, TOKENIZER, [row["prompt"] for row in ROWS], 7, 16)
        pairs = pairs_of(tmp_path / f"round-{index}")
        assert [pair["rejected"] for pair in pairs] == texts
        assert [(pair["prompt"], pair["chosen"]) for pair in pairs] == [tuple(row.values()) for row in ROWS]
        trainer = game.round_trainer(index)  # the round, ready to be played again
        for model in (trainer.model, trainer.ref_model):
            assert all(torch.equal(model.get_parameter(key), value) for key, value in states[index - 1].items())


def test_margins_grow_and_the_text_becomes_likelier_than_that_of_the_opponent(tmp_path):
    game = self_play(tmp_path, 0, max_steps=15)
    game.train()
    trainer = game.round_trainer(1)
    trainer.train()
    margins = [log["rewards/margins"] for log in trainer.state.log_history if "rewards/margins" in log]
    assert margins[0] == pytest.approx(0, abs=1e-1) and margins[-1] > 0.5
    assert losses(trainer)[-1] < losses(trainer)[0]


class Interrupted(Exception):
    pass


class CutAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step == 2

    def on_save(self, args, state, control, **kwargs):
        raise Interrupted


@pytest.mark.parametrize("where", ["in a round", "after the pairs"])
def test_a_resumed_game_is_one_that_was_not_cut(tmp_path, where, monkeypatch):
    def metrics(model):
        with torch.no_grad():
            return {"likelihood": np.float32(log_probability(model, "say ", "this").item())}

    expected = self_play(tmp_path / "whole", 2, compute_round_metrics=metrics).train()
    assert [row["round"] for row in expected] == [0, 1, 2]
    assert len({row["likelihood"] for row in expected}) == 3

    cut = self_play(tmp_path / "cut", 2, compute_round_metrics=metrics)
    ready = cut.round_trainer

    def interrupted(index):
        trainer = ready(index)
        if index == 2 and where == "after the pairs":
            raise Interrupted
        if index == 2:
            trainer.add_callback(CutAt())
        return trainer

    cut.round_trainer = interrupted
    with pytest.raises(Interrupted):
        cut.train()
    assert len(json.loads((tmp_path / "cut" / "rounds.json").read_text())) == 2
    assert (tmp_path / "cut" / "round-2" / "checkpoint-2").is_dir() == (where == "in a round")
    resumed = self_play(tmp_path / "cut", 2, compute_round_metrics=metrics)
    assert resumed.train(resume_from_checkpoint=True) == expected
    states = [load_file(tmp_path / name / "round-2" / "model.safetensors") for name in ("cut", "whole")]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_a_finished_game_is_loaded(tmp_path):
    first = self_play(tmp_path, 1)
    first.train()
    again = self_play(tmp_path, 1)
    assert again.train(resume_from_checkpoint=True) == first.history
    name = "model.local_encoder.0.feed_forward.up_proj.weight"
    assert torch.equal(again.model.get_parameter(name), first.model.get_parameter(name))


def test_what_is_saved_can_be_used(tmp_path):
    game = self_play(tmp_path, 1, Dataset.from_list(ROWS))
    game.train()
    model = STLMForCausalLM.from_pretrained(tmp_path / "round-1")
    assert model.config.use_cache
    assert (tmp_path / "round-1" / "tokenizer.json").is_file()


def test_continuations_follow_their_prompts():
    torch.manual_seed(0)
    model = STLMForCausalLM(tiny_config(use_cache=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    prompts = ["a longer prompt than ", "x", "the others "]
    together = continuations(model, TOKENIZER, prompts, 12, 2, do_sample=False)
    alone = [continuations(model, TOKENIZER, [prompt], 12, 2, do_sample=False)[0] for prompt in prompts]
    assert together == alone and len(set(together)) > 1
    drawn = {continuations(model, TOKENIZER, ["x"], 12, 1)[0] for _ in range(4)}
    assert len(drawn) == 4


def test_any_causal_model_continues_prompts():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=320, bos_token_id=257, eos_token_id=258, **sizes))
    assert len(continuations(llama, TOKENIZER, ["one ", "and two "], 5, 2)) == 2


def test_a_record_of_rounds_is_whole_or_the_one_before(tmp_path, monkeypatch):
    def cut(path, text, *args, **kwargs):
        write_text(path, text[: len(text) // 2] if ready else text, *args, **kwargs)
        if ready:
            raise OSError("no space left")

    game, write_text, ready = self_play(tmp_path, 0), Path.write_text, []
    game.train()
    ready.append(True)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", cut)
        with pytest.raises(OSError, match="no space"):
            game._finish(1)
    assert len(self_play(tmp_path, 0).train(resume_from_checkpoint=True)) == 1


SCRIPT = """
import json, sys, torch
from transformers import AutoTokenizer
from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.self_play import SelfPlayConfig, SelfPlayTrainer
settings = json.loads(sys.argv[1])
args = SelfPlayConfig(output_dir=settings["out"] + "/game", num_rounds=2, max_new_tokens=9, max_steps=2, bf16=False,
                      activation_checkpointing=False, per_device_train_batch_size=2, report_to="none", use_cpu=True)
rows = [{"prompt": f"row {i} ", "completion": "a b c"} for i in range(5)]  # an odd number for two processes
model, tokenizer = (cls.from_pretrained(settings["model"]) for cls in (STLMForCausalLM, AutoTokenizer))
game = SelfPlayTrainer(model, args, rows, tokenizer)
game.train()
total = float(sum(p.detach().double().abs().sum() for p in game.model.parameters()))
json.dump(total, open(f"{settings['out']}/{args.process_index}.json", "w"))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_share_the_prompts(tmp_path):
    STLMForCausalLM(tiny_config(use_cache=True)).save_pretrained(tmp_path / "start")
    TOKENIZER.save_pretrained(tmp_path / "start")
    (tmp_path / "play.py").write_text(SCRIPT)
    run(tmp_path / "play.py", 2, {"model": str(tmp_path / "start"), "out": str(tmp_path)})
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()
    for index in (1, 2):
        pairs = pairs_of(tmp_path / "game" / f"round-{index}")
        assert [pair["prompt"] for pair in pairs] == [f"row {i} " for i in range(5)]
        assert len({pair["rejected"] for pair in pairs}) == 5  # processes draw with seeds of their own


def test_bad_input_is_refused_in_words(tmp_path):
    with pytest.raises(ValueError, match="needs texts `prompt` and `completion`, got no rows"):
        self_play(tmp_path, 1, [])
    for row, found in (
        ({"prompt": "a", "answer": "b"}, {"answer": "str", "prompt": "str"}),
        ({"prompt": "a", "completion": None}, {"completion": "NoneType", "prompt": "str"}),
    ):
        message = re.escape(f"row 2 of the dataset needs texts `prompt` and `completion`, got {found}")
        with pytest.raises(ValueError, match=message):
            self_play(tmp_path, 1, [ROWS[0], row])
    game = self_play(tmp_path, 0)
    game.train()
    with pytest.raises(ValueError, match="holds rounds of an earlier self-play"):
        self_play(tmp_path, 0).train()
    adapted = get_peft_model(game.model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="the model is a PeftModel, expected a PreTrainedModel"):
        SelfPlayTrainer(adapted, game.args, ROWS, TOKENIZER)
