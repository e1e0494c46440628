# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is in the folder, and that it loads where neither package can be imported."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

import modeling_stlm
from modeling_stlm import (
    STLMForCausalLM,
    STLMForMaskedLM,
    STLMForQuestionAnswering,
    STLMForSequenceClassification,
    STLMModel,
    STLMTokenizer,
)
from modeling_stlm.configuration_stlm import HEADS

from .tiny import MIXERS, PATCHING, SHARING, TEXT, WITHOUT_PACKAGES, ids_of, tiny_config, tiny_model


IDS = torch.tensor([ids_of(TEXT)])
LOADER = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
ids = torch.tensor([tokenizer(sys.argv[2])["input_ids"]])
with torch.no_grad():
    logits = model(ids).logits
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(ids).last_hidden_state
new = model.generate(ids, max_new_tokens=20, do_sample=False)
if len(sys.argv) > 3:
    model.save_pretrained(sys.argv[3])
torch.save({"logits": logits, "hidden": hidden, "new": new, "module": type(model).__module__}, folder + "/out.pt")
"""


def load_without_packages(folder, *more) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES + LOADER, str(folder), TEXT, *map(str, more)],
        check=True,
        cwd=folder,
        env=environment,
    )
    return torch.load(folder / "out.pt")


def test_a_checkpoint_loads_where_the_packages_are_not_installed(tmp_path):
    model = tiny_model(**SHARING["middle"])
    model.save_pretrained(tmp_path / "first")
    STLMTokenizer().save_pretrained(tmp_path / "first")
    with torch.no_grad():
        expected, hidden = model(IDS).logits, model.model(IDS).last_hidden_state
    new = model.generate(IDS, max_new_tokens=20, do_sample=False)
    loaded = load_without_packages(tmp_path / "first", tmp_path / "second")
    assert loaded["module"].startswith("transformers_modules.")
    assert torch.equal(loaded["logits"], expected) and torch.equal(loaded["hidden"], hidden)
    assert torch.equal(loaded["new"], new)
    # Saved again by the process without the packages, the code goes along.
    STLMTokenizer().save_pretrained(tmp_path / "second")
    assert torch.equal(load_without_packages(tmp_path / "second")["logits"], expected)


def test_a_checkpoint_holds_code_weights_once_and_every_auto_class(tmp_path):
    model = tiny_model(**SHARING["cycle"])
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    code = {path.name for path in Path(modeling_stlm.__file__).parent.glob("*_stlm.py")}
    assert names == code | {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"]) == {
        *("AutoConfig", "AutoModel", "AutoModelForCausalLM"),
        *(f"AutoModelFor{head}" for head in HEADS),
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).numel() for name in file.keys()}
    assert "lm_head.weight" not in stored
    assert sum(stored.values()) == model.num_parameters()


@pytest.mark.parametrize(
    "options",
    [*SHARING.values(), *PATCHING.values(), MIXERS["both"]],
    ids=[*SHARING, *PATCHING, "both"],
)
def test_reloading_keeps_logits_and_ties(options, tmp_path):
    model = tiny_model(**options)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is STLMForCausalLM
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert len(again.model.trunk.feed_forward_blocks) == model.config.num_unique_trunk_layers


def test_the_base_model_loads_from_a_head_and_back(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert type(base) is STLMModel
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def load_report(auto, folder, caplog, **options) -> str:
    caplog.clear()
    auto.from_pretrained(folder, **options)
    return caplog.text


def test_a_head_of_pre_training_is_left_without_a_report_and_one_of_a_task_is_not(tmp_path, caplog):
    classifier, answers = STLMForSequenceClassification(tiny_config()), STLMForQuestionAnswering(tiny_config())
    models = {"causal": tiny_model(tie_word_embeddings=False), "classifier": classifier, "answers": answers}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    assert "LOAD REPORT" not in load_report(AutoModel, tmp_path / "causal", caplog)
    # The head of a fine-tuned model is not lost in silence.
    for auto, options in ((AutoModelForCausalLM, {}), (AutoModelForMaskedLM, {"is_causal": False})):
        for name, head in (("classifier", "score.weight"), ("answers", "qa_outputs.weight")):
            report = load_report(auto, tmp_path / name, caplog, **options)
            assert re.search(rf"{head} +\| UNEXPECTED", report) and "lm_head" not in report
    # What was not in the checkpoint, and what nobody knows, is still reported.
    report = load_report(AutoModelForSequenceClassification, tmp_path / "causal", caplog)
    assert re.search(r"score.weight +\| MISSING", report) and "lm_head" not in report
    weights = tmp_path / "causal" / "model.safetensors"
    save_file(load_file(weights) | {"model.trunk.lost.weight": torch.ones(3)}, weights, metadata={"format": "pt"})
    assert re.search(r"trunk.lost.weight +\| UNEXPECTED", load_report(AutoModel, tmp_path / "causal", caplog))


@pytest.mark.parametrize("cls", [STLMForCausalLM, STLMForMaskedLM])
def test_a_state_without_the_tied_head_is_complete(cls, tmp_path):
    model = cls(tiny_config(is_causal=cls is STLMForCausalLM))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in state
    model.load_state_dict(state)
    copy.deepcopy(model).load_state_dict(state)
    del state["model.embed_tokens.weight"]
    assert model.load_state_dict(state, strict=False).missing_keys == ["model.embed_tokens.weight"]
    untied = cls(tiny_config(is_causal=cls is STLMForCausalLM, tie_word_embeddings=False))
    with pytest.raises(RuntimeError, match=r"Missing key.*lm_head\.weight"):
        untied.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_an_untied_head_is_stored_and_loaded(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_load_in_their_dtype(dtype, tmp_path):
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype and torch.equal(again(IDS).logits, model(IDS).logits)


def test_loading_onto_a_device_map_fills_every_parameter(tmp_path):
    model = tiny_model(**MIXERS["attention"])
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    for (name, ours), (_, expected) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, expected), name
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|header|corrupt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


TWO_REVISIONS = """
import sys, torch
from transformers import AutoModelForCausalLM
models = [AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval() for folder in sys.argv[1:3]]
assert type(models[0]) is not type(models[1])
ids = torch.tensor([list(b"The trunk runs once per patch; ")])
new = [model.generate(ids, max_new_tokens=20, do_sample=False) for model in (*models, models[0])]
torch.save(new, sys.argv[3])
"""


def test_two_revisions_of_the_code_work_in_one_process(tmp_path):
    """As from two revisions on the Hub: the second names a method of its slots otherwise."""
    models = [tiny_model(use_cache=True), tiny_model(use_cache=True, **PATCHING["fixed"])]
    folders = [tmp_path / "first", tmp_path / "second"]
    for model, folder in zip(models, folders):
        model.save_pretrained(folder)
    for name in ("cache_stlm.py", "modeling_stlm.py"):
        code = folders[1] / name
        assert "end_call" in code.read_text()
        code.write_text(code.read_text().replace("end_call", "finish_call"))
    out = tmp_path / "out.pt"
    program = [sys.executable, "-c", WITHOUT_PACKAGES + TWO_REVISIONS, *map(str, folders), str(out)]
    subprocess.run(program, check=True, cwd=tmp_path)
    ids = torch.tensor([ids_of("The trunk runs once per patch; ")])
    expected = [model.generate(ids, max_new_tokens=20, do_sample=False) for model in models]
    first, second, again = torch.load(out)
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1]) and torch.equal(again, first)
