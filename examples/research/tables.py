# SPDX-License-Identifier: Apache-2.0
"""Tables as Markdown, and the generated sections of RESULTS.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    return "\n".join(lines)


def replace_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks of section `name`; a file without these marks gets the section at its end."""
    start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->\n"
    present = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, _, rest = present.partition(start)
    path.write_text(f"{before}{start}{text.strip()}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
