# SPDX-License-Identifier: Apache-2.0
"""The command line of the examples: what they read is checked before anything is loaded.

Scripts parse their arguments above the imports that take seconds, so that `--help` and mistakes are answered at once.
"""

import argparse
import gzip
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path


HERE = Path(__file__).parent


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and the defaults that say something."""

    def _get_help_string(self, action):
        is_trivial = action.default is None or action.default is False or action.default == []
        return action.help if is_trivial else super()._get_help_string(action)


@contextmanager
def quiet_exit() -> Iterator[None]:
    """Ends the program without a traceback when the reader of its output leaves (`| head`), or at Ctrl-C."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        raise SystemExit(141) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def checkpoint(value: str) -> str:
    """A folder with a model, or the name of one on the Hub."""
    path = Path(value)
    if (path / "config.json").is_file():
        return value
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not value.startswith(".")
    if path.exists() or not is_name or path.parent.is_dir():
        if (path / "adapter_config.json").is_file():
            found = "an adapter of peft, not merged"
        else:
            found = (
                "a folder without config.json" if path.is_dir() else "a file" if path.exists() else "no such folder"
            )
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


def file_pattern(value: str) -> str:
    """The name of a file, or a pattern that matches some."""
    names = glob(value)
    if not names:
        raise argparse.ArgumentTypeError(f"no file matches {value}")
    if folders := [name for name in names if Path(name).is_dir()]:
        raise argparse.ArgumentTypeError(f"{folders[0]} is a folder: expected files, such as '{folders[0]}/*.txt'")
    return value


def decode(data: bytes, path: Path) -> str:
    """`data` of the file `path` as UTF-8; what is wrong with it, and what to do, ends the program."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # the mark that some programs put first
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it first, for example "
            f"with `iconv --from-code LATIN1 --to-code UTF-8 {path} > utf8.txt`"
        ) from None


def read_text(path: Path, min_bytes: int = 1) -> str:
    """A text in UTF-8 of at least `min_bytes`; what is wrong with it, and what to do, ends the program."""
    data = path.read_bytes()
    text = decode(data, path)
    if len(data) < min_bytes:
        raise SystemExit(f"{path} has {len(data):,} bytes, expected at least {min_bytes:,}: take a longer text")
    return text


def read_json_lines(path: Path, min_rows: int = 1) -> list[dict]:
    """The objects of a file of JSON lines (`.gz` if packed); what is wrong with it ends the program."""
    data = path.read_bytes()
    text = decode(gzip.decompress(data) if path.suffix == ".gz" else data, path)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # `splitlines` would split at signs inside of strings, too
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number}: no JSON ({error}). Expected one object per line") from None
        if not isinstance(rows[-1], dict):
            raise SystemExit(f"{path}, line {number}: a {type(rows[-1]).__name__}, expected one object per line")
    if len(rows) < min_rows:
        raise SystemExit(f"{path} has {len(rows):,} rows, expected at least {min_rows:,}: take a longer file")
    return rows


def at_least_zero(value: str) -> float:
    number = float(value)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0")
    return number


def share(value: str) -> float:
    number = float(value)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value} must be between 0 and 1")
    return number


def at_least_one(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return number


def summary_parser(description: str) -> argparse.ArgumentParser:
    """What `summarize.py` and `self_play.py` share."""
    dialogues = HERE / "data" / "dialogues.jsonl"
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint", type=checkpoint, default=str(HERE / "checkpoints" / "stlm-10m"), help="folder or Hub id"
    )
    parser.add_argument("--train", type=text_file, default=dialogues, help="JSON lines")
    parser.add_argument("--test", type=text_file, help="JSON lines; without it, the last quarter of --train")
    parser.add_argument("--output", type=Path, default=Path("runs/summaries"), help="folder")
    parser.add_argument("--train_rows", type=at_least_one, help="only the first ones")
    parser.add_argument("--test_rows", type=at_least_one, default=100, help="only the first ones")
    parser.add_argument("--text_bytes", type=at_least_one, default=1500, help="longest text")
    parser.add_argument("--summary_bytes", type=at_least_one, default=256, help="longest summary that is generated")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="rows")
    parser.add_argument("--seed", type=int, default=1, help="of weights and order")
    return parser
