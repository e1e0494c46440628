# SPDX-License-Identifier: Apache-2.0
"""The command `stlm`: write, serve, compress and measure with a file that `export.py` wrote.

    stlm run model.gguf -p "The history of" -n 200
    stlm bench model.gguf
    stlm serve model.gguf --port 8000
    stlm zip notes.txt notes.stlz --model model.gguf
    stlm unzip notes.stlz notes.txt --model model.gguf

Imports neither torch nor transformers nor numpy, and the parts of a command only when it runs: a text begins after tens of
milliseconds.
"""

import argparse
import os
import sys
import time

from .engine import Engine, Rows


CURL = """curl localhost:8000/v1/completions --json '{"prompt": "The history of the", "max_tokens": 100}'"""
BENCH_BYTES = 1024  # of a prompt, and of each text that is written
BENCH_TEXT = (
    b"The river rose in the night, and by morning the lower fields were a brown lake from which only the tops of the "
    b"fence posts looked out. Nobody had been hurt; but the bridge was gone, and with it the road to the market town. "
)


def readable(path: str, expected: str) -> str:
    """The path of a file to read; a `ValueError` says what is there instead."""
    if not os.path.exists(path):
        found = "no such file"
    elif os.path.isdir(path):
        found = "a folder"
    elif not os.access(path, os.R_OK):
        found = "a file without permission to read it"
    else:
        return path
    raise ValueError(f"{path} is {found}: expected {expected}")


def writable(path: str, expected: str) -> str:
    """As [`readable`], of a file that is to be written, also a device or a pipe."""
    if not path:
        raise ValueError(f"an empty name of a file: expected {expected}")
    folder = os.path.dirname(os.path.realpath(path))
    place = path if os.path.exists(path) and not os.path.isfile(path) else folder
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: expected {expected}")
    if not os.path.isdir(folder):
        raise ValueError(f"{path} cannot be written: there is no folder {folder}")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission to write to {place}")
    return path


def load(args: argparse.Namespace, **options) -> Engine:
    return Engine(readable(args.model, "a model, which modeling_stlm.inference.export writes"), **options)


def run(args: argparse.Namespace) -> None:
    engine = load(args)
    prompt = sys.stdin.buffer.read() if args.prompt is None else os.fsencode(args.prompt)
    options = {"do_sample": args.temperature > 0, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed}
    if args.temperature:
        options["temperature"] = args.temperature
    byte = b"\n"
    try:
        for byte in engine.stream(prompt, args.num_bytes, **options):
            sys.stdout.buffer.write(byte)
            sys.stdout.buffer.flush()
    finally:
        if byte != b"\n" and sys.stdout.isatty():  # where a prompt of the shell follows, also after Ctrl-C
            print(flush=True)


def measure(engine: Engine, num_rows: int) -> tuple[float, float]:
    """Bytes per second of prompts and of writing, all rows together: of CPU time, of several threads by the clock."""
    now = time.process_time if engine.num_threads == 1 else time.perf_counter
    sampling = engine.sampling(do_sample=True)
    sampling.num_ends = 0  # texts of full length
    prompt = (BENCH_TEXT * (BENCH_BYTES // len(BENCH_TEXT) + 1))[:BENCH_BYTES]
    rows, num_bytes = Rows(engine, num_rows), BENCH_BYTES * num_rows
    started = now()
    rows.read([prompt] * num_rows)
    after_prompt = now()
    rows.write([sampling] * num_rows, range(num_rows), bytearray(b"\1" * num_rows), BENCH_BYTES)
    return num_bytes / (after_prompt - started), num_bytes / (now() - after_prompt)


def bench(args: argparse.Namespace) -> None:
    from statistics import median

    engine = load(args, num_threads=args.threads)
    per = "bytes per CPU second" if args.threads == 1 else f"{args.threads} threads, bytes per second"
    runs = {num_rows: [measure(engine, num_rows) for _ in range(args.repeats)] for num_rows in (1, 16)}
    print(f"{args.model}, {engine.isa}, {BENCH_BYTES} bytes, {per} (median of {args.repeats})\n")
    print("| rows | prompt | generation |\n|---|---|---|")
    for num_rows, found in runs.items():
        prompt, generation = (median(column) for column in zip(*found))
        print(f"| {num_rows} | {prompt:,.0f} | {generation:,.0f} |")


def check_ends(args: argparse.Namespace, source: str, target: str) -> None:
    """Of `zip` and `unzip`, before the model is loaded: what is expected of both, unless they are `-`."""
    if args.source != "-":
        readable(args.source, source)
    if args.target != "-":
        writable(args.target, target)


def zip_file(args: argparse.Namespace) -> None:
    from .archive import pack_file

    check_ends(args, "a file to compress", "the name of an archive")
    num_read, num_written = pack_file(load(args), args.source, args.target)
    ratio = f", {8 * num_written / num_read:.3f} bits per byte" if num_read else ""
    print(f"{num_read:,} -> {num_written:,} bytes{ratio}", file=sys.stderr)


def unzip_file(args: argparse.Namespace) -> None:
    from .archive import unpack_file

    check_ends(args, "an archive of `stlm zip`", "the name of a file")
    unpack_file(load(args), args.source, args.target)


def serve(args: argparse.Namespace) -> None:
    from .server import serve

    serve(load(args, num_threads=args.threads), args.host, args.port, args.rows)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def at_least_zero(text: str) -> float:
    if not (number := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return number


def version() -> str:
    """That of `modeling_stlm`, which is not imported."""
    with open(os.path.join(os.path.dirname(os.path.dirname(__file__)), "__init__.py"), encoding="utf-8") as source:
        return next(line.split('"')[1] for line in source if line.startswith("__version__"))


def formatter(prog: str) -> argparse.HelpFormatter:
    # Without a width it imports shutil, even where nobody asks for help.
    return argparse.RawDescriptionHelpFormatter(prog, width=119)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("stlm", description=__doc__, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version()}")
    commands = parser.add_subparsers(required=True, metavar="command", prog="stlm")

    def command(name: str, function, help: str) -> argparse.ArgumentParser:
        options = commands.add_parser(name, help=help, description=help, formatter_class=formatter)
        options.set_defaults(function=function)
        return options

    options = command("run", run, "write what follows a prompt")
    options.add_argument("model", help="file of modeling_stlm.inference.export")
    options.add_argument("-p", "--prompt", help="standard input if left out; empty: from the beginning of a text")
    options.add_argument("-n", "--num_bytes", type=positive, default=200, help="at most, default 200")
    options.add_argument("--temperature", type=at_least_zero, default=0.8, help="default 0.8; 0: the likeliest bytes")
    options.add_argument("--top_k", type=int, default=0, help="default 0: all")
    options.add_argument("--top_p", type=float, default=0.95, help="default 0.95")
    options.add_argument("--seed", type=int, default=0, help="default 0")
    options = command("bench", bench, "bytes per CPU second of prompts and of writing, for 1 and 16 rows")
    options.add_argument("model")
    options.add_argument("--repeats", type=positive, default=3, help="default 3")
    options.add_argument(
        "--threads", type=positive, default=1, help="that share the rows, default 1; more: by the clock"
    )
    options = command("serve", serve, "completions over HTTP, in the format of OpenAI")
    options.epilog = f"Then, for example:\n\n    {CURL}"
    options.add_argument("model")
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--threads", type=positive, default=1, help="that share the texts, default 1")
    options.add_argument("--rows", type=int, default=16, help="texts that are written at once, default 16")
    for name, function, help in (
        ("zip", zip_file, "compress a file with the probabilities of a model"),
        ("unzip", unzip_file, "the content of what zip wrote with the same file of a model"),
    ):
        options = command(name, function, help)
        options.add_argument("source", help="- for standard input")
        options.add_argument("target", help="- for standard output")
        options.add_argument("--model", required=True)
    return parser


def open_standard_streams() -> None:
    """Stand-ins for standard streams that are closed, whose numbers the next files would get.

    Reading and writing them is refused, as of closed ones, but messages go nowhere.
    """
    streams = (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY))
    for number, (name, mode, access) in enumerate(streams):
        if getattr(sys, name) is None:
            os.open(os.devnull, access)  # the lowest number that is free, which is this one
            setattr(sys, name, open(number, mode, closefd=False))


def let_go_of_output() -> None:
    """Leave nothing that Python would flush at its end, and fail to."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> int:
    open_standard_streams()
    args = parser().parse_args()
    try:
        args.function(args)
        sys.stdout.flush()
    except BrokenPipeError:  # somebody read enough
        let_go_of_output()
        return 141  # 128 + SIGPIPE, as shells have it
    except KeyboardInterrupt:
        return 130
    except (ImportError, MemoryError, OSError, OverflowError, ValueError) as error:
        words = getattr(error, "strerror", None) or error  # without the number of the error
        name = getattr(error, "filename", None)
        print(f"stlm: {name}: {words}" if name else f"stlm: {words}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # the error that was told
            let_go_of_output()
        return 1
    return 0


if __name__ == "__main__":  # slower to start than `stlm`: the package imports torch
    sys.exit(main())
