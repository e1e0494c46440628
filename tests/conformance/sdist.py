# SPDX-License-Identifier: Apache-2.0
"""Makes the tests that transformers ships in its sdist importable as the package `hf_tests`.

The sdist of the installed version is fetched with pip into a cache folder, once; nothing of it is committed. Modules
that the sdist leaves out get empty stand-ins.
"""

import subprocess
import sys
import tarfile
import types
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock


CACHE = Path(__file__).parents[2] / ".cache"


def fetch() -> Path:
    """Folder `tests` of the unpacked sdist."""
    name = f"transformers-{version('transformers')}"
    tests = CACHE / name / "tests"
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / "lock"):  # several test processes may start at once
        if tests.is_dir():
            return tests
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*command, "--dest", str(CACHE), name.replace("-", "==")], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            members = [member for member in archive if member.name.startswith(f"{name}/tests/")]
            archive.extractall(CACHE / f"{name}.partial", members=members, filter="data")
        (CACHE / f"{name}.partial" / name).rename(CACHE / name)
    return tests


def install() -> None:
    """Make `import hf_tests.test_modeling_common` and its neighbours work."""
    import transformers
    import transformers.utils

    if "hf_tests" in sys.modules:
        return
    package = types.ModuleType("hf_tests")
    package.__path__ = [str(fetch())]
    sys.modules["hf_tests"] = package

    def stand_in(dotted: str, **names) -> None:
        parent = "hf_tests"
        for part in dotted.split(".")[:-1]:
            parent += "." + part
            if parent not in sys.modules:
                sys.modules[parent] = types.ModuleType(parent)
                sys.modules[parent].__path__ = []
        module = types.ModuleType("hf_tests." + dotted)
        module.__dict__.update(names)
        sys.modules[module.__name__] = module

    exporters = type("ExportTesterMixin", (), {})
    generate = type("ExportGenerateTesterMixin", (exporters,), {})
    stand_in("exporters.test_export", ExportTesterMixin=exporters, ExportGenerateTesterMixin=generate)
    stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    common = {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["SomeModel"],
        "id2label": {0: "label"},
        "label2id": {"label": "0"},
        "problem_type": "regression",
    }
    stand_in("utils.test_configuration_utils", config_common_kwargs=common)
    # Some testers import transformers again from a source checkout: give them the installed one.
    transformers.utils.direct_transformers_import = lambda *args, **kwargs: transformers
