# SPDX-License-Identifier: Apache-2.0
"""Model cards written from a checkpoint folder: metadata the Hub reads, true numbers, a snippet that runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, LlamaConfig

import modeling_stlm
from modeling_stlm import STLMForMaskedLM, STLMForSequenceClassification, STLMModel, STLMTokenizer
from modeling_stlm.training.model_card import TASKS, build_model_card, describe_base, write_model_card

from .hub_server import metadata_errors
from .tiny import PATCHING, SHARING, tiny_config, tiny_model


ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "examples" / "checkpoints"
UNDESCRIBED = (
    "are not described here. `examples/push_to_hub.py --data about.md` adds what they are and their licences."
)
OPTIONS = {"licence": "cc-by-sa-4.0", "language": "en", "data": "Letters of a test."}
RESULTS = {
    "model": "tiny",
    "steps": 1200,
    "bytes_seen": 9830400,
    "budget": {"steps": 1200},
    "bits_per_byte": {"validation": 1.75, "test": 1.5},
    "arguments": {
        "train": "*.txt",
        "validation": "held out.txt",
        "test": "a.txt b.txt",
        "block_bytes": "1024",
        "batch_size": "8",
        "muon_lr": "0.02",
        "adamw_lr": "0.003",
    },
    "commit": "abc1234",
    "device": "a CPU",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    tiny_model(**SHARING["cycle"]).save_pretrained(folder)
    STLMTokenizer().save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


def snippet(card: ModelCard) -> str:
    return "".join(re.findall(r"```python\n(.*?)```", card.text, re.DOTALL))


def data_of(card: ModelCard) -> str:
    return re.search(r"## Data\n\n(.*?)\n\n## Limits", card.text, re.DOTALL)[1]


def test_the_metadata_read_back_are_those_of_the_run(checkpoint):
    assert write_model_card(checkpoint, build_model_card(checkpoint, **OPTIONS))
    data = ModelCard.load(checkpoint / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "cc-by-sa-4.0")
    assert data.language == "en" and data.metrics == ["bits_per_byte"] and "stlm" in data.tags
    assert data.model_name == "tiny"
    found = [(e.dataset_split, e.dataset_name, e.metric_type, e.metric_value) for e in data.eval_results]
    assert found == [
        ("validation", "held out.txt", "bits_per_byte", 1.75),
        ("test", "a.txt b.txt", "bits_per_byte", 1.5),
    ]
    assert metadata_errors((checkpoint / "README.md").read_text()) == []


def test_the_sizes_in_the_card_are_those_of_the_weights(checkpoint):
    card = build_model_card(checkpoint, **OPTIONS).text
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    effective = model.parameter_budget()["effective"]["total"]
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert effective > stored
    assert f"{stored:,} stored ({effective:,} effective) parameters" in card
    assert f"| total | {stored:,} | {effective:,} |" in card
    rows = re.findall(r"^\| ([\w -]+) \| ([\d,]+) \| ([\d,]+) \|$", card, re.MULTILINE)
    assert sum(int(row[1].replace(",", "")) for row in rows[:-1]) == stored
    assert sum(int(row[2].replace(",", "")) for row in rows[:-1]) == effective
    assert f"{model.flops_per_byte(4) / 1e6:.2f} MFLOP at 4 bytes per patch" in card
    assert "4 passes over 2 stored layers of width 24, shared by the rule `cycle`" in card


def test_the_card_tells_the_run_and_no_folder_of_the_machine(checkpoint):
    card = str(build_model_card(checkpoint, **OPTIONS))
    for text in ("9,830,400 bytes seen in 1,200 steps", "abc1234", "a CPU", "Letters of a test.", "*.txt"):
        assert text in card
    assert str(checkpoint) not in card
    assert "linear decay over the last 60%" in card  # of runs before it was an argument
    assert "- optimizer: Muon 0.02 on matrices, AdamW 0.003 on" in card  # of runs before there was another one
    results = RESULTS | {"arguments": RESULTS["arguments"] | {"decay": "0.25", "matrix_optimizer": "NorMuon"}}
    (checkpoint / "results.json").write_text(json.dumps(results))
    card = str(build_model_card(checkpoint, **OPTIONS))
    assert "linear decay over the last 25%" in card and "- optimizer: NorMuon 0.02 on matrices, AdamW" in card
    special = {"only": "match_embedding", "noise": "0.1", "repeat": "0.0"}
    (checkpoint / "results.json").write_text(json.dumps(RESULTS | {"arguments": RESULTS["arguments"] | special}))
    card = str(build_model_card(checkpoint, **OPTIONS))
    assert "- only match_embedding was trained\n- errors of letters in 10% of the documents\n- a CPU" in card


def test_the_card_tells_what_was_trained_afterwards(checkpoint):
    arguments = {
        "batch_size": "4",
        "block_bytes": "4096",
        "only": "match_embedding",
        "muon_lr": "0.02",
        "adamw_lr": "0.0006000000000000001",
        "train": "some.txt",
    }
    after = {"steps": 122, "bytes_seen": 1_998_848, "arguments": arguments | {"decay": "0.9", "repeat": "0.03"}}
    after |= {"commit": "def5678", "device": "another", "torch": "2.13.0", "transformers": "5.24.0"}
    (checkpoint / "results.json").write_text(json.dumps(RESULTS | {"afterwards": [after]}))
    card = str(build_model_card(checkpoint, **OPTIONS))
    assert "9,830,400 bytes seen in 1,200 steps" in card and "abc1234" in card
    assert "- then 1,998,848 bytes in 122 steps of 4 windows of 4096 bytes; texts: some.txt\n" in card
    assert "- their rates: Muon 0.02, AdamW 0.0006, linear" in card
    assert "- only match_embedding was trained\n- a passage repeated in 3% of the documents\n- another; torch" in card
    second = {**after, "bytes_seen": 3_000_000, "arguments": arguments | {"decay": "0.9", "sentences": "0.3"}}
    second["share_of_weights"] = 0.4
    second["arguments"]["matrix_optimizer"] = "NorMuon"
    second["arguments"]["objective"] = "[['LearnedRepetitionPenalty', '6.0', '10'], ['NextThought', '0.1']]"
    (checkpoint / "results.json").write_text(json.dumps(RESULTS | {"afterwards": [after, second]}))
    card = str(build_model_card(checkpoint, **OPTIONS))
    mean = "- from the weights of then, for 40% of a mean with them, 3,000,000 bytes"
    assert card.index("- then 1,998,848 bytes") < card.index(mean)
    assert "- their rates: NorMuon 0.02, AdamW 0.0006, linear" in card
    objectives = "\n- objective beside the next byte: LearnedRepetitionPenalty 6.0, weight 10"
    assert card.count(objectives) == 1 and "\n- objective beside the next byte: NextThought, weight 0.1\n" in card
    assert "- 30% of the documents replaced by documents of one of their sentences\n- another; torch" in card
    (checkpoint / "results.json").write_text(json.dumps(RESULTS | {"afterwards": [after, second | {"added": True}]}))
    added = "- added to these, what a training of earlier weights had changed (in a mean, of which it is 40%): 3,000,000 bytes"
    assert added in str(build_model_card(checkpoint, **OPTIONS))
    after["arguments"]["set"] = "['rope_theta=40000', 'match_doublings=2']"
    (checkpoint / "results.json").write_text(json.dumps(RESULTS | {"afterwards": [after | {"added": True}]}))
    card = str(build_model_card(checkpoint, **OPTIONS))
    assert "- added to these, what a training of earlier weights had changed: 1,998,848 bytes" in card
    assert "\n- fields changed: rope_theta=40000, match_doublings=2\n" in card
    del after["arguments"]["set"]
    for name in ("only", "repeat"):
        del after["arguments"][name]
    (checkpoint / "results.json").write_text(json.dumps(RESULTS | {"afterwards": [after]}))
    assert "- their rates: Muon 0.02, AdamW 0.0006, linear decay over the last 90%\n- another; torch" in str(
        build_model_card(checkpoint, **OPTIONS)
    )


def test_scores_of_exported_weights_replace_those_of_the_run(checkpoint):
    exported = {"dtype": "bfloat16", "scores": {"test": {"bits_per_byte": 1.625, "bytes": 123456}}}
    (checkpoint / "results.json").write_text(json.dumps(RESULTS | {"exported": exported}))
    card = build_model_card(checkpoint)
    assert "| test | 1.6250 | 123,456 |" in card.text and "bfloat16 weights" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [1.625]


def test_without_results_the_card_claims_none(checkpoint):
    (checkpoint / "results.json").unlink()
    card = build_model_card(checkpoint)
    assert card.data.eval_results is None and card.data.license is None
    assert data_of(card) == f"The texts of this training {UNDESCRIBED}"
    assert "## Results" not in card.text and "## Training" not in card.text and "## Architecture" in card.text
    assert card.data.model_name == "checkpoint" or "# checkpoint" in card.text


def test_a_card_that_somebody_wrote_or_edited_stays(checkpoint):
    path, card = checkpoint / "README.md", build_model_card(checkpoint)
    for text in ("# Mine\n", "", "no newline", str(card)):
        path.write_text(text)
        assert not write_model_card(checkpoint, card)
        assert path.read_text() == text
    path.unlink()
    assert write_model_card(checkpoint, card)
    assert write_model_card(checkpoint, build_model_card(checkpoint, **OPTIONS))  # generated and untouched: renewed
    generated = path.read_text()
    assert "Letters of a test." in generated
    for edited in (generated.replace("Letters", "Words"), generated.replace("cc-by", "by"), generated + "More.\n"):
        path.write_text(edited)
        assert not write_model_card(checkpoint, card)
        assert path.read_text() == edited


def test_a_card_is_written_whole_or_not_at_all(checkpoint, monkeypatch):
    def cut(path, text, **kwargs):
        write_text(path, text[: len(text) // 2], **kwargs)
        raise OSError("no space left")

    path, card, write_text = checkpoint / "README.md", build_model_card(checkpoint), Path.write_text
    path.unlink(missing_ok=True)
    assert write_model_card(checkpoint, card)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", cut)
        with pytest.raises(OSError, match="no space"):
            write_model_card(checkpoint, card)
    assert write_model_card(checkpoint, card) and path.read_text().startswith(str(card))


def test_only_models_of_this_package_get_a_card(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a card is written for STLMModel, STLMForCausalLM, .* only"):
        build_model_card(tmp_path)


CLASSES = [getattr(modeling_stlm, name) for name in TASKS if name != "STLMForCausalLM"]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_card_of_a_head_names_its_task_and_its_snippet_runs(cls, tmp_path, monkeypatch, capsys):
    cls(tiny_config(is_causal=False, num_labels=3)).save_pretrained(tmp_path)
    STLMTokenizer().save_pretrained(tmp_path)
    scores = {"test": {"accuracy": 0.875, "f1": 0.5}, "typos": {"accuracy": 0.25}}
    results = {"base_model": {"name": "base"}, "scores": scores, "arguments": {"test": "held.csv"}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    card = build_model_card(tmp_path)
    assert card.data.pipeline_tag == TASKS[cls.__name__].tag and card.data.metrics == ["accuracy", "f1"]
    found = [(e.dataset_name, e.metric_type, e.metric_value) for e in card.data.eval_results]
    assert found == [("held.csv", "accuracy", 0.875), ("held.csv", "f1", 0.5), ("typos", "accuracy", 0.25)]
    assert "| split | accuracy | f1 |" in card.text and "| typos | 0.2500 |  |" in card.text
    assert ("ids: bytes and special" in card.text) == (cls.__name__ == "STLMForMaskedLM")
    assert "It continues text" not in card.text and metadata_errors(str(card)) == []
    monkeypatch.chdir(tmp_path)
    exec(snippet(card))  # as a checkout runs it; without the package: the next test
    assert capsys.readouterr().out


def text_of(model, folder: Path) -> str:
    model.save_pretrained(folder)
    return build_model_card(folder).text


@pytest.mark.parametrize("name", SHARING)
def test_the_card_says_what_is_tied(name, tmp_path):
    text = text_of(tiny_model(**SHARING[name]), tmp_path)
    trunk = {
        "none": "2 passes over 2 stored layers of width 24, each with its own weights",
        "immediate": "6 passes over 4 stored layers of width 24, shared by the rule `immediate`",
        "cycle": "4 passes over 2 stored layers of width 24, shared by the rule `cycle`",
        "middle": "5 passes over 3 stored layers of width 24, shared by the rule `middle`",
        "ffn": "4 passes over 4 stored attention and 3 stored feed-forward blocks of width 24, shared by the rule `ffn`",
    }[name]
    assert f"- trunk, once per patch: {trunk}\n" in text and "- head: tied to the byte embedding" in text
    assert ("with a weight-tied trunk" in text) == (name != "none") and "level, weight-tied" not in text
    assert ("a shared layer once per pass" in text) == (name != "none")
    assert "a tied head in addition to the embedding" in text


def test_passes_with_matrices_of_their_own_are_told(tmp_path):
    text = text_of(tiny_model(**SHARING["cycle"], sharing_lora_rank=3), tmp_path)
    assert "shared by the rule `cycle`, each pass with matrices of rank 3 of its own\n" in text
    text = text_of(tiny_model(tie_word_embeddings=False), tmp_path / "untied")
    assert "Effective parameters" not in text and "\n\nForward pass,\nper byte of 1024:" in text


def test_the_card_says_which_way_the_model_looks(tmp_path):
    for is_causal, kind, way in (
        (True, "A pooled byte-level causal model without a head ", "- causal: a byte sees nothing after it\n"),
        (False, "A pooled byte-level encoder ", "- bidirectional: a byte sees the whole text\n"),
    ):
        text = text_of(STLMModel(tiny_config(is_causal=is_causal)), tmp_path)
        assert kind in text and way in text and "continues text" not in text and "; attention over" not in text
    for is_causal, words in ((True, "; attention over the last 1,024 patches\n"), (False, "nearest 1,024 patches\n")):
        text = text_of(STLMModel(tiny_config(is_causal=is_causal, trunk_window_patches=1024)), tmp_path)
        assert words in text and "the whole text" not in text


def test_the_card_says_what_is_matched(tmp_path):
    for options, words in (
        ({"match_bytes": 0, "match_doublings": 0}, "; match embedding: none\n"),
        ({"match_bytes": 3, "match_doublings": 0}, "; match embedding: the byte that followed the same 3 bytes\n"),
        (
            {"match_bytes": 4, "match_doublings": 2},
            "; match embedding: the byte that followed the same 4 or 8 or 16 bytes\n",
        ),
        (
            {"match_bytes": 0, "context_ngram_orders": [2, 3]},
            "; in-context n-grams: the bytes that followed the last 3 places of the same 2 or 3 bytes\n",
        ),
        (
            {"context_ngram_orders": [2], "context_ngram_places": 1},
            "; in-context n-grams: the bytes that followed the last place of the same 2 bytes\n",
        ),
    ):
        options = {"context_ngram_orders": []} | options
        assert words in text_of(tiny_model(**options), tmp_path)


@pytest.mark.parametrize(
    ("options", "kind", "head", "use"),
    [
        ({"num_labels": 1}, "regressor", "a value of a text", "logits)"),
        ({"num_labels": 3, "problem_type": "regression"}, "regressor", "3 values of a text: `LABEL_0`,", "logits)"),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            "multi-label classifier",
            "3 labels of a text, each there or not: `LABEL_0`,",
            "logits.sigmoid(), model.config.id2label)",
        ),
        (
            {"num_labels": 3},
            "classifier",
            "3 classes of a text: `LABEL_0`,",
            "logits.softmax(-1), model.config.id2label)",
        ),
    ],
)
def test_the_card_says_what_the_numbers_of_a_text_are(options, kind, head, use, tmp_path):
    text = text_of(STLMForSequenceClassification(tiny_config(**options)), tmp_path)
    assert f"A pooled byte-level {kind} with" in text and f"- head: {head}" in text and f"(**inputs).{use}\n" in text


def test_what_is_fine_tuned_inherits_from_its_base(checkpoint, tmp_path):
    write_model_card(checkpoint, build_model_card(checkpoint, **OPTIONS))
    for name in ("tuned", "tuned twice"):  # from a folder with a card, then from one without
        base = describe_base(checkpoint)
        checkpoint = tmp_path / name
        STLMForSequenceClassification(tiny_config()).save_pretrained(checkpoint)
        results = {"base_model": base, "steps": 1500, "arguments": {"text": "my.txt"}}
        (checkpoint / "results.json").write_text(json.dumps(results))
    card = build_model_card(checkpoint)
    assert (card.data.license, card.data.language) == ("cc-by-sa-4.0", "en")
    assert card.data.base_model is None and card.data.eval_results is None  # a folder is no id on the Hub
    assert "- fine-tuned from `tuned`\n- 1,500 steps\n- text: my.txt" in card.text
    assert "Letters of a test." in card.text and "## Results" not in card.text and str(tmp_path) not in str(card)
    assert "The weights are under `cc-by-sa-4.0`" in card.text
    with pytest.raises(ValueError, match=r"tuned is under cc-by-sa-4.0, .* cannot be offered as apache-2.0"):
        build_model_card(checkpoint, licence="apache-2.0")


def test_a_permissive_licence_may_be_replaced_and_ids_on_the_hub_are_named(checkpoint, monkeypatch):
    (checkpoint / "results.json").unlink()
    text = "---\nlicense: mit\nlanguage: en\ndatasets:\n- me/texts\n---\n\n# base\n\n## Data\n\nMany.\n\n## Limits\n"
    load = ModelCard.load
    monkeypatch.setattr(ModelCard, "load", lambda name: ModelCard(text) if name == "me/base" else load(name))
    card = build_model_card(checkpoint, base_model="me/base", licence="cc-by-sa-4.0")
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("cc-by-sa-4.0", "me/base", ["me/texts"])
    assert "fine-tuned from `me/base`" in card.text and "Many.\n\n## Limits" in card.text
    assert metadata_errors(str(card)) == []
    assert build_model_card(checkpoint, base_model="me/base").data.license == "mit"
    both = build_model_card(checkpoint, base_model="me/base", data="Mine, CC0.\n")
    assert data_of(both) == "Mine, CC0.\n\n### Before that: the texts of `me/base`\n\nMany."
    # Also from what was fine-tuned from it.
    (checkpoint / "results.json").write_text(json.dumps({"base_model": describe_base("me/base")}))
    card = build_model_card(checkpoint, base_model=checkpoint)
    assert (card.data.license, card.data.base_model) == ("mit", "me/base")
    assert "fine-tuned from `checkpoint`" in card.text
    before = f"The texts of this training {UNDESCRIBED}\n\n### Before that: the texts of `me/base`\n\nMany."
    assert data_of(card) == (
        f"The texts of this training {UNDESCRIBED}\n\n### Before that: the texts of `checkpoint`\n\n{before}"
    )
    # A card that names no licence, but the texts of the base: they come once.
    (checkpoint / "README.md").write_text(f"---\nbase_model: me/base\n---\n\n# c\n\n## Data\n\n{before}\n")
    assert data_of(build_model_card(checkpoint, base_model=checkpoint)).count("Many.") == 1


@pytest.mark.parametrize("published", [True, False])
def test_the_texts_of_every_training_have_a_heading(checkpoint, tmp_path, published):
    write_model_card(checkpoint, build_model_card(checkpoint, **OPTIONS))
    for name, arguments in (("letters", {"train": "a.txt"}), ("rows", {"train": "b.csv"}), ("more", {"text": "c"})):
        results = {"base_model": describe_base(checkpoint), "arguments": arguments, "rows": {"train": 1200}}
        checkpoint = tmp_path / name
        STLMForSequenceClassification(tiny_config()).save_pretrained(checkpoint)
        (checkpoint / "results.json").write_text(json.dumps(results))
        if published:
            write_model_card(checkpoint, build_model_card(checkpoint))
    assert data_of(build_model_card(checkpoint)) == (
        f"The texts of this training (c) {UNDESCRIBED}\n\n"
        "### Before that: the texts of `rows`\n\n"
        f"The texts of this training (b.csv, 1,200 rows) {UNDESCRIBED}\n\n"
        "### Before that: the texts of `letters`\n\n"
        f"The texts of this training (a.txt, 1,200 rows) {UNDESCRIBED}\n\n"
        "### Before that: the texts of `checkpoint`\n\n"
        "Letters of a test."
    )


def test_the_card_of_a_training_on_rows(tmp_path):
    names = [f"label {i}" for i in range(22)]
    results = {
        "base_model": {"name": "base", "license": "mit", "language": "en"},
        "scores": {"test": {"accuracy": 0.875}},
        "baselines": {"test, TF-IDF": {"accuracy": 0.75}},
        "scoring": "Share of the rows",
        "rows": {"train": 1200, "test": 300},
        "arguments": {"train": "rows.csv", "test": "held.csv", "epochs": "3"},
        "commit": "",  # not from a repository
        **{name: RESULTS[name] for name in ("device", "torch", "transformers")},
    }
    for count, last in ((20, "`label 19`\n"), (22, "`label 19`, and 2 more\n")):
        STLMForSequenceClassification(tiny_config(id2label=dict(enumerate(names[:count])))).save_pretrained(tmp_path)
        (tmp_path / "results.json").write_text(json.dumps(results))
        card = build_model_card(tmp_path)
        assert f"- head: {count} classes of a text: `label 0`, `label 1`, " in card.text and last in card.text
    assert (
        "Share of the rows:\n\n| split | accuracy |\n|---|---|\n| test | 0.8750 |\n| test, TF-IDF | 0.7500 |\n"
        in card.text
    )
    assert [(e.dataset_name, e.metric_value) for e in card.data.eval_results] == [("held.csv", 0.875)]
    assert (
        "- fine-tuned from `base`\n- train: rows.csv, 1,200 rows\n- test: held.csv, 300 rows\n- epochs: 3\n"
        "- a CPU; torch 2.13.0, transformers 5.23.0\n\n## Data" in card.text
    )
    assert metadata_errors(str(card)) == []


def test_the_card_shows_the_curve_that_is_there(checkpoint):
    assert "loss.png" not in build_model_card(checkpoint).text
    (checkpoint / "loss.png").touch()
    assert "`results.json`\n\n![Bits per byte by step](loss.png)\n\n## Data" in build_model_card(checkpoint).text


def test_the_card_names_what_setup_requires(checkpoint):
    required = re.search(r"install_requires=\[(.*?)\]", (ROOT / "setup.py").read_text())[1].replace('"', "`")
    assert "transformers" in required and f"```\n\nIt needs {required}.\n\n## " in build_model_card(checkpoint).text


def test_the_snippet_of_the_card_runs_in_the_folder(checkpoint):
    write_model_card(checkpoint, build_model_card(checkpoint, **OPTIONS))
    code = snippet(ModelCard.load(checkpoint / "README.md"))
    # Greedy, so that the text can be compared; the rest is run as it stands.
    code = code.replace("max_new_tokens=100", "max_new_tokens=20, do_sample=False")
    environment = os.environ | {"HF_MODULES_CACHE": str(checkpoint / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=checkpoint, env=environment, capture_output=True, check=True
    )
    tokenizer, model = STLMTokenizer(), AutoModelForCausalLM.from_pretrained(checkpoint)
    inputs = tokenizer("The history of", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0])
    assert expected.startswith("The history of") and run.stdout.decode() == expected + "\n"
    assert 'checkpoint = "me/mine"\n' in snippet(build_model_card(checkpoint, repo_id="me/mine"))
    assert "after `import modeling_stlm`" not in code
    (checkpoint / "modeling_stlm.py").unlink()  # as in a checkout
    assert "after `import modeling_stlm`" in snippet(build_model_card(checkpoint))


def test_fixed_patches_and_untied_heads_are_told_as_they_are(tmp_path):
    config = tiny_config(patching="fixed", patch_bytes=5, tie_word_embeddings=False)
    with torch.device("meta"):
        model = type(tiny_model())(config)
    config.architectures = ["STLMForCausalLM"]
    config.save_pretrained(tmp_path)
    card = build_model_card(tmp_path).text
    assert "they end every 5 bytes" in card and "apart from the byte embedding" in card
    assert f"{model.flops_per_byte(5) / 1e6:.2f} MFLOP at 5 bytes per patch" in card
    assert "at 4 bytes" not in card and "each with its own weights" in card and "a tied head" not in card


@pytest.mark.parametrize(
    ("name", "sources"), [("stlm-3m", "sources"), ("stlm-10m-wide", "sources"), ("stlm-3m-encoder", "sources-encoder")]
)
def test_the_shipped_card_is_what_the_shipped_results_say(name, sources):
    shipped = (CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")
    data = (CHECKPOINTS / f"{sources}.md").read_text(encoding="utf-8")
    card = build_model_card(CHECKPOINTS / name, licence="cc-by-sa-4.0", language="en", data=data)
    assert shipped.startswith(f"{card}\n<!-- Generated.")
    assert metadata_errors(shipped) == []


def test_results_of_something_else_are_refused(checkpoint):
    (checkpoint / "results.json").write_text('{"accuracy": 1, "steps": 3}')
    with pytest.raises(
        ValueError,
        match=r"lacks \['arguments', 'budget', .*expected the file that examples/pretrain.py writes, or one that says",
    ):
        build_model_card(checkpoint)


@pytest.mark.parametrize(
    ("patching", "expected"),
    [
        ("spacelike", "at the end of words, after at most 12 bytes or 3 characters"),
        ("vocabulary", "proves the end of one of 11 pieces, after at most 12 bytes"),
        ("learned", "where a router decides, trained for an average of 6 bytes, after"),
    ],
)
def test_the_card_says_where_patches_end(patching, expected, tmp_path):
    tiny_model(**PATCHING[patching]).save_pretrained(tmp_path)
    assert expected in build_model_card(tmp_path).text


def test_a_score_may_belong_to_another_task_than_the_head(tmp_path):
    STLMForMaskedLM(tiny_config(is_causal=False)).save_pretrained(tmp_path)
    scores = {"held out": {"cosine_to_teacher": 0.7}, "masks": {"accuracy": 0.5}}
    results = {"base_model": {"name": "m"}, "scores": scores, "tasks": {"held out": "sentence-similarity"}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = [(e.dataset_split, e.task_type, e.task_name) for e in build_model_card(tmp_path).data.eval_results]
    assert found == [("held out", "sentence-similarity", "Sentence similarity"), ("masks", "fill-mask", "Fill mask")]
