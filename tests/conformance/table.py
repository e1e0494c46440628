# SPDX-License-Identifier: Apache-2.0
"""Run the checks of `features.py` on four families of models and write the table in RESULTS.md: `make conformance`."""

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import transformers

from examples.research.provenance import run_info
from examples.research.tables import replace_section

from .features import FEATURES, NotApplicable
from .kits import KITS, Kit


ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "features.json"


def first_line(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    if isinstance(error, AssertionError):
        text = text.removeprefix("AssertionError: ")
        if text.startswith("Tensor-likes"):
            text = "other numbers: " + re.search(r"Greatest absolute difference: \S+", str(error))[0].lower()
    text = re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", text)
    return text if len(text) <= 140 else text[:140] + "…"


def run(kit: Kit) -> dict[str, str]:
    """Empty if a check passed, else the reason, by name of the check."""
    found = {}
    for name, (_, check) in FEATURES.items():
        start = time.monotonic()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                check(kit)
            found[name] = ""
        except NotApplicable as reason:
            found[name] = f"not applicable: {reason}"
        except Exception as error:
            found[name] = first_line(error)
        seconds = time.monotonic() - start
        print(f"{kit.name:6} {name:24} {seconds:6.1f} s  {found[name] or 'works'}", file=sys.stderr, flush=True)
    return found


def cell(reason: str) -> str:
    return "yes" if not reason else "n/a" if reason.startswith("not applicable") else "**no**"


def markdown(results: dict) -> str:
    families = list(results["families"])
    lines = [
        f"| Works | {' | '.join(families)} | Check |",
        "|---|" + "---|" * (len(families) + 1),
    ]
    reasons = []
    for name, (title, _) in FEATURES.items():
        cells = [cell(results["families"][family][name]) for family in families]
        lines.append(f"| {title} | {' | '.join(cells)} | `{name}` |")
    works = {family: sum(not reason for reason in found.values()) for family, found in results["families"].items()}
    lines.append(f"| **of {len(FEATURES)}** | {' | '.join(str(works[family]) for family in families)} | |")
    for family, found in results["families"].items():
        reasons += [f"- {family}, `{name}`: {reason}" for name, reason in found.items() if reason]
    about = ", ".join(f"{name} {value}" for name, value in results["run"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"<details><summary>Reasons ({about})</summary>",
            "",
            *reasons,
            "",
            "</details>",
        ]
    )


def main():
    transformers.logging.set_verbosity_error()
    if len(sys.argv) > 1:  # one family, in a process of its own
        print(json.dumps(run(KITS[sys.argv[1]])))
        return
    families = {}
    for family in KITS:
        command = [sys.executable, "-W", "ignore", "-m", "tests.conformance.table", family]
        output = subprocess.run(command, stdout=subprocess.PIPE, cwd=ROOT, check=True, text=True).stdout
        families[family] = json.loads(output.splitlines()[-1])
    results = {"run": run_info("peft", "onnxruntime", "torchao"), "families": families}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    replace_section(ROOT / "RESULTS.md", "conformance", markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    main()
