# SPDX-License-Identifier: Apache-2.0
"""Publishing and loading through a Hub: the unmodified libraries in processes of their own against `hub_server.py`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from modeling_stlm import STLMForSequenceClassification, STLMTokenizer

from .hub_server import Hub, front_matter
from .tiny import SHARING, TEXT, WITHOUT_PACKAGES, ids_of, tiny_config, tiny_model


ROOT = Path(__file__).parents[1]
IDS = torch.tensor([ids_of(TEXT)])
CODE = {path.name for path in (ROOT / "modeling_stlm").glob("*_stlm.py")}
MODEL = CODE | {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
REPO = "alice/stlm-tiny"


@pytest.fixture(scope="module")
def hub():
    with Hub({"key": "alice", "other": "bob"}) as hub:
        yield hub


@pytest.fixture
def new_hub():
    with Hub({"key": "alice"}) as hub:
        yield hub


def environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    hub_variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),  # an empty cache
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # LFS then
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return kept | hub_variables | ({"HF_TOKEN": token} if token else {})


def client(hub: Hub, home: Path, code: str, *arguments, token: str | None = None, fails: bool = False) -> str:
    """Run `code` as a user with this Hub would; `home` is also where it runs."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *([] if code.endswith(".py") else ["-c"]), code, *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment(hub, home, token), cwd=home, timeout=600
    )
    assert (result.returncode != 0) == fails, result.stderr[-3000:]
    return result.stderr if fails else result.stdout


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def variant(folder: Path, factor: float) -> Path:
    """A checkpoint that differs from its siblings in its weights."""
    model = tiny_model(**SHARING["middle"])
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(factor)
    model.save_pretrained(folder)
    STLMTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def variants(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("variants")
    return {
        name: variant(folder / name, factor) for name, factor in (("first", 1.0), ("second", 1.25), ("third", 1.5))
    }


PUBLISH = """
import json, sys
from huggingface_hub import HfApi
from modeling_stlm import STLMForCausalLM, STLMTokenizer
repo, api = sys.argv[1], HfApi()
first, second, third = (STLMForCausalLM.from_pretrained(folder) for folder in sys.argv[2:])
first.push_to_hub(repo)
sha = STLMTokenizer().push_to_hub(repo).oid
api.create_tag(repo, tag="v1")
api.create_branch(repo, branch="try")
third.push_to_hub(repo, revision="try", commit_message="Upload another")
second.push_to_hub(repo)
first.push_to_hub("alice/secret", private=True)
print(json.dumps({"sha": sha}))
"""


@pytest.fixture(scope="module")
def published(hub, variants, tmp_path_factory) -> dict[str, Path]:
    """The folder behind each revision of `REPO`."""
    home = tmp_path_factory.mktemp("publisher")
    first, second, third = variants["first"], variants["second"], variants["third"]
    output = client(hub, home, PUBLISH, REPO, first, second, third, token="key")
    sha = json.loads(output.splitlines()[-1])["sha"]
    return {"main": second, "v1": first, sha: first, "try": third}


def test_push_to_hub_publishes_weights_code_and_tokenizer(hub, published):
    repo = hub.repos[REPO]
    for revision, folder in published.items():
        files = repo.at(revision).files
        assert set(files) == MODEL | TOKENIZER | {"README.md"}
        for name in MODEL | TOKENIZER:
            assert files[name].content == (folder / name).read_bytes(), (revision, name)
        assert [name for name, file in files.items() if file.lfs] == ["model.safetensors"]
    assert front_matter(repo.at("main").files["README.md"].content.decode())["library_name"] == "transformers"
    titles, commit = [], repo.at("main")
    while commit:
        titles.append(commit.title)
        commit = commit.parent
    assert titles == ["Upload STLMForCausalLM", "Upload tokenizer", "Upload STLMForCausalLM", "initial commit"]
    assert hub.repos["alice/secret"].private and not repo.private


LOAD = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
import modeling_stlm
repo, out, revisions = sys.argv[1], sys.argv[2], sys.argv[3:]
ids = torch.load(out)
found = {}
for revision in revisions:
    model = AutoModelForCausalLM.from_pretrained(repo, revision=revision)
    assert type(model) is modeling_stlm.STLMForCausalLM
    with torch.no_grad():
        found[revision] = model(ids).logits
found["tokenizer"] = type(AutoTokenizer.from_pretrained(repo)).__name__
found["config"] = type(AutoConfig.from_pretrained(repo)).__module__
torch.save(found, out)
"""


def test_every_revision_gives_its_own_weights_where_the_package_is_installed(hub, published, tmp_path):
    out = tmp_path / "out.pt"
    torch.save(IDS, out)
    client(hub, tmp_path / "home", LOAD, REPO, out, *published)
    found = torch.load(out)
    for revision, folder in published.items():
        assert torch.equal(found[revision], logits_of(AutoModelForCausalLM.from_pretrained(folder)))
    assert not torch.equal(found["main"], found["v1"]) and not torch.equal(found["main"], found["try"])
    assert found["tokenizer"] == "STLMTokenizer"
    assert found["config"] == "modeling_stlm.configuration_stlm"


LOAD_REMOTE_CODE = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
repo, out, revision = sys.argv[1:]
text = torch.load(out)
tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=False)
try:
    AutoConfig.from_pretrained(repo, trust_remote_code=False)
    raise SystemExit("code of the repository ran without consent")
except ValueError as error:
    refusal = str(error)
ids = tokenizer(text, return_tensors="pt")["input_ids"]
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
old = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, revision=revision)
with torch.no_grad():
    found = {"logits": model(ids).logits, "old": old(ids).logits}
    found["hidden"] = AutoModel.from_pretrained(repo, trust_remote_code=True)(ids).last_hidden_state
new = model.generate(ids, max_new_tokens=20, do_sample=False)
found |= {"text": tokenizer.decode(new[0]), "module": type(model).__module__, "old_module": type(old).__module__}
torch.save(found | {"refusal": refusal}, out)
"""


def test_a_repository_loads_where_the_packages_are_not_installed(hub, published, tmp_path):
    out = tmp_path / "out.pt"
    torch.save(TEXT, out)
    client(hub, tmp_path / "home", WITHOUT_PACKAGES + LOAD_REMOTE_CODE, REPO, out, "v1")
    found = torch.load(out)
    model = AutoModelForCausalLM.from_pretrained(published["main"])
    with torch.no_grad():
        expected, hidden = model(IDS).logits, model.model(IDS).last_hidden_state
    new = model.generate(IDS, max_new_tokens=20, do_sample=False)
    assert torch.equal(found["logits"], expected) and torch.equal(found["hidden"], hidden)
    assert found["text"] == STLMTokenizer().decode(new[0])
    assert torch.equal(found["old"], logits_of(AutoModelForCausalLM.from_pretrained(published["v1"])))
    repo = hub.repos[REPO]
    assert found["module"].startswith("transformers_modules.") and repo.at("main").sha in found["module"]
    assert repo.at("v1").sha in found["old_module"]
    assert "trust_remote_code=True" in found["refusal"]


ERRORS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import modeling_stlm
asked = [("alice/secret", {"token": False}), ("alice/secret", {"token": "other"}), ("alice/nothing", {"token": False}),
         ("alice/nothing", {"token": "key"}), ("alice/stlm-tiny", {"revision": "v9"}),
         ("alice/stlm-tiny", {"revision": "0" * 40})]
answers = []
for repo, options in asked:
    for loader in (AutoModelForCausalLM, AutoTokenizer):
        try:
            loader.from_pretrained(repo, **options)
            answers.append("loaded")
        except OSError as error:
            answers.append(str(error))
model = AutoModelForCausalLM.from_pretrained("alice/secret", token="key")
print(json.dumps({"answers": answers, "parameters": model.num_parameters()}))
"""


def test_private_and_missing_repositories_and_revisions_are_named_in_the_error(hub, published, tmp_path):
    found = json.loads(client(hub, tmp_path, ERRORS).splitlines()[-1])
    assert found["parameters"] == AutoModelForCausalLM.from_pretrained(published["v1"]).num_parameters()
    answers = found["answers"]
    assert len(answers) == 12
    for answer, name in zip(answers, ["alice/secret"] * 4 + ["alice/nothing"] * 4):
        assert name in answer and "is not a local folder and is not a valid model identifier" in answer
    for answer, revision in zip(answers[8:], ["v9", "v9", "0" * 40, "0" * 40]):
        assert f"{revision} is not a valid git identifier" in answer


TRAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from modeling_stlm import STLMTokenizer

class LongSteps(TrainerCallback):
    # Between two saves of a real training a push ends; one that meets the next save reads files that change.
    def on_step_begin(self, *args, **kwargs):
        if trainer.push_in_progress is not None:
            trainer.push_in_progress.wait_until_done()

checkpoint, out = sys.argv[1:]
ids = torch.load(out)
row = {"input_ids": ids[0], "labels": ids[0]}
model = AutoModelForCausalLM.from_pretrained(checkpoint)
args = TrainingArguments(
    output_dir="tuned", push_to_hub=True, hub_model_id="alice/tuned", hub_always_push=True, hub_private_repo=True,
    max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=1, learning_rate=1e-2,
    per_device_train_batch_size=1, report_to="none", use_cpu=True)
trainer = Trainer(model=model, args=args, train_dataset=[row] * 4, eval_dataset=[row],
                  processing_class=STLMTokenizer(), callbacks=[LongSteps()])
trainer.train()
trainer.push_to_hub(language="en", license="apache-2.0", tags="stlm")
with torch.no_grad():
    logits = trainer.model.eval()(ids, use_cache=False).logits
losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
torch.save({"logits": logits, "losses": losses}, out)
"""


def test_trainer_pushes_while_training_and_writes_a_card(hub, variants, tmp_path):
    out = tmp_path / "out.pt"
    torch.save(IDS, out)
    client(hub, tmp_path / "home", TRAIN, variants["first"], out, token="key")
    trained = torch.load(out)
    repo = hub.repos["alice/tuned"]
    assert repo.private
    files = repo.at("main").files
    assert set(files) == MODEL | TOKENIZER | {"README.md", "training_args.bin"}
    titles = {commit.title for commit in repo.commits.values()}
    assert {"Training in progress, step 2", "Training in progress, step 4", "End of training"} <= titles
    card = ModelCard(files["README.md"].content.decode())
    assert (card.data.library_name, card.data.license, card.data.language) == ("transformers", "apache-2.0", ["en"])
    assert {"stlm", "generated_from_trainer"} <= set(card.data.tags)
    assert f"Loss: {trained['losses'][-1]:.4f}" in card.text
    # What is on the Hub is the trained model, and the training moved it.
    for name, file in files.items():
        (tmp_path / name).write_bytes(file.content)
    logits = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits, trained["logits"])
    assert not torch.equal(logits, logits_of(AutoModelForCausalLM.from_pretrained(variants["first"])))


SCRIPT = str(ROOT / "examples" / "push_to_hub.py")


def snapshot(hub: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {name: file.content for name, file in hub.repos[repo].at(revision).files.items()}


def test_the_example_publishes_a_folder_in_one_commit(new_hub, tmp_path):
    folder = variant(tmp_path / "mine", 1.0)
    for name in ("README.md", "loss.png", "results.json", "history.json"):
        (folder / name).write_bytes(f"# my {name}".encode())
    push = (SCRIPT, "--checkpoint", folder, "--repo_id", "alice/mine", "--private")
    client(new_hub, tmp_path / "one", *push, token="key")
    repo, first = new_hub.repos["alice/mine"], new_hub.repos["alice/mine"].at("main")
    assert repo.private and first.parent.title == "initial commit"
    files = snapshot(new_hub, "alice/mine")
    assert set(files) == MODEL | TOKENIZER | {"README.md", "loss.png", "results.json"}
    assert [name for name in files if files[name] != (folder / name).read_bytes()] == ["tokenizer_config.json"]
    here, there = (
        json.loads(text) for text in ((folder / "tokenizer_config.json").read_text(), files["tokenizer_config.json"])
    )
    # transformers 5.23 writes how the tokenizer was loaded, whatever the tokenizer.
    assert there == here | {"is_local": True, "local_files_only": False}
    # The same again changes nothing; without a README.md of its own the folder leaves that of the repository alone.
    (folder / "README.md").unlink()
    client(new_hub, tmp_path / "two", *push, token="key")
    assert repo.at("main") is first
    # Without a login, and with a wrong one: one line.
    said = client(new_hub, tmp_path / "none", *push, "--base_model", "none", fails=True)
    assert said.splitlines()[-1].startswith("not logged in: run `hf auth login`") and "Traceback" not in said
    said = client(new_hub, tmp_path / "wrong", *push, "--base_model", "none", token="wrong", fails=True)
    assert "the Hub did not take part: " in said and "401" in said and "Traceback" not in said
    assert said.splitlines()[-1] == "--dry_run needs no login, and the network only for the card of a base model there"
    assert repo.at("main") is first


def test_the_snippet_of_a_generated_card_runs_from_the_hub(new_hub, tmp_path):
    folder = variant(tmp_path / "mine", 1.0)
    options = ("--repo_id", "alice/mine", "--licence", "apache-2.0", "--language", "en", "--base_model", "none")
    client(new_hub, tmp_path / "publisher", SCRIPT, "--checkpoint", folder, *options, token="key")
    card = ModelCard(snapshot(new_hub, "alice/mine")["README.md"].decode())
    assert (card.data.license, card.data.language, card.data.pipeline_tag) == ("apache-2.0", "en", "text-generation")
    assert not (folder / "README.md").exists()
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
    snippet = snippet.replace("max_new_tokens=100", "max_new_tokens=20, do_sample=False")
    printed = client(new_hub, tmp_path / "reader", WITHOUT_PACKAGES + snippet)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), STLMTokenizer()
    inputs = tokenizer("The history of", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0])
    assert printed == expected + "\n"


@pytest.mark.slow
def test_an_upload_that_dies_leaves_the_old_revision(new_hub, variants, tmp_path):
    def push(name):
        return [SCRIPT, "--checkpoint", str(variants[name]), "--repo_id", "alice/mine", "--base_model", "none"]

    # The connection breaks once in the middle of the weights: the client tries again.
    new_hub.drop = {"lfs_upload": 1}
    client(new_hub, tmp_path / "one", *push("first"), token="key")
    assert new_hub.dropped.is_set()
    repo, old = new_hub.repos["alice/mine"], snapshot(new_hub, "alice/mine")
    sha = repo.at("main").sha
    assert old["model.safetensors"] == (variants["first"] / "model.safetensors").read_bytes()
    # It breaks in the middle of the commit, when the weights are there already: nothing is published.
    new_hub.drop = {"commit": 1}
    assert "Server disconnected" in client(new_hub, tmp_path / "two", *push("second"), token="key", fails=True)
    assert repo.at("main").sha == sha and snapshot(new_hub, "alice/mine") == old
    # The process is killed while it sends weights.
    new_hub.dropped.clear()
    new_hub.drop = {"lfs_upload": 1000}
    process = subprocess.Popen(
        [sys.executable, *push("third")],
        env=environment(new_hub, tmp_path / "three", "key"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert new_hub.dropped.wait(timeout=300)
    process.kill()
    process.wait()
    assert repo.at("main").sha == sha and snapshot(new_hub, "alice/mine") == old
    # Later it works.
    new_hub.drop = {}
    client(new_hub, tmp_path / "four", *push("third"), token="key")
    assert repo.at("main").parent.sha == sha
    assert (
        snapshot(new_hub, "alice/mine")["model.safetensors"] == (variants["third"] / "model.safetensors").read_bytes()
    )


def test_the_example_publishes_a_head_as_what_it_is(new_hub, tmp_path):
    folder = tmp_path / "head"
    STLMForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(folder)
    STLMTokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("# my head")
    printed = client(new_hub, tmp_path / "one", SCRIPT, "--checkpoint", folder, "--repo_id", "alice/head", token="key")
    assert 'AutoModelForSequenceClassification.from_pretrained("alice/head", trust_remote_code=True)' in printed
    config = json.loads(snapshot(new_hub, "alice/head")["config.json"])
    assert config["architectures"] == ["STLMForSequenceClassification"] and len(config["id2label"]) == 3
