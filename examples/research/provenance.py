# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


CPUINFO = Path("/proc/cpuinfo")  # of Linux


def cpu_name() -> str:
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def run_info(*packages: str) -> dict[str, str]:
    """Commit, device and versions, to be stored beside every number; those of `packages` too."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        commit = ""
    threads = torch.get_num_threads()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_name()}, {threads} threads"
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate", *packages)}
    return {"commit": commit, "device": device, "python": platform.python_version()} | versions
