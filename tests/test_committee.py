# SPDX-License-Identifier: Apache-2.0
"""A committee is the mean of its members, and one model to the library."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    TorchAoConfig,
    Trainer,
    pipeline,
)

from modeling_stlm import (
    STLMCommittee,
    STLMForCausalLM,
    STLMForMaskedLM,
    STLMForMultipleChoice,
    STLMForQuestionAnswering,
    STLMForSequenceClassification,
    STLMForTokenClassification,
    STLMModel,
)

from .hub_server import Hub
from .test_distributed import run as launch
from .test_examples import ROOT, refused, run
from .test_hub import client
from .tiny import PATCHING, TEXT, WITHOUT_PACKAGES, batch, ids_of, randomize, tiny_config, tiny_model
from .trainers import RAGGED, TOKENIZER, arguments, losses, weights


ROWS = batch([ids_of("One. Two, three"), ids_of("Zoë met 東京 Bob."), ids_of("x")], "left")
# The second has other sizes: members need not be alike.
SIZES = ({}, {"hidden_size": 24, "num_trunk_layers": 1}, {"patching": "fixed"})
OPTIONS = {
    STLMForCausalLM: {},
    STLMForMaskedLM: {"is_causal": False},
    STLMForSequenceClassification: {"is_causal": False, "num_labels": 3},
    STLMForTokenClassification: {"is_causal": False, "num_labels": 3},
    STLMForQuestionAnswering: {"is_causal": False},
    STLMForMultipleChoice: {"is_causal": False},
}


def member(head, seed: int = 0, **options):
    model = randomize(head(tiny_config(**OPTIONS[head], **options)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def committee_of(head, **options) -> STLMCommittee:
    return STLMCommittee.from_members([member(head, seed, **(sizes | options)) for seed, sizes in enumerate(SIZES)])


def mean_probabilities(committee: STLMCommittee, inputs: dict, name: str = "logits") -> torch.Tensor:
    """Of the members, one by one."""
    with torch.no_grad():
        total = 0
        for model in committee.members:
            total = total + getattr(model(**inputs), name).double().softmax(-1)
    return total / len(committee.members)


@pytest.mark.parametrize("head", OPTIONS, ids=lambda head: head.__name__)
def test_probabilities_are_the_mean_of_those_of_the_members(head):
    committee = committee_of(head)
    inputs = ROWS
    names = ("start_logits", "end_logits") if head is STLMForQuestionAnswering else ("logits",)
    if head is STLMForMultipleChoice:
        inputs = {name: value[None].expand(2, -1, -1) for name, value in ROWS.items()}
    if head is STLMForQuestionAnswering:  # padding has no probability: see the next test
        inputs = {name: value[1:2] for name, value in ROWS.items()}
    with torch.no_grad():
        outputs = committee(**inputs)
    for name in names:
        expected = mean_probabilities(committee, inputs, name)
        torch.testing.assert_close(outputs[name].exp().double(), expected, atol=1e-6, rtol=0)
        apart = [getattr(model(**inputs), name).softmax(-1) for model in committee.members]
        assert (apart[0] - apart[1]).abs().max() > 0.01, "members that agree prove nothing"


def test_answers_of_a_padded_row_are_those_of_the_row_alone():
    committee = committee_of(STLMForQuestionAnswering)
    with torch.no_grad():
        padded, marked = committee(**ROWS), committee(ROWS["input_ids"])  # padding ids stand for the mask
        for i, mask in enumerate(ROWS["attention_mask"].bool()):
            alone = committee(ROWS["input_ids"][i : i + 1, mask])
            for name in ("start_logits", "end_logits"):
                torch.testing.assert_close(padded[name][i, mask], alone[name][0], atol=1e-5, rtol=0)
                assert torch.equal(marked[name][i, mask], padded[name][i, mask])
                assert padded[name][i, ~mask].exp().sum() == 0


def test_several_labels_and_values_are_averaged_as_such():
    committee = committee_of(STLMForSequenceClassification, problem_type="multi_label_classification")
    with torch.no_grad():
        found = committee(**ROWS).logits.sigmoid()
        expected = torch.stack([model(**ROWS).logits.sigmoid() for model in committee.members]).mean(0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    values = STLMCommittee.from_members(
        [randomize(STLMForSequenceClassification(tiny_config(num_labels=1))) for _ in range(2)]
    )
    with torch.no_grad():
        values.members[0].score.weight.neg_()
        assert values(**ROWS).logits.abs().max() < 1e-6 < values.members[0](**ROWS).logits.abs().min()
    assert values(**ROWS, labels=torch.ones(3)).loss.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("head", OPTIONS, ids=lambda head: head.__name__)
def test_the_loss_of_a_committee_of_one_is_that_of_its_member(head):
    model = member(head)
    committee = STLMCommittee.from_members([model])
    ids = ROWS["input_ids"]
    labels = {"labels": torch.tensor([2, 0, -100])}
    inputs = ROWS
    if head is STLMForQuestionAnswering:
        inputs = {"input_ids": ids[1:2]}
        labels = {"start_positions": torch.tensor([1]), "end_positions": torch.tensor([4])}
    elif head is STLMForMultipleChoice:
        inputs, labels = {"input_ids": ids[None].expand(2, -1, -1)}, {"labels": torch.tensor([2, 0])}
    elif head is not STLMForSequenceClassification:
        labels = {"labels": (ids % 3).masked_fill(ids > 255, -100)}
    for options in ({}, {"num_items_in_batch": 7}) if "labels" in labels else ({},):
        expected = model(**inputs, **labels, **options).loss
        assert expected > 0.1
        torch.testing.assert_close(committee(**inputs, **labels, **options).loss, expected)


def test_every_value_is_a_target_of_a_regression():
    model = randomize(STLMForSequenceClassification(tiny_config(num_labels=1)))
    committee = STLMCommittee.from_members([model])
    labels = torch.tensor([-100, 3, 4])
    for number in (None, 3):
        expected = model(**ROWS, labels=labels, num_items_in_batch=number).loss
        assert expected > 1000
        torch.testing.assert_close(committee(**ROWS, labels=labels, num_items_in_batch=number).loss, expected)


def test_members_keep_their_weights_and_may_be_used_alone(tmp_path):
    first, second = member(STLMForCausalLM), member(STLMForCausalLM, 1)
    second.save_pretrained(tmp_path / "second")
    members = [first, STLMForCausalLM.from_pretrained(tmp_path / "second")]
    expected = [model(**ROWS).logits for model in (first, second)]
    committee = STLMCommittee.from_members(members)
    for ours, model, logits in zip(committee.members, members, expected):
        assert ours is model and torch.equal(ours(**ROWS).logits, logits)
    committee.save_pretrained(tmp_path / "committee")
    eager = STLMCommittee.from_pretrained(tmp_path / "committee", attn_implementation="eager", dtype=torch.bfloat16)
    for ours, logits in zip(eager.members, expected):
        assert ours.config._attn_implementation == "eager" and ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours(**ROWS).logits.float(), logits, atol=0.3, rtol=0.1)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "static", "drafts"],
)
def test_generation_with_a_cache_for_each_member(options):
    committee = committee_of(STLMForCausalLM)
    prompts = batch([ids_of("The trunk runs"), ids_of("x"), ids_of("Zoë saw 東")], "left")
    if "prompt_lookup_num_tokens" in options:  # one row only
        prompts = {"input_ids": torch.tensor([ids_of("a word, a word, a w")])}
    settings = {"max_new_tokens": 12, "do_sample": False, "valid_utf8": True, "disable_compile": True}
    new = committee.generate(**prompts, use_cache=True, **settings, **options)
    plain = {name: value for name, value in options.items() if name == "num_beams"}
    assert torch.equal(new, committee.generate(**prompts, use_cache=False, **settings, **plain))
    cache = DynamicCache()
    text = torch.tensor([ids_of(TEXT)])
    with torch.no_grad():
        parts = [committee(text[:, first : first + 50], cache=cache).logits for first in range(0, text.shape[1], 50)]
        torch.testing.assert_close(torch.cat(parts, 1), committee(text).logits, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == text.shape[1]


@pytest.mark.parametrize(
    ("head", "auto"),
    [
        (STLMForCausalLM, AutoModelForCausalLM),
        (STLMForMaskedLM, AutoModelForMaskedLM),
        (STLMForSequenceClassification, AutoModelForSequenceClassification),
    ],
    ids=lambda value: value.__name__,
)
def test_a_committee_is_saved_and_loaded_as_one(tmp_path, head, auto):
    committee = committee_of(head)
    committee.save_pretrained(tmp_path / "committee")
    for loaded in (loader.from_pretrained(tmp_path / "committee") for loader in (auto, AutoModel, STLMCommittee)):
        assert isinstance(loaded, STLMCommittee) and type(loaded) is type(committee)
        with torch.no_grad():
            assert torch.equal(loaded(**ROWS).logits, committee(**ROWS).logits)
        if head is not STLMForSequenceClassification:
            assert loaded.members[1].lm_head.weight is loaded.members[1].model.embed_tokens.weight
        assert loaded.can_generate() == (head is STLMForCausalLM)
    loaded.members[1].save_pretrained(tmp_path / "member")
    alone = auto.from_pretrained(tmp_path / "member")
    assert type(alone) is head
    assert torch.equal(alone(**ROWS).logits, committee.members[1](**ROWS).logits)
    assert torch.equal(copy.deepcopy(loaded)(**ROWS).logits, committee(**ROWS).logits)


PUBLISH = """
import sys
from modeling_stlm import STLMCommittee, STLMTokenizer
STLMCommittee.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2])
STLMTokenizer().push_to_hub(sys.argv[2])
"""
LOAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, out, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
ids = torch.tensor([AutoTokenizer.from_pretrained(repo)(text)["input_ids"]])
with torch.no_grad():
    logits = model(ids).logits
    again = type(model).from_members(list(model.members))(ids).logits
torch.save([logits, again, model.generate(ids, max_new_tokens=9, do_sample=False)], out)
"""


def test_a_committee_is_pushed_with_its_code_and_loads_where_the_packages_are_not_installed(tmp_path):
    committee = committee_of(STLMForCausalLM)
    committee.save_pretrained(tmp_path / "folder")
    with Hub({"key": "alice"}) as hub:
        client(hub, tmp_path / "publisher", PUBLISH, tmp_path / "folder", "alice/committee", token="key")
        out = tmp_path / "out.pt"
        client(hub, tmp_path / "reader", WITHOUT_PACKAGES + LOAD, "alice/committee", out, TEXT)
    logits, again, new = torch.load(out)
    ids = torch.tensor([ids_of(TEXT)])
    assert torch.equal(logits, committee(ids).logits) and torch.equal(again, logits)
    assert torch.equal(new, committee.generate(ids, max_new_tokens=9, do_sample=False))


def test_a_committee_is_quantized_as_one(tmp_path):
    committee = committee_of(STLMForCausalLM)
    committee.save_pretrained(tmp_path / "plain")
    settings = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}
    quantized = STLMCommittee.from_pretrained(tmp_path / "plain", **settings)
    for model in quantized.members:
        assert model.lm_head.weight is model.model.embed_tokens.weight
        kinds = [type(module.weight).__name__ for module in model.modules() if isinstance(module, torch.nn.Linear)]
        assert kinds.count("Parameter") == 1 < len(kinds)  # the tied head
    with torch.no_grad():
        difference = (quantized(**ROWS).logits - committee(**ROWS).logits).abs().max()
    assert 0 < difference < 0.4  # measured 0.2
    quantized.save_pretrained(tmp_path / "quantized")
    again = STLMCommittee.from_pretrained(tmp_path / "quantized")
    assert torch.equal(again(**ROWS).logits, quantized(**ROWS).logits)


def test_pipelines_take_a_committee():
    classifier = committee_of(STLMForSequenceClassification)
    texts = ["One. Two", "x"]
    found = pipeline("text-classification", model=classifier, tokenizer=TOKENIZER, device="cpu")(texts, batch_size=2)
    for text, entry in zip(texts, found):
        expected = mean_probabilities(classifier, {"input_ids": torch.tensor([ids_of(text)])})[0]
        assert entry["label"] == f"LABEL_{expected.argmax()}"
        assert entry["score"] == pytest.approx(expected.max().item(), rel=1e-4)
    filler = committee_of(STLMForMaskedLM)
    (entry,) = pipeline("fill-mask", model=filler, tokenizer=TOKENIZER, device="cpu")("a w<mask>rd", top_k=1)
    expected = mean_probabilities(filler, {"input_ids": torch.tensor([[*b"a w", 259, *b"rd"]])})[0, 3]
    assert entry["token"] == expected.argmax() and entry["score"] == pytest.approx(expected.max().item(), rel=1e-4)
    writer = committee_of(STLMForCausalLM)
    write = pipeline("text-generation", model=writer, tokenizer=TOKENIZER, device="cpu")
    (out,) = write("One", max_new_tokens=8, do_sample=False, valid_utf8=True)
    new = writer.generate(torch.tensor([ids_of("One")]), max_new_tokens=8, do_sample=False, valid_utf8=True)
    assert out["generated_text"] == TOKENIZER.decode(new[0], skip_special_tokens=True)


@pytest.mark.parametrize("head", [STLMForCausalLM, STLMForSequenceClassification], ids=lambda head: head.__name__)
def test_trainer_trains_every_member_and_resumes(tmp_path, head):
    """Also label smoothing, for which the library looks up by the name of the class whether labels are shifted."""
    if head is STLMForCausalLM:
        data = [{"input_ids": row[:40], "labels": row[:40]} for row in [RAGGED[0], RAGGED[5]] * 4]
    else:
        data = [{"input_ids": row, "labels": i % 3} for i, row in enumerate(RAGGED)] * 2
    options = {"label_smoothing_factor": 0.1} if head is STLMForCausalLM else {}

    def train(folder, resume=False, **more):
        committee = committee_of(head)
        start = weights(committee)
        args = arguments(folder, save_strategy="steps", save_steps=3, learning_rate=1e-3, **options, **more)
        trainer = Trainer(model=committee, args=args, train_dataset=data, processing_class=TOKENIZER)
        before = trainer.evaluate(data)["eval_loss"]
        trainer.train(resume_from_checkpoint=resume)
        assert resume or trainer.evaluate(data)["eval_loss"] < before
        return trainer, start

    trainer, start = train(tmp_path / "whole")
    moved = {name for name, value in weights(trainer.model).items() if not torch.equal(value, start[name])}
    assert {name.split(".")[1] for name in moved} == {"0", "1", "2"}
    first = losses(trainer)[0]
    if head is STLMForCausalLM:
        rows = torch.tensor([row["input_ids"] for row in data])
        with torch.no_grad():
            logits = torch.stack([model(rows).logits[:, :-1].softmax(-1) for model in committee_of(head).members])
        wanted = -logits.mean(0).log().gather(-1, rows[:, 1:, None]).mean()
        assert first == pytest.approx(wanted.item(), rel=0.15)  # smoothed; unshifted labels would be nearly known
    train(tmp_path / "cut", max_steps=3, lr_scheduler_type="constant")
    resumed, _ = train(tmp_path / "cut", resume=True, lr_scheduler_type="constant")
    whole, _ = train(tmp_path / "constant", lr_scheduler_type="constant")
    for name, value in weights(resumed.model).items():
        assert torch.equal(value, weights(whole.model)[name]), name
    resumed.save_model(tmp_path / "saved")
    loaded = STLMCommittee.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(**ROWS).logits, resumed.model.eval()(**ROWS).logits)


TWO_PROCESSES = """
import json, sys, torch
from transformers import Trainer, TrainingArguments
from modeling_stlm import STLMCommittee
settings = json.loads(sys.argv[1])
model = STLMCommittee.from_pretrained(settings["model"])
rows = [list(b"a word and another w"), list(b"x" * 20), list(b"1 2 3 4 5 6 7 8 9 0 "), list(b"y" * 20)]
data = [{"input_ids": row, "labels": row} for row in rows * 3]
args = TrainingArguments(settings["out"], max_steps=3, learning_rate=0.1, optim="sgd", logging_steps=1,
                         per_device_train_batch_size=settings["rows"], save_strategy="no", report_to="none",
                         use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential")
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
if trainer.is_world_process_zero():
    total = [float(p.detach().double().abs().sum()) for p in model.parameters()]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    json.dump({"losses": losses, "weights": total, "processes": args.world_size}, open(settings["out"] + ".json", "w"))
"""


@pytest.mark.slow
def test_two_processes_train_a_committee_like_one(tmp_path):
    committee_of(STLMForCausalLM).save_pretrained(tmp_path / "model")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    found = []
    for processes in (1, 2):
        settings = {"model": str(tmp_path / "model"), "out": str(tmp_path / str(processes)), "rows": 4 // processes}
        launch(tmp_path / "train.py", processes, settings)
        found.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    assert [result["processes"] for result in found] == [1, 2]
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)
    assert found[0]["losses"][-1] < found[0]["losses"][0]
    assert found[0]["weights"] == pytest.approx(found[1]["weights"], rel=1e-5)


def test_members_that_disagree_are_refused():
    first = member(STLMForSequenceClassification)
    with pytest.raises(ValueError, match="at least one member, got none"):
        STLMCommittee.from_members([])
    with pytest.raises(ValueError, match=r"member 0 is a STLMModel, expected one of STLMForCausalLM, "):
        STLMCommittee.from_members([STLMModel(tiny_config())])
    with pytest.raises(ValueError, match="member 1 is a STLMForMaskedLM, expected STLMForSequenceClassification as"):
        STLMCommittee.from_members([first, member(STLMForMaskedLM)])
    labels = {0: "no", 1: "yes", 2: "maybe"}
    for field, value in {
        "id2label": labels,
        "vocab_size": 384,
        "eos_token_id": 0,
        "problem_type": "multi_label_classification",
    }.items():
        other = member(STLMForSequenceClassification, **{field: value})
        with pytest.raises(ValueError, match=rf"member 1 has {field}=.*, expected .* as member 0"):
            STLMCommittee.from_members([first, other])


def test_what_a_committee_cannot_do_is_refused(tmp_path):
    committee = committee_of(STLMForSequenceClassification)
    with pytest.raises(ValueError, match="got inputs_embeds"):
        committee(inputs_embeds=torch.zeros(1, 2, 16))
    committee.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="STLMCommitteeForCausalLM needs members with the head 'CausalLM'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    for field, value in {"num_labels": 5, "vocab_size": 384, "pad_token_id": 0}.items():
        with pytest.raises(ValueError, match=rf"member 0 has {field}=\d+, expected {value} as the committee"):
            STLMCommittee.from_pretrained(tmp_path, **{field: value})
    tiny_model().save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="this is the config of a committee of 0 with the head 'CausalLM'"):
        STLMCommittee.from_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="resize those of its members"):
        committee.resize_token_embeddings(400)
    assert not hasattr(committee, "generate")
    learned = STLMCommittee.from_members([member(STLMForCausalLM, **PATCHING["learned"])])
    assert learned(torch.tensor([ids_of(TEXT)])).logits.isfinite().all()
    with pytest.raises(ValueError, match="train them apart"):
        learned.train()(torch.tensor([ids_of(TEXT)]))


def test_the_example_names_a_row_without_a_text(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,0\n,1\n")
    arguments = {"text": __file__, "train": "rows.csv", "test": "rows.csv", "output": "x", "articles": 1}
    options = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    assert refused("committee.py", *options, cwd=tmp_path) == "row 2 of rows.csv has the text None, expected a text"


def test_the_example_compares_depth_pretraining_and_committees(tmp_path):
    words = ("red apple", "blue sea", "green tree")
    with (tmp_path / "articles.jsonl").open("w") as articles, (tmp_path / "rows.csv").open("w") as rows:
        rows.write("label,text\n")
        for i in range(12):
            articles.write(json.dumps({"text": f"{words[i % 3]} and more of it {i}"}) + "\n")
            rows.write(f"{i % 3},{words[i % 3]} {i}\n")
    files = ("--text", "articles.jsonl", "--train", "rows.csv", "--test", "rows.csv", "--output", "out")
    sizes = ("--articles", 12, "--members", 2, "--deep", 2, "--batch_size", 6, "--seeds", 2, "--rows", 9)
    output = run("committee.py", *files, *sizes, cwd=tmp_path)
    assert "0 articles" in output and "ms at batch 32" in output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for arm in ("deep", "shallow", "committee"):
        assert list(results["accuracy"][arm]) == ["0", "12"]
        assert all(len(values) == 2 and 0 <= min(values) for values in results["accuracy"][arm].values())
        assert results["latency_ms"][arm]["1"] > 0
    assert results["parameters"]["committee"] == 2 * results["parameters"]["shallow"]
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 0
    committee = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "committee")
    assert isinstance(committee, STLMCommittee) and len(committee.members) == 2
    # What is done is kept: with a cell taken out, that one comes again from the kept encoders, and the others as they were.
    kept = json.loads((tmp_path / "out" / "cells.json").read_text())
    removed = kept.pop("seed 1, 12 articles")
    kept["seed 0, 0 articles"] = dict.fromkeys(removed, 0.25)
    (tmp_path / "out" / "cells.json").write_text(json.dumps(kept))
    again = run("committee.py", *files, *sizes, cwd=tmp_path)
    assert "seed 0, 0 articles: {'deep': 0.25" in again and f"seed 1, 12 articles: {removed}" in again
    other = ("--pretraining_epochs", 2, "--output", "other", "--encoders", "out/encoders")
    # As a file of text, whose articles are bytes.
    (tmp_path / "article.txt").write_text("One article. Zoë.", encoding="utf-8")
    (tmp_path / "words.csv").write_text(
        "label,text\n" + "".join(f"{words[i % 3]},{words[i % 3]} {i}\n" for i in range(12))
    )
    (tmp_path / "more.csv").write_text("label,text\nred apple,a\nblack hole,b\n")
    in_words = ("--text", "article.txt", "--train", "words.csv", "--test", "words.csv", "--output", "words")
    run("committee.py", *in_words, *sizes, "--articles", 1, "--seeds", 1, cwd=tmp_path)
    committee = AutoModelForSequenceClassification.from_pretrained(tmp_path / "words" / "committee")
    assert committee.config.id2label == dict(enumerate(sorted(words)))
    refusals = {
        (
            *sizes,
            "--train",
            "words.csv",
            "--test",
            "more.csv",
        ): "--test has the labels ['black hole'], which --train lacks",
        ("--articles", 13): "hold 12 articles, expected at least 13",
        (*sizes, "--finetuning_epochs", 2): "begun.json was made with {'finetuning_epochs': '1'}: use another folder",
        (*sizes, *other): "pretraining.json was made with {'pretraining_epochs': '1'}: use another folder",
    }
    for more, message in refusals.items():
        refused = [sys.executable, str(ROOT / "examples" / "committee.py"), *map(str, (*files, *more))]
        finished = subprocess.run(refused, cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 1 and message in finished.stderr
