# SPDX-License-Identifier: Apache-2.0
"""What is installed, what is exported, and that what the docs say is so."""

import doctest
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

import modeling_stlm
import modeling_stlm.configuration_stlm
import modeling_stlm.modeling_stlm
import tokenization_stlm.tokenization_stlm
from modeling_stlm.configuration_stlm import HEADS


ROOT = Path(__file__).parents[1]


def test_public_names():
    assert sorted(modeling_stlm.__all__) == [
        "STLMCausalLMOutput",
        "STLMCommittee",
        "STLMCommitteeConfig",
        "STLMConfig",
        *(f"STLMFor{head}" for head in sorted(("CausalLM", *HEADS))),
        "STLMModel",
        "STLMModelOutput",
        "STLMPreTrainedModel",
        "STLMTokenizer",
    ]


def test_importing_the_package_registers_every_auto_class():
    config = modeling_stlm.STLMConfig.from_preset("stlm-3m")
    assert type(AutoConfig.for_model("stlm")) is modeling_stlm.STLMConfig
    assert type(AutoModel.from_config(config)) is modeling_stlm.STLMModel
    assert type(AutoModelForCausalLM.from_config(config)) is modeling_stlm.STLMForCausalLM
    # Without these, Trainer trains on unshifted labels under label smoothing.
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["stlm"] == "STLMForCausalLM"
    assert modeling_auto.MODEL_MAPPING_NAMES["stlm"] == "STLMModel"


@pytest.mark.parametrize(
    "module",
    [
        modeling_stlm.committee_stlm,
        modeling_stlm.heads_stlm,
        modeling_stlm.modeling_stlm,
        tokenization_stlm.tokenization_stlm,
    ],
    ids=lambda module: module.__name__,
)
def test_examples_in_docstrings_run(module):
    # The library's fences are no prompt of doctest: drop the closing line.
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    tests = [test for test in finder.find(module, module.__name__) if test.examples]
    assert tests
    for test in tests:
        assert runner.run(test).failed == 0


def test_the_wheel_holds_only_the_packages(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "modeling_stlm",
        "stlm_command",
        "tokenization_stlm",
    }
    (entries,) = (name for name in names if name.endswith("/entry_points.txt"))
    assert b"stlm = stlm_command:main" in zipfile.ZipFile(wheel).read(entries)
    presets = {name for name in names if name.startswith("modeling_stlm/presets/")}
    assert len(presets) == len(list((ROOT / "modeling_stlm" / "presets").glob("*.json"))) >= 5
    assert "modeling_stlm/training/corpus.py" in names


def test_the_readme_snippet_prints_what_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet, output = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL).groups()
    assert len(snippet.splitlines()) <= 12
    run = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == output.strip()


PAGES = ["README.md", "RESULTS.md", "CONTRIBUTING.md", "examples/README.md", "examples/research/RECIPE.md"]


@pytest.mark.parametrize("page", PAGES)
def test_commands_files_and_links_of_a_page_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    files = set(re.findall(r"((?:examples|tests|modeling_stlm)/[\w/.-]+\.(?:py|txt|png|md|json))", text))
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith(("http", "#"))}
    assert files
    missing = [file for file in files if not (ROOT / file).exists()]
    assert missing + [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_readme_is_short_and_shows_two_commands_first():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line.split()[1] for line in lines[:12] if line.startswith("make ")] == ["quickstart", "test"]


def test_examples_are_indexed_and_do_not_import_research():
    scripts = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    research = {path.stem for path in (ROOT / "examples" / "research").glob("*.py")}
    assert len(scripts) >= 8 and len(research) >= 8 and not research & set(scripts)
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for name, path in scripts.items():
        text = path.read_text(encoding="utf-8")
        is_script = '__name__ == "__main__"' in text
        assert (f"python examples/{name}.py" if is_script else f"`{name}.py`") in index
        imported = re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE)
        assert not research & set(imported) and "research" not in imported
