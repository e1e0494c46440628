# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings


# Tiny models run several times faster on one thread. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

MARKERS_OF_TRANSFORMERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_all_test",
    "fp_quant_test",
    "generate",
    "is_fsdp_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "order",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    settings.register_profile("busy machines", deadline=None)
    settings.load_profile("busy machines")
    for marker in MARKERS_OF_TRANSFORMERS:
        config.addinivalue_line("markers", f"{marker}: used by the testers of transformers")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def engine_build(tmp_path_factory) -> Path:
    """What `setup.py` installs, with the engine compiled from the source as it is."""
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", folder, "--build-temp", folder / "temp"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    return folder


@pytest.fixture(scope="module")
def built(engine_build):
    """The engine of `engine_build` is the one that is loaded."""
    from modeling_stlm.inference import engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "FOLDER", engine_build / "modeling_stlm" / "inference")
        yield
