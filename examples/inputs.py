# SPDX-License-Identifier: Apache-2.0
"""The command line of the examples: what they read is checked before anything is loaded.

Scripts parse their arguments above the imports that take seconds, so that `--help` and mistakes are answered at once.
"""

import argparse
import gzip
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from importlib.util import find_spec
from pathlib import Path


HERE = Path(__file__).parent
PACKAGE = HERE.parent / "modeling_stlm"
MATRIX_OPTIMIZER = "NorMuon"  # of `MuonRecipe`, for records of runs: those that do not tell are of Muon


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and the defaults that say something."""

    def _get_help_string(self, action):
        is_trivial = action.default is None or action.default is False or action.default == []
        return action.help if is_trivial else super()._get_help_string(action)


def require(extra: str, *packages: str) -> None:
    """Ends the program where packages of an extra of `setup.py` are not installed; imports none."""
    if missing := [package for package in packages if find_spec(package) is None]:
        install = f"pip install -c constraints.txt -e '.[{extra}]'"
        raise SystemExit(f"{Path(sys.argv[0]).name} needs {', '.join(missing)}: {install}")


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


def causal_checkpoint(value: str) -> str:
    """A [`checkpoint`] that predicts next bytes, which an encoder does not: it has seen them."""
    config = Path(checkpoint(value)) / "config.json"
    if config.is_file() and json.loads(config.read_bytes()).get("is_causal") is False:
        raise argparse.ArgumentTypeError(
            f"{value} is an encoder (is_causal=False): expected a causal language model, which predicts next bytes"
        )
    return value


def presets() -> list[str]:
    """The names of the presets of `STLMConfig`."""
    return sorted(path.stem for path in (PACKAGE / "presets").glob("*.json"))


def preset(value: str) -> str:
    if value not in presets():
        raise argparse.ArgumentTypeError(f"{value} is no preset: expected {', '.join(presets())}")
    return value


def config_change(value: str) -> str:
    """`FIELD=VALUE` of a field that `STLMConfig` adds; its source is read, for its import takes seconds."""
    name, equals, _ = value.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{value}: expected FIELD=VALUE")
    fields = re.findall(r"^    (\w+): .* = ", (PACKAGE / "configuration_stlm.py").read_text("utf-8"), re.MULTILINE)
    if name not in fields:
        raise argparse.ArgumentTypeError(f"{name} is not a field of STLMConfig")
    return value


def sentence_encoder(value: str) -> str:
    """A [`checkpoint`] whose embeddings mean something: without this file, sentence-transformers makes some up."""
    if Path(checkpoint(value)).is_dir() and not (Path(value) / "modules.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{value} has no modules.json: expected a folder of sentence-transformers, such as `encoder.py` writes"
        )
    return value


def text_file(value: str) -> Path:
    path = Path(value)
    if not path.is_file():
        raise argparse.ArgumentTypeError(
            f"{value} is {'a folder' if path.is_dir() else 'no such file'}: expected a file"
        )
    return path


def output_folder(value: str) -> Path:
    """A folder to write to, there or not; no part of its name is a file."""
    path = Path(value)
    if taken := next((part for part in (path, *path.parents) if part.is_file()), None):
        raise argparse.ArgumentTypeError(f"{taken} is a file: expected a folder, new or to go on with")
    return path


def another_job(folder: Path, architectures: tuple[str, ...], own: tuple[str, ...]) -> str | None:
    """What in `folder` this script did not write: a model of another kind, a card, the start or the results of another script."""
    read = {}
    for name in ("config.json", "results.json"):
        if (folder / name).is_file():
            try:
                read[name] = json.loads((folder / name).read_bytes())
            except ValueError:
                return f"a {name} that is no JSON"
    if "config.json" in read:
        found = read["config.json"].get("architectures") or ["model of no known kind"]
        if found[0] not in architectures:
            return f"a {found[0]}"
    for name in ("README.md", "begun.json"):
        if name not in own and (folder / name).is_file():
            return name
    script = read.get("results.json", {}).get("script")  # of earlier versions: None
    return None if script in (None, Path(sys.argv[0]).name) else f"results of {script}"


def output_of(*architectures: str, own: tuple[str, ...] = ()) -> Callable[[str], Path]:
    """An [`output_folder`] without [`another_job`], whose files would stay beside the new ones and be published.

    `own` are files that this script writes as it begins.
    """

    def check(value: str) -> Path:
        folder = output_folder(value)
        if found := another_job(folder, architectures, own):
            raise argparse.ArgumentTypeError(f"{value} holds {found}, of another job: use another folder")
        return folder

    return check


def files_of(patterns: Iterable[str | Path]) -> list[str]:
    """The files that patterns match, sorted. What is the name of a file is no pattern: `a [1].txt` is that file."""
    return sorted(
        file for pattern in patterns for file in ([str(pattern)] if Path(pattern).is_file() else glob(str(pattern)))
    )


def file_pattern(value: str) -> str:
    """The name of a file, or a pattern that matches some."""
    names = files_of([value])
    if not names:
        raise argparse.ArgumentTypeError(f"no file matches {value}")
    if folders := [name for name in names if Path(name).is_dir()]:
        raise argparse.ArgumentTypeError(f"{folders[0]} is a folder: expected files, such as '{folders[0]}/*.txt'")
    return value


@contextmanager
def naming(split: str, patterns: list[str], remedy: str) -> Iterator[None]:
    """A `ValueError` about the texts of a split ends the program, with their files and what to do."""
    try:
        yield
    except ValueError as error:
        files = files_of(patterns)
        more = f" and {len(files) - 3:,} more" if len(files) > 3 else ""
        raise SystemExit(f"--{split} {' '.join(files[:3])}{more}: {error}. {remedy}") from None


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """A packed file that cannot be unpacked ends the program."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SystemExit(f"{path} cannot be unpacked ({error}): expected a whole file that gzip has written") from None


def kind_of(path: Path) -> str | None:
    """`"csv"`, `"json"` (one object a line) or `"parquet"`, packed or not, by the suffixes; `None` for anything else."""
    kinds = {".csv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
    return next((kinds[suffix] for suffix in map(str.lower, path.suffixes) if suffix in kinds), None)


def read_bytes(path: Path) -> bytes:
    """What a file holds, unpacked if its name ends in `.gz`."""
    with unpacking(path):
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def as_text(document: str | bytes) -> str:
    """A document of `score.documents`, which gives the bytes of files without rows."""
    return document if isinstance(document, str) else document.decode(errors="replace")


def read_utf8(path: Path) -> str:
    """The text of a file; what is wrong with it, and what to do, ends the program."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # the mark that some programs put first
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. Convert it first, for example "
            f"with `iconv --from-code LATIN1 --to-code UTF-8 {path} > utf8{path.suffix}`"
        ) from None


def read_text(path: Path, min_bytes: int = 1) -> str:
    """A text of at least `min_bytes`; what is wrong with it, and what to do, ends the program."""
    text = read_utf8(path)
    if (found := len(text.encode())) < min_bytes:
        raise SystemExit(f"{path} has {found:,} bytes, expected at least {min_bytes:,}: take a longer text")
    return text


def read_json_lines(path: Path, min_rows: int = 1) -> list[dict]:
    """The objects of a file of JSON lines (`.gz` if packed); what is wrong with it ends the program."""
    rows = []
    for number, line in enumerate(
        read_utf8(path).split("\n"), 1
    ):  # `splitlines` would split at signs inside of strings, too
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
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0, and finite")
    return number


def positive(value: str) -> float:
    number = float(value)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value} must be above 0, and finite")
    return number


def whole(value: str) -> int:
    number = int(value)
    if number < 0:
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


def add_bf16(parser: argparse.ArgumentParser, what: str = "bfloat16 autocast") -> None:
    by_default = "by default where the GPU or CPU has instructions for it"
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help=f"{what}; {by_default}")


def add_rates(parser: argparse.ArgumentParser, muon_lr: float = 0.02, adamw_lr: float = 4e-3) -> None:
    """The rates of `MuonRecipe`; [`rates_of`] gives them to it."""
    parser.set_defaults(matrix_optimizer=MATRIX_OPTIMIZER)
    parser.add_argument("--muon_lr", type=positive, default=muon_lr, help="learning rate of the matrices")
    parser.add_argument("--adamw_lr", type=positive, default=adamw_lr, help="learning rate of all other parameters")


def rates_of(args: argparse.Namespace) -> dict[str, float]:
    return {"muon_lr": args.muon_lr, "adamw_lr": args.adamw_lr}


def choose_precision(args: argparse.Namespace) -> None:
    """Settle `--bf16` before it is used or recorded."""
    if args.bf16 is None:
        import torch

        from modeling_stlm.training.optimizer import has_bfloat16

        args.bf16 = has_bfloat16("cuda" if torch.cuda.is_available() else "cpu")


def add_label_training(
    parser: argparse.ArgumentParser, output: str, architecture: str, learning_rate: float, batch_size: int
) -> None:
    """What `classify.py` and `ner.py` share."""
    parser.add_argument(
        "--checkpoint", type=checkpoint, default=str(HERE / "checkpoints" / "stlm-3m-encoder"), help="folder or Hub id"
    )
    parser.add_argument("--output", type=output_of(architecture), default=output, help="folder of the trained model")
    parser.add_argument(
        "--runs", type=at_least_one, default=1, help="in other orders of the rows; keeps the mean of their weights"
    )
    parser.add_argument(
        "--adversarial_epsilon",
        type=at_least_zero,
        default=5.0,
        help="of adversarial training (arXiv:1605.07725), nearly twice the time; 0: without",
    )
    parser.add_argument("--learning_rate", type=positive, default=learning_rate, help="of AdamW")
    parser.add_argument("--batch_size", type=at_least_one, default=batch_size, help="rows")
    parser.add_argument("--max_bytes", type=at_least_one, default=512, help="read of each text")
    add_bf16(parser)
    parser.add_argument("--seed", type=whole, default=1, help="of weights and order")


def summary_parser(description: str, own: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """What `summarize.py` and `self_play.py` share."""
    dialogues = HERE / "data" / "dialogues.jsonl"
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=causal_checkpoint,
        default=str(HERE / "checkpoints" / "stlm-10m-wide"),
        help="folder or Hub id",
    )
    parser.add_argument("--train", type=text_file, default=dialogues, help="JSON lines")
    parser.add_argument("--test", type=text_file, help="JSON lines; without it, the last quarter of --train")
    parser.add_argument("--output", type=output_of(own=own), default="runs/summaries", help="folder")
    parser.add_argument("--train_rows", type=at_least_one, help="only the first ones")
    parser.add_argument("--test_rows", type=at_least_one, default=100, help="only the first ones")
    parser.add_argument("--text_bytes", type=at_least_one, default=1500, help="longest text")
    parser.add_argument("--summary_bytes", type=at_least_one, default=256, help="longest summary that is generated")
    parser.add_argument("--batch_size", type=at_least_one, default=8, help="rows")
    add_bf16(parser)
    parser.add_argument("--seed", type=whole, default=1, help="of weights and order")
    return parser
