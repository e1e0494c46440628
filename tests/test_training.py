# SPDX-License-Identifier: Apache-2.0
"""Training with the unchanged Trainer, and the parts that plug into it."""

import copy
import json
import math
import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from modeling_stlm import STLMForCausalLM, STLMForSequenceClassification, STLMTokenizer
from modeling_stlm.training import bits_per_byte as metric
from modeling_stlm.training.corpus import PackedWindows, ids_are_bytes, write_corpus
from modeling_stlm.training.long_runs import SaveByTime, StopOnSignal
from modeling_stlm.training.optimizer import MuonRecipe, orthogonalize
from modeling_stlm.training.patch_curriculum import PatchLengthCurriculum
from modeling_stlm.training.time_budget import TimeBudget

from .tiny import SHARING, TEXT, ids_of, tiny_config, tiny_model
from .trainers import RAGGED, TOKENIZER, arguments, losses


DOCUMENTS = [TEXT, "short", "a b c d e. " * 40, "", "Zoë 東京"]


@pytest.fixture
def windows(tmp_path) -> PackedWindows:
    return PackedWindows(write_corpus(tmp_path / "corpus.bin", DOCUMENTS, TOKENIZER), TOKENIZER, block_size=64)


def test_windows_are_the_packed_documents(windows):
    row = [i for text in DOCUMENTS if text for i in (257, *ids_of(text), 258)]
    positions = [t for text in DOCUMENTS if text for t in range(len(text.encode()) + 2)]
    items = [windows[i] for i in range(len(windows))]
    assert len(items) == len(row) // 64 > 5
    for i, item in enumerate(items):
        here = slice(64 * i, 64 * (i + 1))
        assert item["input_ids"].tolist() == row[here]
        assert item["labels"].tolist() == [-100 if t == 257 else t for t in row[here]]
        # Positions count from the document's start, or from the window's in the document that it cuts.
        first = positions[here][0]
        cut = next((t for t, p in enumerate(positions[here]) if t and p == 0), 64)
        assert item["position_ids"].tolist() == [p - first if t < cut else p for t, p in enumerate(positions[here])]
    with pytest.raises(IndexError):
        windows[len(windows)]
    assert list(windows.documents()) == [text.encode() for text in DOCUMENTS if text]


def test_any_file_of_bytes_is_a_corpus(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 2)
    windows = PackedWindows(tmp_path / "text", TOKENIZER, block_size=100)
    assert len(windows) == 5
    assert windows[0]["input_ids"][:4].tolist() == [257, 0, 1, 2]
    with pytest.raises(ValueError, match="fewer than one window of 1000"):
        PackedWindows(tmp_path / "text", TOKENIZER, block_size=1000)
    (tmp_path / "nothing").touch()
    with pytest.raises(ValueError, match=r"has 0 bytes.*: it is empty"):
        PackedWindows(tmp_path / "nothing", TOKENIZER, block_size=1)
    with pytest.raises(ValueError, match="every document is empty"):
        write_corpus(tmp_path / "empty.bin", ["", ""], TOKENIZER)
    with pytest.raises(ValueError, match="got one text, expected an iterable of documents"):
        write_corpus(tmp_path / "one.bin", "a text", TOKENIZER)
    with pytest.raises(ValueError, match="document 2 is a NoneType, expected str or bytes"):
        write_corpus(tmp_path / "none.bin", ["a", None], TOKENIZER)
    assert not list(tmp_path.glob("empty*"))


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return TOKENIZER.train_new_from_iterator([TEXT] * 20, 300)


def test_a_corpus_of_another_tokenizer_holds_its_ids(tmp_path, bpe):
    path = write_corpus(
        tmp_path / "corpus.bin", [text if i % 2 else text.encode() for i, text in enumerate(DOCUMENTS)], bpe
    )
    row = [i for text in DOCUMENTS if text for i in (bpe.bos_token_id, *bpe(text)["input_ids"], bpe.eos_token_id)]
    windows = PackedWindows(path, bpe, block_size=7)
    assert torch.cat([windows[i]["input_ids"] for i in range(len(windows))]).tolist() == row[: len(row) // 7 * 7]
    with pytest.raises(ValueError, match="ids of type uint16, expected uint8: it was written with another tokenizer"):
        PackedWindows(path, TOKENIZER, block_size=1)
    (tmp_path / "plain").write_bytes(b"text")
    for text in (write_corpus(tmp_path / "text.bin", ["text"], TOKENIZER), tmp_path / "plain"):
        with pytest.raises(
            ValueError, match="ids of type uint8, expected uint16: it was written with another tokenizer"
        ):
            PackedWindows(text, bpe, block_size=1)


def test_the_starts_of_another_file_are_noticed(tmp_path):
    path = write_corpus(tmp_path / "corpus.bin", ["a text", "another"], TOKENIZER)
    for text in (b"a text", b"a text and anothers"):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=f"has {len(text)} bytes, but its documents end at byte 13"):
            PackedWindows(path, TOKENIZER, block_size=1)


def test_corpora_of_earlier_versions_are_read_where_their_type_is_sure(tmp_path, bpe):
    path, starts = tmp_path / "corpus.bin", tmp_path / "corpus.bin.starts.npy"
    path.write_bytes(b"a textanother")
    np.save(starts, np.array([0, 7]))
    assert PackedWindows(path, TOKENIZER, block_size=1).starts.tolist() == [0, 7, 13]
    with pytest.raises(ValueError, match="ids of type uint8, expected uint16"):
        PackedWindows(path, bpe, block_size=1)
    np.save(starts, np.array([0, 6]))  # of 6 ids of 16 bits, or of 13 bytes
    for tokenizer in (TOKENIZER, bpe):
        with pytest.raises(ValueError, match=r"does not say of which type .* and write the corpus again"):
            PackedWindows(path, tokenizer, block_size=1)


def test_the_end_of_a_text_is_trained_where_the_same_token_begins_it(tmp_path):
    tokenizer = STLMTokenizer(bos_token="<eos>")
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 258
    path = write_corpus(tmp_path / "corpus.bin", ["ab", "c"], tokenizer)
    assert PackedWindows(path, tokenizer, block_size=7)[0]["labels"].tolist() == [-100, 97, 98, 258, -100, 99, 258]
    for name in ("bos_token", "eos_token"):
        with pytest.raises(ValueError, match=f"the tokenizer has no {name}"):
            PackedWindows(path, STLMTokenizer(**{name: None}), block_size=1)


def test_corpora_ask_what_the_ids_are_and_not_for_a_class(tmp_path, bpe):
    TOKENIZER.save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    path = write_corpus(tmp_path / "corpus.bin", DOCUMENTS, plain)
    assert path.read_bytes() == "".join(DOCUMENTS).encode()
    assert PackedWindows(path, plain, 64).ids.tolist() == PackedWindows(path, TOKENIZER, 64).ids.tolist()
    shifted = ByT5Tokenizer()  # one id per byte, but not its value
    merged = Tokenizer(BPE(TOKENIZER.backend_tokenizer.get_vocab(with_added_tokens=False) | {"ab": 256}, [("a", "b")]))
    others = (bpe, shifted, PreTrainedTokenizerFast(tokenizer_object=merged))
    assert ids_are_bytes(TOKENIZER) and ids_are_bytes(plain) and not any(map(ids_are_bytes, others))


def test_a_corpus_is_all_there_or_not_at_all(tmp_path):
    def failing():
        yield "some text"
        assert [path.name for path in tmp_path.iterdir()] == [f"corpus.bin.{os.getpid()}.partial"]
        raise OSError("once")

    with pytest.raises(OSError, match="once"):
        write_corpus(tmp_path / "corpus.bin", failing(), TOKENIZER)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="ids of at most 16 bits, the tokenizer has 65537 tokens"):
        write_corpus(tmp_path / "corpus.bin", ["text"], vocabulary_of(2**16 + 1))
    write_corpus(tmp_path / "corpus.bin", ["t1"], vocabulary_of(2**16))


def vocabulary_of(size: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"t{i}": i for i in range(size)})))


def test_pickled_windows_hold_no_corpus(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    windows = PackedWindows(write_corpus("corpus.bin", ["hello world "] * 20_000, TOKENIZER), TOKENIZER, block_size=64)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000
    monkeypatch.chdir("elsewhere")
    for again in (pickle.loads(pickled), copy.deepcopy(windows)):
        assert isinstance(again.ids, np.memmap) and len(again) == len(windows) > 4000
        for i in (0, 17, len(windows) - 1):
            assert all(torch.equal(again[i][name], value) for name, value in windows[i].items())
    (tmp_path / "corpus.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"corpus\.bin"):
        pickle.loads(pickled)


def test_flattened_batches_give_the_loss_of_the_documents_apart():
    model = tiny_model()
    documents = [ids_of(text) for text in (TEXT, "a few words", "and more. ")]
    packed = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": ids} for ids in documents])
    packed = {name: value for name, value in packed.items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        loss = model(**packed, use_cache=False).loss * (sum(map(len, documents)) - len(documents))
        apart = [model(torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1) for ids in documents]
    torch.testing.assert_close(loss, sum(apart))


def test_training_lowers_the_loss_and_moves_every_parameter(tmp_path, windows):
    model = STLMForCausalLM(tiny_config(**SHARING["middle"]))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=40), train_dataset=windows)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 1
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_a_resumed_training_has_the_losses_of_one_that_was_not_cut(tmp_path, windows, muon, monkeypatch):
    said = []
    monkeypatch.setattr("transformers.trainer.logger.warning", said.append)
    recipe = {"optimizer_cls_and_kwargs": (MuonRecipe, {"muon_lr": 0.02, "adamw_lr": 1e-3})} if muon else {}

    def trainer(name, **more):
        set_seed(5)
        model = STLMForCausalLM(tiny_config(hidden_dropout=0.1))
        return Trainer(model=model, args=arguments(tmp_path / name), train_dataset=windows, **recipe, **more)

    whole = trainer("whole")
    whole.train()
    cut = trainer("cut", callbacks=[StopAt(3)])
    cut.train()
    resumed = trainer("cut")
    resumed.train(resume_from_checkpoint=True)
    assert [text for text in said if "keys" in text] == []  # the tied head is not missing
    assert losses(cut) == losses(whole)[:3]
    assert losses(resumed) == losses(whole)
    for ours, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, expected)


def test_muon_gets_the_matrices_and_adamw_the_rest():
    model = STLMForCausalLM(tiny_config())
    muon, adamw = MuonRecipe()(model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(parameter)] for parameter in muon["params"]}
    others = {names[id(parameter)] for parameter in adamw["params"]}
    assert matrices | others == set(names.values()) and not matrices & others
    assert all(name.endswith("proj.weight") for name in matrices)
    assert {
        "model.embed_tokens.weight",
        "model.ngram_embedding.ngram_tables.weight",
        "model.patcher.start.weight",
    } <= others
    classifier = STLMForSequenceClassification(tiny_config())
    assert any(
        parameter is classifier.score.weight for parameter in MuonRecipe()(classifier).param_groups[0]["params"]
    )


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5)])
def test_orthogonalize_evens_out_singular_values(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)).float())
    assert values.min() > 0.3 and values.max() < 1.3


@pytest.mark.parametrize("shape", [(12, 12), (24, 6), (6, 24)])
def test_orthogonalize_follows_the_one_of_torch(shape):
    # `torch.optim.Muon` iterates in bfloat16: the same update up to its rounding.
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(*shape)
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, weight_decay=0.0).step()
    expected = -weight.detach() / max(1, shape[0] / shape[1]) ** 0.5
    assert (orthogonalize(weight.grad[None])[0] - expected).abs().max() < 0.05 * expected.abs().max()


def bare(*modules: torch.nn.Module) -> torch.nn.Sequential:
    model = torch.nn.Sequential(*modules)
    model.get_output_embeddings = lambda: None
    return model


@pytest.mark.parametrize("shape", [(12, 12), (24, 6), (6, 24), (1, 8), (8, 1)])
def test_normuon_follows_a_slow_one(shape):
    num_rows, num_columns = shape
    model = bare(*(torch.nn.Linear(num_columns, num_rows, bias=False) for _ in range(3)))
    recipe = MuonRecipe()(model, muon_lr=0.02, weight_decay=0.1)
    weights = [module.weight.detach().clone() for module in model]
    momenta = [torch.zeros(shape) for _ in model]
    is_wide = num_columns > num_rows
    neurons = [(slice(None), i) for i in range(num_columns)] if is_wide else [(i,) for i in range(num_rows)]
    moments = [[0.0 for _ in neurons] for _ in model]
    for step in range(4):
        for n, module in enumerate(model):
            module.weight.grad = None
            if (step, n) == (2, 1):
                continue  # no gradient: it stays where it is
            gradient = torch.randn(shape) * torch.logspace(-2, 0, num_rows).roll(n)[:, None] * 10**n
            module.weight.grad = gradient.clone()
            momenta[n] = 0.95 * momenta[n] + 0.05 * gradient
            update = orthogonalize((0.05 * gradient + 0.95 * momenta[n])[None])[0].float()
            even = update.clone()
            for i, where in enumerate(neurons):
                moments[n][i] = 0.95 * moments[n][i] + 0.05 * update[where].square().mean().item()
                even[where] = update[where] / moments[n][i] ** 0.5
            even = even * update.norm() / even.norm()
            weights[n] = weights[n] * (1 - 0.02 * 0.1) - 0.02 * max(1, num_rows / num_columns) ** 0.5 * even
        recipe.step()
        for module, weight in zip(model, weights, strict=True):
            torch.testing.assert_close(module.weight.detach(), weight, rtol=1e-4, atol=1e-5)


def test_neurons_of_normuon_go_equally_far():
    model = bare(torch.nn.Linear(4, 16, bias=False))
    weight = model[0].weight
    before, recipe = weight.detach().clone(), MuonRecipe()(model, muon_lr=0.02)
    weight.grad = torch.randn(16, 4) * torch.logspace(-2, 0, 16)[:, None]
    update = orthogonalize(weight.grad[None])[0].float().norm(dim=1)
    recipe.step()
    moved = (weight.detach() - before).norm(dim=1)
    assert update.max() > 10 * update.min()  # as Muon leaves them
    torch.testing.assert_close(moved, moved.mean().expand(16), rtol=1e-3, atol=0)


def test_normuon_goes_on_from_a_state_of_muon():
    model = bare(torch.nn.Linear(5, 3, bias=False))
    weight = model[0].weight
    recipe = MuonRecipe()(model)
    weight.grad = torch.randn(3, 5)
    recipe.step()
    state = recipe.state_dict()
    momentum = state["state"][0]["momentum_buffer"].clone()
    del state["state"][0]["neuron_moment"]  # as it was saved before
    again = MuonRecipe()(model)
    again.load_state_dict(state)
    weight.grad = torch.randn(3, 5)
    again.step()
    torch.testing.assert_close(again.state[weight]["momentum_buffer"], 0.95 * momentum + 0.05 * weight.grad)
    assert again.state[weight]["neuron_moment"].shape == (1, 5) and weight.isfinite().all()


def test_matrices_alone_decay():
    groups = MuonRecipe()(tiny_model(), weight_decay=0.2).param_groups
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0]


def test_muon_takes_weights_of_several_types_and_shrinks_them():
    model = bare(*(torch.nn.Linear(6, 6, bias=False) for _ in range(4)))
    model[2].to(torch.bfloat16)
    model[3].to(torch.float16)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    recipe = MuonRecipe()(model, muon_lr=0.5, weight_decay=0.2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    recipe.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.dtype is old.dtype
        torch.testing.assert_close(parameter.detach(), 0.9 * old)
    model[1].to("meta")
    recipe = MuonRecipe()(model, muon_lr=0.5)
    assert {parameter.device.type for parameter in recipe.param_groups[0]["params"]} == {"cpu", "meta"}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    recipe.step()
    assert all(module.weight.isfinite().all() for module in model if module.weight.device.type == "cpu")


def test_a_time_budget_stops_warms_up_and_decays(tmp_path, windows):
    budget, applied = TimeBudget(minutes=3 / 60, warmup=0.4, decay=0.5, clock="wall"), []

    class Record(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            applied.append(optimizer.param_groups[0]["lr"])

    args = arguments(tmp_path, max_steps=10**6, lr_scheduler_type="constant")
    trainer = Trainer(
        model=STLMForCausalLM(tiny_config()), args=args, train_dataset=windows, callbacks=[budget, Record()]
    )
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert 3 <= budget.elapsed_seconds < 10
    assert 10 < trainer.state.global_step < 10**6
    assert applied[0] < 0.5 * max(applied) and applied[-1] < 0.2 * max(applied)
    assert rates == pytest.approx(applied, abs=1e-3)
    assert TimeBudget.from_state(budget.state()).elapsed_seconds == budget.elapsed_seconds
    with pytest.raises(ValueError, match="must be 'wall' or 'cpu'"):
        TimeBudget(1, clock="sun")


def test_bits_per_byte_is_one_number_through_every_door(tmp_path, windows):
    model = tiny_model()
    total_nats, total_bytes = 0.0, 0
    texts, nats = [], []
    for i in range(len(windows)):
        item = windows[i]
        ids = item["input_ids"]
        with torch.no_grad():
            logits = model(ids[None], position_ids=item["position_ids"][None], use_cache=False).logits[0]
        here = [
            -logits[t - 1].double().log_softmax(-1)[ids[t]].item() if item["labels"][t] >= 0 else 0.0
            for t in range(1, len(ids))
        ]
        nats.append(here)
        texts.append(ids[1:].tolist())
        total_nats += sum(value for value, token in zip(here, ids[1:]) if token < 256)
        total_bytes += sum(token < 256 for token in ids[1:].tolist())
    expected = total_nats / math.log(2) / total_bytes
    assert metric.bits_per_byte(total_nats, total_bytes) == pytest.approx(expected)

    loaded = evaluate.load(metric.__file__)
    assert loaded.compute(predictions=nats, references=texts)["bits_per_byte"] == pytest.approx(expected, rel=1e-6)

    evaluator = metric.BitsPerByteEvaluator()
    args = arguments(tmp_path, batch_eval_metrics=True, per_device_eval_batch_size=3)
    trainer = Trainer(
        model=model,
        args=args,
        eval_dataset=windows,
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
    )
    for _ in range(2):  # the second time nothing is left over from the first
        metrics = trainer.evaluate()
        assert metrics["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-5)
        assert metrics["eval_bytes"] == total_bytes
    with pytest.raises(ValueError, match="at least one byte"):
        metric.bits_per_byte(1.0, 0)


def test_only_ids_of_bytes_count_as_bytes():
    ids = [7, 255, 256, 257, 258, 261, 262, 319, 0, -100]
    nats = [1.0, 2.0, *[100.0] * 6, 4.0, 100.0]
    for door in (metric.BitsPerByte(), evaluate.load(metric.__file__)):
        expected = 7 / math.log(2) / 3
        assert door.compute(predictions=[nats], references=[ids])["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
        with pytest.raises(ValueError, match="has 2 predictions for 1 ids"):
            door.compute(predictions=[[1.0, 2.0]], references=[[7]])
    prediction = EvalPrediction(predictions=np.array([nats]), label_ids=np.array([ids]))
    evaluator = metric.BitsPerByteEvaluator()
    expected = {"bits_per_byte": pytest.approx(6 / math.log(2) / 2), "bytes": 2}  # the first id has no prediction
    assert [evaluator(prediction) for _ in range(2)] == [expected] * 2


def test_nats_need_the_logits_alone_of_all_outputs():
    logits, labels = torch.randn(2, 5, 320), torch.tensor([[65, 66, -100, 68, 258], [1, 2, 3, 4, -100]])
    expected = torch.zeros(2, 5)
    for row, t in ((0, 1), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3)):
        expected[row, t] = -logits[row, t - 1].log_softmax(-1)[labels[row, t]]
    for outputs in (logits, (logits, (torch.randn(2, 5, 16),))):
        torch.testing.assert_close(metric.BitsPerByteEvaluator.nats(outputs, labels), expected)


def test_ids_that_are_no_bytes_are_refused():
    evaluator = metric.BitsPerByteEvaluator()
    prediction = EvalPrediction(predictions=np.ones((1, 3)), label_ids=np.array([[1, 320, 2]]))
    with pytest.raises(ValueError, match=r"label 320 is not in the byte vocabulary of 320 ids: give .* token_bytes"):
        evaluator(prediction)


@pytest.mark.parametrize("streams", ["eval", "train"])
def test_bits_per_byte_of_and_beside_a_stream(tmp_path, streams):
    rows = [{"input_ids": ids} for ids in RAGGED]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    evaluator = metric.BitsPerByteEvaluator()
    options = {"batch_eval_metrics": True} if streams == "eval" else {"eval_strategy": "steps", "eval_steps": 1}
    trainer = Trainer(
        tiny_model(),
        arguments(tmp_path, max_steps=2, learning_rate=0.0, **options),
        data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
        train_dataset=stream,
        eval_dataset=stream if streams == "eval" else rows,
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
    )
    if streams == "train":
        trainer.train()
        found = [log for log in trainer.state.log_history if "eval_bytes" in log]
    else:
        found = [trainer.evaluate(), trainer.evaluate()]
    alone = [tiny_model()(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in RAGGED if ids[1:]]
    nats = sum(loss * (len(ids) - 1) for loss, ids in zip(alone, [ids for ids in RAGGED if ids[1:]], strict=True))
    num_bytes = sum(len(ids) - 1 for ids in RAGGED)
    for scores in found:
        assert scores["eval_bytes"] == num_bytes
        assert scores["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert len(found) == 2


def test_bits_per_byte_with_virtual_tokens_are_those_of_the_rows_alone(tmp_path):
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids = torch.tensor([RAGGED[0][:40], RAGGED[5][:40]])
    with torch.no_grad():
        expected = F.cross_entropy(model(ids).logits[:, 4:-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    evaluator = metric.BitsPerByteEvaluator()
    trainer = Trainer(
        model,
        arguments(tmp_path, batch_eval_metrics=True),
        eval_dataset=[{"input_ids": row, "labels": row} for row in ids],
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
    )
    found = trainer.evaluate()
    assert found["eval_bits_per_byte"] == pytest.approx(expected / math.log(2), rel=1e-5)
    assert found["eval_bytes"] == 2 * 39


class FailsOnce(torch.utils.data.Dataset):
    """Rows of ten bytes; `failure` exists until the sixth row has been asked for."""

    def __init__(self, failure: Path):
        self.failure = failure

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 6 and self.failure.exists():
            self.failure.unlink()
            raise OSError("once")
        ids = torch.arange(65, 75)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("workers", [0, 1], ids=["no workers", "persistent workers"])
def test_an_evaluation_that_failed_leaves_nothing_behind(tmp_path, workers):
    evaluator = metric.BitsPerByteEvaluator()
    args = arguments(
        tmp_path,
        batch_eval_metrics=True,
        per_device_eval_batch_size=2,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=bool(workers),
    )
    trainer = Trainer(
        model=tiny_model(),
        args=args,
        eval_dataset=FailsOnce(tmp_path / "failure"),
        compute_metrics=evaluator,
        preprocess_logits_for_metrics=evaluator.nats,
    )
    kept = []  # as a notebook keeps the last traceback, and with it the dataloader
    for _ in range(2):
        (tmp_path / "failure").touch()
        with pytest.raises(OSError, match="once") as failed:
            trainer.evaluate()
        kept.append(failed)
        for _ in range(2):
            assert trainer.evaluate()["eval_bytes"] == 12 * 9
    nothing = EvalPrediction(predictions=np.ones((1, 2)), label_ids=np.array([[65, 256]]))
    with pytest.raises(ValueError, match="at least one byte"):
        evaluator(nothing)
    assert trainer.evaluate()["eval_bytes"] == 12 * 9


def test_bits_per_byte_counts_the_bytes_behind_other_tokens():
    evaluator = metric.BitsPerByteEvaluator(torch.tensor([9, 0, 1, 3]))
    nats, labels = np.array([[0.0, 2.0, 5.0, 7.0, 8.0]]), np.array([[2, 3, 2, 1, -100]])
    # The first token has no prediction, the fourth is special, the last is padding: two tokens of 3 + 1 bytes.
    found = evaluator(EvalPrediction(predictions=nats, label_ids=labels))
    assert found == {"bits_per_byte": pytest.approx(7 / math.log(2) / 4), "bytes": 4}


def test_a_resumed_time_budget_goes_on_where_it_was_cut(tmp_path, windows):
    def trainer(*callbacks):
        args = arguments(
            tmp_path,
            max_steps=10**6,
            lr_scheduler_type="constant",
        )
        budget = TimeBudget(minutes=4 / 60, clock="cpu")  # which other work does not stretch
        model = STLMForCausalLM(tiny_config())
        return Trainer(model=model, args=args, train_dataset=windows, callbacks=[budget, *callbacks])

    trainer(StopAt(30)).train()
    saved = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())
    used = saved["stateful_callbacks"]["TimeBudget"]["attributes"]["elapsed_seconds"]
    assert 0 < used < 3.5
    elapsed = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            budget = next(c for c in resumed.callback_handler.callbacks if isinstance(c, TimeBudget))
            elapsed.append(budget.elapsed_seconds)

    resumed = trainer(Watch())
    resumed.train(resume_from_checkpoint=True)
    assert used <= elapsed[0] < elapsed[-1] < 4
    assert resumed.state.global_step > 30


def test_a_finished_run_goes_on_under_a_larger_budget(tmp_path, windows):
    def train(minutes, **options):
        budget = TimeBudget(minutes)
        args = arguments(tmp_path, max_steps=10**6, lr_scheduler_type="constant")
        model = STLMForCausalLM(tiny_config())
        trainer = Trainer(model=model, args=args, train_dataset=windows, callbacks=[budget])
        trainer.train(**options)
        return budget.elapsed_seconds, trainer.state.global_step

    seconds, steps = train(1 / 60)
    assert 1 <= seconds < 3
    more_seconds, more_steps = train(3 / 60, resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert 3 <= more_seconds < 5 and more_steps > steps + 1


class Signal(TrainerCallback):
    """Sends a signal to this process during a step."""

    def __init__(self, step: int, number: int):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, windows, number):
    def trainer(folder, *callbacks):
        args = arguments(folder, max_steps=8)
        torch.manual_seed(0)
        return Trainer(model=tiny_model(), args=args, train_dataset=windows, callbacks=[*callbacks])

    whole = trainer(tmp_path / "whole")
    whole.train()
    stop, handler = StopOnSignal(), signal.getsignal(number)
    cut = trainer(tmp_path / "cut", stop, Signal(3, number))
    cut.train()
    assert stop.received == number and signal.getsignal(number) is handler
    assert cut.state.global_step == 4 and (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").is_file()
    stop = StopOnSignal()
    resumed = trainer(tmp_path / "cut", stop)
    resumed.train(resume_from_checkpoint=True)
    assert stop.received is None
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


@pytest.fixture
def interruptible():
    """SIGINT raises `KeyboardInterrupt`; processes of pytest-xdist ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def test_a_second_signal_acts_at_once(tmp_path, windows, interruptible):
    handler = signal.getsignal(signal.SIGINT)

    class Impatient(Signal):
        def on_step_begin(self, args, state, control, **kwargs):
            super().on_step_begin(args, state, control)
            if state.global_step == self.step:
                while signal.getsignal(self.number) is not handler:  # the first may have reached another thread
                    time.sleep(0.01)
                os.kill(os.getpid(), self.number)
                time.sleep(30)

    trainer = Trainer(
        model=tiny_model(),
        args=arguments(tmp_path, max_steps=8),
        train_dataset=windows,
        callbacks=[StopOnSignal(), Impatient(3, signal.SIGINT)],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 3


def test_signals_are_what_they_were_after_a_training_that_raised(tmp_path, windows):
    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise RuntimeError("fault")

    handler, stop = signal.getsignal(signal.SIGINT), StopOnSignal()
    args = arguments(tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match="fault"):
        Trainer(model=tiny_model(), args=args, train_dataset=windows, callbacks=[stop, Fault()]).train()
    Trainer(model=tiny_model(), args=args, train_dataset=windows, callbacks=[stop]).train()
    assert signal.getsignal(signal.SIGINT) is handler and stop.received is None


def test_the_first_signal_after_a_training_that_raised_acts_at_once(tmp_path, windows, interruptible):
    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise RuntimeError("fault")

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    handler, stop = signal.getsignal(signal.SIGINT), StopOnSignal()
    args = arguments(tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match="fault"):
        Trainer(model=tiny_model(), args=args, train_dataset=windows, callbacks=[stop, Fault()]).train()
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert signal.getsignal(signal.SIGINT) is handler


def test_children_of_a_training_can_be_ended(tmp_path, windows):
    ended = []

    def work(is_running):
        is_running.set()
        # Not one long sleep: Python runs a handler between calls of C, and a signal that comes when a call has been
        # entered but does not wait yet would be handled at its end.
        for _ in range(6000):
            time.sleep(0.01)

    class Fork(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            context = multiprocessing.get_context("fork")
            is_running = context.Event()
            child = context.Process(target=work, args=(is_running,))
            child.start()
            assert is_running.wait(60)  # a signal that comes before Python runs again after the fork is lost
            child.terminate()
            child.join(30)
            ended.append(child.exitcode)
            child.kill()

    stop = StopOnSignal()
    args = arguments(tmp_path, max_steps=1)
    Trainer(model=tiny_model(), args=args, train_dataset=windows, callbacks=[stop, Fork()]).train()
    assert ended == [-signal.SIGTERM] and stop.received is None


def test_a_budget_begins_at_a_checkpoint_without_one(tmp_path, windows):
    def trainer(max_steps, *callbacks):
        args = arguments(tmp_path, max_steps=max_steps, save_strategy="steps", save_steps=2)
        return Trainer(model=tiny_model(), args=args, train_dataset=windows, callbacks=[*callbacks])

    trainer(2).train()
    budget = TimeBudget(minutes=10)
    trainer(3, budget).train(resume_from_checkpoint=True)
    assert 0 < budget.elapsed_seconds < 60


def test_checkpoints_come_by_the_clock(tmp_path, windows):
    class Waiting(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.3)

    args = arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=1000)
    callbacks = [Waiting(), SaveByTime(minutes=1 / 60)]
    Trainer(model=tiny_model(), args=args, train_dataset=windows, callbacks=callbacks).train()
    saved = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    assert 8 in saved and 2 <= len(saved) < 5


def test_every_training_has_a_budget_of_its_own(tmp_path, windows):
    budget, applied = TimeBudget(minutes=1.5 / 60, warmup=0.3, decay=0.5), []

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            applied.append([])

        def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
            applied[-1].append(optimizer.param_groups[0]["lr"])

    args = arguments(tmp_path, max_steps=10**6, lr_scheduler_type="constant")
    trainer = Trainer(
        model=STLMForCausalLM(tiny_config()), args=args, train_dataset=windows, callbacks=[budget, Record()]
    )
    for _ in range(2):
        trainer.train()
        assert 1.5 <= budget.elapsed_seconds < 5
    for rates in applied:
        assert len(rates) > 10 and max(rates) == pytest.approx(1e-2, rel=0.2)
        assert rates[0] < 0.5 * max(rates) and rates[-1] < 0.2 * max(rates)


def test_evaluation_and_saving_are_not_on_the_budget(tmp_path, windows):
    class Slow(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            time.sleep(1)

        on_save = on_evaluate

    budget = TimeBudget(minutes=1)
    args = arguments(
        tmp_path,
        max_steps=4,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
    )
    trainer = Trainer(
        model=STLMForCausalLM(tiny_config()),
        args=args,
        train_dataset=windows,
        eval_dataset=windows,
        callbacks=[Slow(), budget],
    )
    trainer.train()
    assert 0 < budget.elapsed_seconds < 3


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_waiting_counts_on_the_wall_clock_alone(tmp_path, windows, clock):
    class Waiting(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(1.5)

    budget = TimeBudget(minutes=1, clock=clock)
    args = arguments(tmp_path, max_steps=2, lr_scheduler_type="constant")
    Trainer(
        model=STLMForCausalLM(tiny_config()), args=args, train_dataset=windows, callbacks=[Waiting(), budget]
    ).train()
    assert budget.elapsed_seconds >= 3 if clock == "wall" else 0 < budget.elapsed_seconds < 2.5


WRAPPERS = {
    "lora": lambda model, name: get_peft_model(model, LoraConfig(target_modules="all-linear")),
    "trained in full": lambda model, name: get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=[name])
    ),
    "compiled": lambda model, name: torch.compile(model),
    "ddp": lambda model, name: DistributedDataParallel(model, process_group=one_process()),
}


def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return torch.distributed.group.WORLD


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_curriculum_finds_the_router_of_a_wrapped_model(wrap):
    model = tiny_model(patching="learned", patch_bytes=6)
    name, router = next((n, m) for n, m in model.named_modules() if hasattr(type(m), "ratio_loss"))
    try:
        wrapped = wrap(model, name.rsplit(".", 1)[-1])
        PatchLengthCurriculum(4).on_step_begin(None, TrainerState(global_step=3), None, model=wrapped)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    routers = [module for module in wrapped.modules() if type(module) is type(router)]
    assert [module for module in wrapped.modules() if "patch_bytes" in vars(module)] == routers
    assert router in routers and [module.patch_bytes for module in routers] == [5.0] * len(routers)
    assert len(routers) == (2 if wrap is WRAPPERS["trained in full"] else 1)


def test_the_curriculum_runs_in_a_training_of_adapters(tmp_path, windows):
    model = get_peft_model(tiny_model(patching="learned", patch_bytes=6), LoraConfig(target_modules="all-linear"))
    curriculum = PatchLengthCurriculum(2)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=windows, callbacks=[curriculum]).train()
    assert [m.patch_bytes for m in model.modules() if hasattr(type(m), "ratio_loss")] == [6.0]


def test_the_curriculum_names_models_without_a_router():
    for model, error in (
        (tiny_model(), "patching='spacelike' has no router"),
        (tiny_model(patching="fixed"), "patching='fixed' has no router"),
        (torch.nn.Linear(1, 1), "Linear has no patches: this is for STLM with patching='learned'"),
    ):
        with pytest.raises(ValueError, match=error):
            PatchLengthCurriculum(4).on_step_begin(None, TrainerState(), None, model=model)
