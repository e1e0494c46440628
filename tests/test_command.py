# SPDX-License-Identifier: Apache-2.0
"""The command `stlm`, as it is installed: in processes of its own, and its server in threads of this one."""

import contextlib
import http.client
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import modeling_stlm
from modeling_stlm.inference.engine import Engine, Rows
from modeling_stlm.inference.export import export_gguf
from modeling_stlm.inference.server import Completion, Server, cut, serve

from .tiny import TEXT, tiny_model


pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="the engine is compiled with cc"),
    pytest.mark.usefixtures("built"),
]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


NEEDS_IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
SHIPPED = Path(__file__).parents[1] / "examples" / "checkpoints" / "stlm-3m"
# Processes of pytest-xdist ignore SIGINT, and so do their children.
START = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from stlm_command import main; "


@pytest.fixture(scope="module")
def engine(built, tmp_path_factory) -> Engine:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    export_gguf(AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32), path, "q8")
    return Engine(path)


@pytest.fixture
def stlm(engine_build, engine, tmp_path):
    """Starts `stlm COMMAND tiny.gguf ...` outside of the checkout."""

    def start(command: str, *arguments, then: str = "sys.exit(main())", **options) -> subprocess.Popen:
        arguments = [sys.executable, "-c", START + then, command, *map(str, arguments)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = os.environ | {"PYTHONPATH": str(engine_build)}
        return subprocess.Popen(arguments, cwd=tmp_path, env=environment, **pipes | options)

    return start


def end_of(process: subprocess.Popen, given: bytes = b"") -> tuple[int, bytes, str]:
    """Exit code, output, and errors of a process that reads `given`."""
    output, errors = process.communicate(given, timeout=120)
    return process.returncode, output, errors.decode()


def test_run_writes_what_follows_a_prompt_or_standard_input(stlm, engine):
    prompt, greedy = "Zoë saw", ["--temperature", 0, "-n", 70]
    expected = engine.generate(prompt, 70)
    assert end_of(stlm("run", engine.path, "-p", prompt, *greedy)) == (0, expected, "")
    assert end_of(stlm("run", engine.path, *greedy), prompt.encode()) == (0, expected, "")
    # Without a prompt, the beginning of a text.
    expected = engine.generate(b"", 70)
    assert end_of(stlm("run", engine.path, *greedy), b"") == (0, expected, "")
    assert end_of(stlm("run", engine.path, "-p", "", *greedy)) == (0, expected, "")
    options = ["--temperature", 0.9, "--top_k", 30, "--top_p", 0.9, "--seed", 7]
    expected = engine.generate(prompt, 70, do_sample=True, temperature=0.9, top_k=30, top_p=0.9, seed=7)
    assert end_of(stlm("run", engine.path, "-p", prompt, "-n", 70, *options)) == (0, expected, "")


def test_a_text_ends_its_line_on_a_terminal_only(stlm, engine):
    prompt = 4 * "one\ntwo\n" + "on"  # which is copied, with the ends of its lines

    def shown(*arguments, code: int = 0) -> bytes:
        ours, theirs = pty.openpty()
        process = stlm("run", engine.path, "-p", prompt, "--temperature", 0, *arguments, stdout=theirs)
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # at its end, on Linux
            while piece := os.read(ours, 1000):
                if code == 130 and not text:
                    process.send_signal(signal.SIGINT)
                text += piece
        os.close(ours)
        assert end_of(process)[0] == code
        return text.replace(b"\r\n", b"\n")

    text = engine.generate(prompt, 60)
    line_end = text.index(b"\n") + 1
    assert shown("-n", 5) == text[:5] + b"\n"
    assert shown("-n", line_end) == text[:line_end]  # which ends the line itself
    cut = shown("-n", 10**8, code=130)
    text = engine.generate(prompt, len(cut))
    assert cut == (text if text.endswith(b"\n") else text[:-1] + b"\n")
    assert shown("--top_p", 2, code=1) == b""


def test_run_imports_neither_torch_nor_transformers_nor_numpy(stlm, engine):
    then = "main(); print([name for name in ('torch', 'transformers', 'numpy', 'pathlib') if name in sys.modules])"
    code, output, errors = end_of(stlm("run", engine.path, "-p", "x", "-n", 1, then=then))
    loaded = output[output.index(b"[") :]
    assert code == 0 and loaded.strip() in (b"[]", b"['pathlib']"), errors  # which hooks of editable installs import


def test_the_command_leaves_the_package_as_it_is(stlm, engine):
    then = "main(); print([name for name in sys.modules if name.startswith('modeling_stlm')])"
    code, output, errors = end_of(stlm("run", engine.path, "-p", "x", "-n", 1, then=then))
    assert code == 0 and output.endswith(b"[]\n"), errors


def test_run_ends_quietly_when_nobody_reads_or_somebody_interrupts(stlm, engine):
    process = stlm("run", engine.path, "-p", "x", "-n", 10**8, "--seed", 3)
    assert len(process.stdout.read(10)) == 10
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""  # which a shell says of SIGPIPE
    process = stlm("run", engine.path, "-p", "x", "-n", 10**8, "--seed", 3)
    assert len(process.stdout.read(10)) == 10
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read() == b""
    process.stdout.close()


def test_what_is_wrong_is_said_in_one_line(stlm, engine, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(engine.path.read_bytes()[:1000])
    taken = socket.create_server(("127.0.0.1", 0))
    model, model_option = "expected a model, which modeling_stlm.inference.export writes", ["--model", engine.path]
    for arguments, words in (
        (["run", "none.gguf", "-p", "x"], f"stlm: none.gguf is no such file: {model}"),
        (["bench", "."], f"stlm: . is a folder: {model}"),
        (["serve", "-"], f"stlm: - is no such file: {model}"),
        (["zip", "none.txt", "x", *model_option], "stlm: none.txt is no such file: expected a file to compress"),
        (["zip", "bad.gguf", "", *model_option], "stlm: an empty name of a file: expected the name of an archive"),
        (["zip", "bad.gguf", ".", *model_option], "stlm: . is a folder: expected the name of an archive"),
        (["unzip", ".", "x", *model_option], "stlm: . is a folder: expected an archive of `stlm zip`"),
        (
            ["unzip", "bad.gguf", "no/x", *model_option],
            f"no/x cannot be written: there is no folder {tmp_path / 'no'}",
        ),
        (["zip", "bad.gguf", "x", "--model", "none"], f"stlm: none is no such file: {model}"),
        (["serve", engine.path, "--port", taken.getsockname()[1]], "Address already in use. Expected a free --port"),
        (["run", "bad.gguf", "-p", "x"], "bad.gguf: the file is truncated"),
        (["run", engine.path, "-p", "x", "--top_p", 2], "top_p=2.0 is out of its range"),
        (["serve", engine.path, "--port", 99999], "port must be 0-65535"),
    ):
        code, output, errors = end_of(stlm(*arguments))
        assert code == 1 and output == b"" and words in errors and errors.count("\n") == 1, errors
    taken.close()
    code, _, errors = end_of(stlm("run"))
    assert code == 2 and "usage: stlm run" in errors
    for arguments in (["bench", engine.path, "--repeats", 0], ["run", engine.path, "-n", -5]):
        code, output, errors = end_of(stlm(*arguments))
        assert code == 2 and output == b"" and f"{arguments[-1]} must be at least 1" in errors
    for cold in (-1, "nan"):
        code, output, errors = end_of(stlm("run", engine.path, "-p", "x", "--temperature", cold))
        assert code == 2 and output == b"" and f"argument --temperature: {cold} must be at least 0" in errors


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_standard_stream_is_no_other_file(stlm, engine, tmp_path, closed):
    (tmp_path / "in.txt").write_text(TEXT)
    model = ["--model", engine.path]

    def end(*arguments, given=b"") -> tuple[int, bytes, str]:
        return end_of(stlm(*arguments, preexec_fn=lambda: os.close(closed)), given)

    if closed == 2:
        code, archive, errors = end("zip", "in.txt", "-", *model)
        assert (code, errors) == (0, "")
        assert end_of(stlm("unzip", "-", "-", *model), archive) == (0, TEXT.encode(), "")
        assert end("run", "none.gguf") == (1, b"", "")
    elif closed == 1:
        for arguments in (
            ["run", engine.path, "-p", "x"],
            ["zip", "in.txt", "-", *model],
            ["bench", engine.path, "--repeats", 1],
        ):
            assert end(*arguments) == (1, b"", "stlm: Bad file descriptor\n")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = stlm("serve", engine.path, "--port", port, preexec_fn=lambda: os.close(closed))
        for _ in range(600):  # it tells nobody when it is there
            with (
                contextlib.suppress(urllib.error.URLError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60) as answer,
            ):
                assert json.load(answer) == {"status": "ok"}
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert end_of(process) == (130, b"", "")
    else:
        for arguments in (["zip", "-", "out.z", *model], ["run", engine.path]):
            code, output, errors = end(*arguments)
            assert (code, output, errors) == (1, b"", "stlm: Bad file descriptor\n")
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt"}


def test_the_command_is_a_module_too():
    command = [sys.executable, "-m", "modeling_stlm.inference.cli", "run", "none.gguf", "-p", "x"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "stlm: none.gguf is no such file" in result.stderr


def test_the_command_knows_its_version(stlm):
    code, output, errors = end_of(stlm("--version"))
    assert (code, output.decode(), errors) == (0, f"stlm {modeling_stlm.__version__}\n", "")


def test_help_shows_a_request_that_the_server_takes(stlm, url):
    code, output, _ = end_of(stlm("serve", "--help"))
    address, body = re.search(r"curl localhost:8000(\S+) --json '(.+)'", output.decode()).groups()
    assert code == 0 and len(post(url, json.loads(body) | {"seed": 0}, address)["choices"][0]["text"]) > 50


@pytest.mark.parametrize(("threads", "unit"), [(1, "bytes per CPU second"), (2, "2 threads, bytes per second")])
def test_bench_prints_a_table(threads, unit, stlm, engine):
    code, output, errors = end_of(stlm("bench", engine.path, "--repeats", 1, "--threads", threads))
    assert unit in output.decode()
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d,]+) \|$", output.decode(), re.MULTILINE)
    assert code == 0 and [row[0] for row in rows] == ["1", "16"], errors
    assert all(int(number.replace(",", "")) > 1000 for row in rows for number in row[1:])


# The server


@pytest.fixture(scope="module")
def url(engine):
    with Server(engine, "127.0.0.1", 0, num_rows=4) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def request(url: str, body, path: str = "/v1/completions", kind: str = "application/json") -> urllib.request.Request:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return urllib.request.Request(url + path, data, {"Content-Type": kind})


def post(*what) -> dict:
    with urllib.request.urlopen(request(*what), timeout=60) as answer:
        return json.load(answer)


def text_of(url: str, **body) -> str:
    return post(url, body)["choices"][0]["text"]


def events_of(url: str, **body) -> list[dict]:
    with urllib.request.urlopen(request(url, body | {"stream": True}), timeout=60) as answer:
        assert answer.headers["Content-Type"] == "text/event-stream"
        events = [line.removeprefix("data: ") for line in answer.read().decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_completion_is_what_the_engine_writes(url, engine):
    answer = post(url, {"model": "tiny", "prompt": "In Zoë", "max_tokens": 50, "temperature": 0})
    expected = engine.generate("In Zoë", 50).decode(errors="replace")
    assert answer["object"] == "text_completion" and answer["model"] == "tiny" and answer["id"].startswith("cmpl-")
    choice = {"text": expected, "index": 0, "logprobs": None, "finish_reason": "length"}
    assert answer["choices"] == [choice]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 50, "total_tokens": 57}  # bytes
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1}
    sampled = engine.generate("", 16, do_sample=True, seed=9, **options).decode(errors="replace")
    assert text_of(url, prompt="", seed=9, **options) == sampled
    long = TEXT * 5  # read in pieces
    assert text_of(url, prompt=long, temperature=0) == engine.generate(long, 16).decode(errors="replace")
    assert text_of(url, prompt="ab", temperature=0, echo=True)[:2] == "ab"


def test_many_requests_are_written_in_one_batch(url, engine, monkeypatch):
    together, write = [], Rows.write

    def counted(self, samplings, seeds, active, count):
        together.append(sum(active))
        return write(self, samplings, seeds, active, count)

    monkeypatch.setattr(Rows, "write", counted)
    prompts = [TEXT[:n] for n in range(1, 25)]
    expected = [engine.generate(p, 90, do_sample=True, temperature=1 + n / 9, seed=n) for n, p in enumerate(prompts)]
    together.clear()
    with ThreadPoolExecutor(24) as pool:
        found = pool.map(
            lambda n: text_of(url, prompt=prompts[n], max_tokens=90, temperature=1 + n / 9, seed=n), range(24)
        )
        assert list(found) == [text.decode(errors="replace") for text in expected]
    assert max(together) == 4
    answer = post(url, {"prompt": prompts[:3], "n": 2, "max_tokens": 20, "seed": 5})
    expected = [engine.generate(prompts[i // 2], 20, do_sample=True, seed=5 + i) for i in range(6)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [choice["text"] for choice in answer["choices"]] == [text.decode(errors="replace") for text in expected]


def test_a_prompt_may_be_ids(url, engine):
    options = {"temperature": 0, "max_tokens": 20}
    expected = [engine.generate(text, 20).decode(errors="replace") for text in ("ab", "c", b"")]
    assert text_of(url, prompt=[97, 98], **options) == expected[0]
    answer = post(url, {"prompt": [[97, 98], "c", []], "echo": True} | options)
    assert [choice["text"] for choice in answer["choices"]] == ["ab" + expected[0], "c" + expected[1], expected[2]]
    assert answer["usage"]["prompt_tokens"] == 3
    rows = Rows(engine, 1)
    rows.read([[257, 97, 98]])
    ids = rows.write([engine.sampling()], [0], bytearray(b"\1"), 20)[0]
    written = bytes(i for i in ids if i < 256).decode(errors="replace")
    assert text_of(url, prompt=[257, 97, 98], echo=True, **options) == "ab" + written


def test_usage_counts_special_tokens(built, tmp_path):
    export_gguf(tiny_model(), tmp_path / "random.gguf")
    engine = Engine(tmp_path / "random.gguf")
    with serving(engine) as (_, url):
        for seed in range(20):
            body = {"prompt": "x", "max_tokens": 30, "temperature": 2.0, "seed": seed}
            rows = Rows(engine, 1)
            rows.read([b"x"])
            ids = rows.write([engine.sampling(True, 2.0)], [seed], bytearray(b"\1"), 30)[0]
            assert post(url, body)["usage"]["completion_tokens"] == len(ids)
            if sum(i > 255 for i in ids) > 1:
                break
        else:
            raise AssertionError("no text with special tokens")


def test_a_prompt_that_the_model_has_no_ids_for_is_refused_alone(built, tmp_path):
    export_gguf(tiny_model(vocab_size=200, bos_token_id=1, pad_token_id=0, eos_token_id=2), tmp_path / "small.gguf")
    with serving(Engine(tmp_path / "small.gguf")) as (_, url):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            post(url, {"prompt": "東"})
        assert refusal.value.code == 400 and "expected 0 to 199" in refusal.value.read().decode()


def test_a_stream_has_the_text_of_the_answer(url):
    body = {"prompt": ["Zoë saw 東", "x"], "max_tokens": 60, "seed": 3, "temperature": 1.5}
    answer, events = post(url, body), events_of(url, **body)
    assert len(events) > 6
    for choice in answer["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(event["text"] for event in mine) == choice["text"]
        assert [event["finish_reason"] for event in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_a_text_stops_before_the_first_stop_string(url, engine):
    text = text_of(url, prompt="x", max_tokens=60, temperature=0)
    for stop in (text[20:23], [text[30:34], text[21:25]], ["no such text", text[5:45]]):
        body = {"prompt": "x", "max_tokens": 60, "temperature": 0, "stop": stop}
        places = [text.find(word) for word in ([stop] if isinstance(stop, str) else stop) if word in text]
        choice = post(url, body)["choices"][0]
        assert choice["text"] == text[: min(places)] and choice["finish_reason"] == "stop"
        assert "".join(event["choices"][0]["text"] for event in events_of(url, **body)) == choice["text"]
    # However the text is cut into pieces.
    for size in range(1, 8):
        held, written, is_stopped = b"", b"", False
        while len(written) < 40 and not is_stopped:
            piece = b"aababcabcdabcde"[len(written) + len(held) :][:size]
            done, held, is_stopped = cut(held + piece, [b"abcde", b"cda"])
            written += done
        assert written == b"aababcab"


def test_models_and_health(url):
    with urllib.request.urlopen(url + "/v1/models", timeout=60) as answer:
        models = json.load(answer)
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["tiny"]
    with urllib.request.urlopen(url + "/health", timeout=60) as answer:
        assert json.load(answer) == {"status": "ok"}


def test_a_model_is_found_under_its_name_as_an_address_writes_it(engine, tmp_path):
    (tmp_path / "mein Modell é.gguf").symlink_to(engine.path)
    with serving(Engine(tmp_path / "mein Modell é.gguf")) as (_, address):
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as answer:
            (model,) = json.load(answer)["data"]
        assert model["id"] == "mein Modell é"
        for name in (urllib.parse.quote(model["id"]), "mein%20Modell%20%c3%a9"):
            with urllib.request.urlopen(f"{address}/v1/models/{name}", timeout=60) as answer:
                assert json.load(answer) == model
        with pytest.raises(urllib.error.HTTPError, match="404") as refusal:
            urllib.request.urlopen(f"{address}/v1/models/other", timeout=60)
        assert "/v1/models/mein%20Modell%20%C3%A9" in json.load(refusal.value)["error"]["message"]


@pytest.mark.skipif(sys.platform == "darwin", reason="names of files are UTF-8 there")
def test_a_model_may_have_a_name_that_is_no_text(engine, tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.gguf"))
    path.symlink_to(engine.path)
    with serving(Engine(path)) as (_, address):
        for page in ("/health", "/v1/models", "/v1/models/m%FF"):
            with urllib.request.urlopen(address + page, timeout=60) as answer:
                assert json.load(answer)


def test_a_body_of_any_depth_is_refused_in_words(url):
    found = set()
    for depth in range(850, 1050):  # up to and beyond the depth that can just be read
        with pytest.raises(urllib.error.HTTPError) as refusal:
            post(url, b'{"prompt": [' + b"[" * depth + b"]" * depth + b"]}")
        assert refusal.value.code == 400
        found.add(json.load(refusal.value)["error"]["message"][:20])
    assert found == {"prompt should be a s", "the body is nested t"}


@pytest.mark.timeout(60)
def test_a_stop_that_cannot_match_yet_takes_no_time():
    stop = b"x" * 2**21
    assert cut(b"a" + b"x" * 8, [stop]) == (b"a", b"x" * 8, False)
    assert cut(b"a" * 8, [stop]) == (b"a" * 8, b"", False)
    assert cut(stop[:99], [stop]) == (b"", stop[:99], False)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[" * 100000, 400, "the body is nested too deeply"),
        ([1], 400, "should be a JSON object"),
        ({"prompt": 3}, 400, "prompt should be a string, a list of ids, or a list of such, got 3"),
        ({"prompt": ["a", 3]}, 400, "prompt should be a string, a list of ids, or a list of such, got 3"),
        ({"prompt": [[97, [98]]]}, 400, "prompt should be a string, a list of ids, or a list of such, got [97, [98]]"),
        ({"prompt": [97, True]}, 400, "prompt should be a string, a list of ids, or a list of such, got 97"),
        ({"prompt": []}, 400, "prompt is an empty list, expected at least one text"),
        ({"prompt": [97, 320]}, 400, "prompt has ids from 97 to 320, expected 0 to 319"),
        ({"prompt": ["x", [-1]]}, 400, "prompt has ids from -1 to -1, expected 0 to 319"),
        ({"n": 10**6}, 400, "1 to 128 texts"),
        ({"max_tokens": 0}, 400, "max_tokens should be at least 1"),
        ({"max_tokens": 10**9}, 400, "at most 1048576 less the 0 bytes of the prompt, got 1000000000"),
        ({"prompt": ["x", "y" * 2**20]}, 400, "less the 1048576 bytes of the prompt, got 16"),
        ({"max_tokens": True}, 400, "max_tokens should be an integer, got true"),
        ({"temperature": -1}, 400, "temperature=-1 is out of its range"),
        ({"temperature": 10**400}, 400, "too large"),
        ({"temperature": "hot"}, 400, 'temperature should be a number, got "hot"'),
        ({"top_k": 2.5}, 400, "top_k should be an integer"),
        ({"stop": ["x", 3]}, 400, "stop should be a string or a list of strings, got 3"),
        ({"stop": [""]}, 400, "stop has an empty string"),
        ({"stop": ""}, 400, "stop has an empty string"),
        ({"stream_options": {"x": 1}}, 400, "this server knows include_usage"),
        ({"logprobs": 5}, 400, "does not know logprobs=5"),
        ({"top_q": 5}, 400, "does not know top_q=5"),
        ({"model": "gpt"}, 404, "has the model tiny, not gpt"),
    ],
)
def test_bad_requests_are_refused_in_words(url, body, status, words):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        post(url, body)
    error = json.load(refusal.value)["error"]
    assert refusal.value.code == status and words in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] in (None, "max_tokens", *body)
    assert post(url, {"prompt": "x", "logprobs": None, "best_of": 1, "seed": 2**70, "top_k": 2**40, "stop": "\ud800"})[
        "choices"
    ]


def test_unknown_addresses_are_refused_in_words(url):
    for call in (lambda: post(url, {}, "/v1/chat"), lambda: urllib.request.urlopen(url + "/v2", timeout=60)):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            call()
        assert refusal.value.code == 404 and "there is nothing at /v" in json.load(refusal.value)["error"]["message"]


def test_a_page_of_another_site_cannot_post(url):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        post(url, {"prompt": "x"}, "/v1/completions", "text/plain;charset=UTF-8")
    assert refusal.value.code == 415 and "application/json, got text/plain" in refusal.value.read().decode()
    client = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))
    client.request("POST", "/v1/completions", b'{"prompt": "x"}')
    answer = client.getresponse()
    error = json.load(answer)["error"]
    assert answer.status == 415 and error["type"] == "invalid_request_error"
    assert error["message"] == "the Content-Type should be application/json, got none: `curl --json` sends it"
    client.close()


def test_a_length_of_many_digits_is_refused_in_words(url):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    answer = answer_to(url, head + b"9" * 5000 + b"\r\n\r\n")
    assert b" 413 " in answer and b"Content-Length of at most" in answer


def answer_to(url: str, sent: bytes, half_close: bool = False) -> bytes:
    """All that the server answers to `sent` before it closes the connection."""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as client:
        client.sendall(sent)
        if half_close:
            client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


def test_a_body_of_unknown_length_is_refused_in_words(url):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    for rest in (chunked, b"Content-Length: 2\r\n" + chunked, b"\r\n", b"Content-Length: -2\r\n\r\n{}"):
        answer = answer_to(url, head + rest)
        assert answer.startswith(b"HTTP/1.1 411 ") and answer.count(b"HTTP/1.1") == 1
        assert b"with its Content-Length" in answer and b"Connection: close" in answer


def test_the_body_of_a_get_is_no_request(url):
    inner = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    length = b"Content-Length: %d\r\n\r\n" % len(inner)
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(inner)
    for kind in (length, chunked):
        answer = answer_to(url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + kind + inner)
        assert answer.count(b"HTTP/1.1 200") == 1 and answer.endswith(b'{"status": "ok"}')


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_client_that_ends_its_input_is_answered(version, engine):
    body = {"prompt": "x", "max_tokens": 3000, "temperature": 0, "repetition_penalty": 1.1}
    expected = engine.generate("x", 3000, repetition_penalty=1.1).decode(errors="replace")

    def sent(body: dict) -> bytes:
        data = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/%s\r\nContent-Type: application/json\r\nConnection: close\r\n" % version
        return head + b"Content-Length: %d\r\n\r\n" % len(data) + data

    with serving(engine) as (_, url):
        answer = answer_to(url, sent(body), half_close=True)
        (status, *_), text = answer.split(b"\r\n"), answer.rpartition(b"\r\n\r\n")[2]
        assert status == (b"HTTP/1.1 200 OK" if version == b"1.0" else b"HTTP/1.1 100 Continue")
        assert json.loads(text)["choices"][0]["text"] == expected
        answer = answer_to(url, sent(body | {"stream": True}), half_close=True)
        head, _, events = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK") and events.endswith(b"data: [DONE]\n\n")
        events = [json.loads(event[6:]) for event in events.split(b"\n\n")[:-2] if event.startswith(b"data: ")]
        assert "".join(event["choices"][0]["text"] for event in events) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=NEEDS_IPV6)])
def test_a_name_that_was_made_to_point_here_is_refused(host, engine):
    def status(name: str, method: str = "POST") -> tuple[int, bytes]:
        client = http.client.HTTPConnection(host, server.server_port, timeout=60)
        kind = {"Content-Type": "application/json", "Host": name}
        client.request(method, "/v1/completions" if method == "POST" else "/health", b"{}" * (method == "POST"), kind)
        answer = client.getresponse()
        return answer.status, answer.read()

    with serving(engine, host=host) as (server, _):
        for name in ("127.0.0.1:8000", "[::1]:8000", "LocalHost", "localhost:80", "192.168.1.5"):
            assert status(name)[0] == 200
        for name in ("evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "[", ""):
            code, words = status(name)
            assert code == 403 and b"not to the name" in words, name
        assert status("evil.example", "GET")[0] == 403


def test_a_server_on_all_addresses_answers_to_every_name(engine):
    with serving(engine, host="0.0.0.0") as (server, _):
        client = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        client.request("GET", "/health", headers={"Host": "stlm.example"})
        assert client.getresponse().status == 200
        client.close()


def test_usage_counts_a_prompt_once_and_ends_a_stream_that_asks(url):
    body = {"prompt": ["ab", "c"], "n": 3, "max_tokens": 4}
    usage = {"prompt_tokens": 3, "completion_tokens": 24, "total_tokens": 27}
    assert post(url, body)["usage"] == usage
    assert all("usage" not in event for event in events_of(url, **body))
    *events, last = events_of(url, **body, stream_options={"include_usage": True})
    assert last["usage"] == usage and last["choices"] == []
    assert all(event["usage"] is None and event["choices"] for event in events)


def test_a_kept_connection_answers_at_once(url):
    client = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]))
    started = time.monotonic()
    for _ in range(50):  # which took 40 ms each, in waiting for an acknowledgement
        client.request("GET", "/health")
        client.getresponse().read()
    assert time.monotonic() - started < 1
    client.close()


def test_copies_of_a_text_share_its_prompt(engine):
    completion = Completion(engine, "tiny", {"prompt": "ab" * 1000, "n": 3})
    assert {id(text.prompt) for text in completion.texts} == {id(completion.prompts[0])}


@contextlib.contextmanager
def serving(engine, num_rows: int = 1, host: str = "127.0.0.1"):
    """A server, and what its requests take."""
    server = Server(engine, host, 0, num_rows)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


LONG = {"prompt": "x", "max_tokens": 10**6, "temperature": 0, "repetition_penalty": 1.1}  # minutes


def test_a_client_that_goes_makes_room(url):
    for _ in range(4):  # which would take all rows
        answer = urllib.request.urlopen(request(url, LONG | {"stream": True}), timeout=60)
        assert answer.read(6) == b"data: "
        answer.close()
    assert len(text_of(url, prompt="x", temperature=0)) > 0
    for _ in range(4):  # without an answer yet
        with pytest.raises(TimeoutError), urllib.request.urlopen(request(url, LONG), timeout=0.2):
            pass
    long_prompt = LONG | {"prompt": "x" * 2**19, "max_tokens": 2**18, "stream": True}
    for _ in range(4):  # while its prompt is read
        urllib.request.urlopen(request(url, long_prompt), timeout=60).close()
    assert len(text_of(url, prompt="x", temperature=0)) > 0


def test_a_server_that_stops_answers_the_texts_that_are_written_and_those_that_wait(engine):
    def status() -> int:
        with pytest.raises(urllib.error.HTTPError) as refusal:
            post(url, LONG)
        assert "the server has stopped" in refusal.value.read().decode()
        return refusal.value.code

    with ThreadPoolExecutor(3) as pool:
        with serving(engine) as (server, url):
            answers = [pool.submit(status) for _ in range(3)]
            while len(server.answering) < 3 or server.writer.texts[0] is server.writer.nothing:
                time.sleep(0.01)
            started = time.monotonic()
        assert [answer.result(10) for answer in answers] == [503] * 3
    assert not server.writer.is_alive() and time.monotonic() - started < 10


def test_a_fault_of_the_writer_is_answered_and_the_next_text_written(engine, monkeypatch, capsys):
    read = Rows.read

    def faulty(self, texts):
        if bytes(texts[0]) == b"bad":
            raise MemoryError
        return read(self, texts)

    with serving(engine) as (_, url):
        monkeypatch.setattr(Rows, "read", faulty)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            post(url, {"prompt": "bad"})
        assert refusal.value.code == 500 and "MemoryError" in refusal.value.read().decode()
        assert text_of(url, prompt="good", temperature=0) == engine.generate("good", 16).decode(errors="replace")
    assert "Traceback" in capsys.readouterr().err


# The loop of the server stays where it has just handed a connection on, as it may for a moment on a busy machine.
AFTER_A_CONNECTION = """import socketserver, time
hand_on = socketserver.ThreadingMixIn.process_request
socketserver.ThreadingMixIn.process_request = lambda *arguments: (hand_on(*arguments), time.sleep(2))
"""


@pytest.mark.parametrize("where", ["", AFTER_A_CONNECTION], ids=["waiting for a connection", "after one"])
def test_serve_ends_while_all_rows_are_busy(where, stlm, engine):
    process = stlm("serve", engine.path, "--port", 0, "--rows", 1, then=f"\n{where}sys.exit(main())")
    url = process.stdout.readline().decode().strip().removesuffix("/v1")
    with urllib.request.urlopen(request(url, LONG | {"stream": True}), timeout=60) as answer:
        assert answer.read(6) == b"data: "
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stderr.read() == b""
        assert b"the server has stopped" in answer.read()
    process.stdout.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_serve_fails_where_its_loop_does(engine, monkeypatch):
    def fail(self):
        raise OSError("no more files")

    monkeypatch.setattr(Server, "service_actions", fail)
    with pytest.raises(RuntimeError, match="ended by itself"):
        serve(engine, "127.0.0.1", 0, 1)


@pytest.mark.parametrize(
    ("host", "where"), [("127.0.0.1", "127.0.0.1"), pytest.param("::1", "[::1]", marks=NEEDS_IPV6)]
)
def test_serve_says_where_and_ends_quietly(host, where, stlm, engine):
    process = stlm("serve", engine.path, "--port", 0, "--host", host)
    url = process.stdout.readline().decode().strip()
    assert url.startswith(f"http://{where}:") and url.endswith("/v1") and text_of(url.removesuffix("/v1"), prompt="x")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and process.stderr.read() == b""
    process.stdout.close()


def test_the_package_of_the_command_is_a_command(engine_build, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(engine_build)}
    command = [sys.executable, "-m", "stlm_command", "--help"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "stlm run model.gguf" in run.stdout
    assert not (engine_build / "modeling_stlm" / "inference" / "stlm_command").exists()  # nor twice
