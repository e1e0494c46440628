# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def run_info(*packages: str) -> dict[str, str]:
    """Commit, device and versions, to be stored beside every number; those of `packages` too."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu}, {torch.get_num_threads()} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", *packages)}
    return {"commit": commit, "device": device, "python": platform.python_version()} | versions
