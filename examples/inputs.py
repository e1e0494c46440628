# SPDX-License-Identifier: Apache-2.0
"""What the examples read, checked before anything is loaded: types of arguments for `argparse`."""

import argparse
import re
from pathlib import Path


def checkpoint(value: str) -> str:
    """A folder with a model, or the name of one on the Hub."""
    path = Path(value)
    if (path / "config.json").is_file():
        return value
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not value.startswith(".")
    if path.exists() or not is_name or path.parent.is_dir():
        found = "a folder without config.json" if path.is_dir() else "a file" if path.exists() else "no such folder"
        raise argparse.ArgumentTypeError(
            f"{value} is {found}: expected a folder with a checkpoint, or the name of one on the Hub (owner/name)"
        )
    return value


def text_file(value: str) -> Path:
    path = Path(value)
    if not path.is_file():
        raise argparse.ArgumentTypeError(
            f"{value} is {'a folder' if path.is_dir() else 'no such file'}: expected a text"
        )
    return path


def read_text(path: Path, min_bytes: int = 1) -> str:
    """A text in UTF-8 of at least `min_bytes`; what is wrong with it, and what to do, ends the program."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it first, for example "
            f"with `iconv --from-code LATIN1 --to-code UTF-8 {path} > utf8.txt`"
        ) from None
    if len(data) < min_bytes:
        raise SystemExit(f"{path} has {len(data):,} bytes, expected at least {min_bytes:,}: take a longer text")
    return text


def at_least_zero(value: str) -> float:
    number = float(value)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0")
    return number
