# SPDX-License-Identifier: Apache-2.0
"""Resident memory of this process, as Linux counts it."""

from pathlib import Path


def resident_mb(field: str) -> float:
    """`field` of `/proc/self/status` in MB: `"VmRSS"` now, `"VmHWM"` the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
