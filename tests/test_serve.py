# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` and `transformers chat` with the shipped checkpoint, over the network of this machine."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving.model_manager import ModelManager

from modeling_stlm import STLMForCausalLM


ROOT = Path(__file__).parents[1]
SHIPPED = str(ROOT / "examples" / "checkpoints" / "stlm-3m")
MESSAGES = [{"role": "user", "content": "Who wrote this? Zoë, 東京."}]


def test_the_server_of_the_library_finds_no_class_outside_of_it():
    # Why examples/serve.py is needed. When this fails, `transformers serve --trust-remote-code` may do.
    manager = ModelManager(device="cpu", trust_remote_code=True)
    try:
        with pytest.raises(AttributeError, match="STLMForCausalLM"):
            manager.load_model_and_processor(f"{SHIPPED}@main")
    finally:
        manager.shutdown()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), SHIPPED, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("w") as output:
        cache = {"HF_HOME": str(log.parent / "empty")}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | cache)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


def post(url: str, **body) -> str:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return response.read().decode()


def streamed(text: str) -> str:
    """What a stream shows of `text`: the server waits for the rest of a character that the length cuts."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def events(stream: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.fixture(scope="module")
def greedy():
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    assert isinstance(model, STLMForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)

    def text(ids: torch.Tensor, num_bytes: int) -> str:
        new = model.generate(ids, max_new_tokens=num_bytes, do_sample=False, use_cache=False)[0, ids.shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True)

    return tokenizer, text


@pytest.mark.slow
def test_completions_are_the_greedy_text(url, greedy):
    tokenizer, text = greedy
    for prompt in ("The history of the", "Zoë saw 東京 and"):
        expected = text(tokenizer(prompt, return_tensors="pt")["input_ids"], 40)
        request = {"model": SHIPPED, "prompt": prompt, "max_tokens": 40, "temperature": 0}
        answer = json.loads(post(f"{url}/completions", **request))
        assert answer["choices"][0]["text"] == expected
        assert answer["usage"]["prompt_tokens"] == len(prompt.encode())
        stream = events(post(f"{url}/completions", **request, stream=True))
        pieces = [event["choices"][0]["text"] for event in stream]
        assert "".join(pieces) == streamed(expected) and len([piece for piece in pieces if piece]) > 3
    stop = expected[5:8]
    stopped = json.loads(post(f"{url}/completions", **request, stop=[stop]))["choices"][0]
    assert stopped["text"] == expected[: expected.index(stop) + len(stop)]


@pytest.mark.slow
def test_what_cannot_be_served_is_refused_in_words(url):
    request = {"model": SHIPPED, "prompt": "The", "max_tokens": 4}
    for change, words in (
        ({"n": 2}, "n=2 is not supported"),
        ({"logprobs": 0}, "logprobs is not supported"),
        ({"echo": True}, "echo is not supported"),
        ({"prompt": ""}, "prompt is empty"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": -1}, "temperature=-1 must be at least 0"),
        ({"prompt": ["The", "A"]}, "prompt must be a string"),  # by the library
        ({"model": "other"}, "Server is pinned to"),  # by the library
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(f"{url}/completions", **request | change)
        assert refused.value.code in (400, 422) and words in refused.value.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="422"):
        post(f"{url}/chat/completions", model=SHIPPED, messages=[])
    harmless = {"n": 1, "best_of": None, "logprobs": None, "echo": False, "temperature": 0, "user": "me"}
    assert len(json.loads(post(f"{url}/completions", **request | harmless))["choices"][0]["text"]) == 4


@pytest.mark.slow
def test_the_model_is_listed_without_a_cache_of_the_hub(url):
    with urllib.request.urlopen(f"{url}/models", timeout=60) as answer:
        (model,) = json.loads(answer.read())["data"]
    assert model["id"] == SHIPPED and model["status"] == {"value": "loaded"}


@pytest.mark.slow
def test_chat_completions_are_the_greedy_answer(url, greedy):
    tokenizer, text = greedy
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    expected = text(ids, 40)
    request = {"model": SHIPPED, "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    answer = json.loads(post(f"{url}/chat/completions", **request))
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["prompt_tokens"] == ids.shape[1]
    stream = events(post(f"{url}/chat/completions", **request, stream=True))
    pieces = [event["choices"][0]["delta"].get("content") or "" for event in stream]
    assert "".join(pieces) == streamed(expected)


@pytest.mark.slow
def test_the_chat_of_the_library_talks_to_the_server(url, greedy, tmp_path):
    tokenizer, text = greedy
    turn = [{"role": "user", "content": "Good morning"}]
    expected = text(
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"], 30
    )
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", SHIPPED, url]
    command += ["max_new_tokens=30", "do_sample=False", "--user", "me"]
    # The chat uses the client of the Hub, which reaches no server in its offline mode.
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    # After 30 bytes it asks whether to go on: no.
    talk = {"input": "Good morning\nn\n!exit\n", "capture_output": True, "text": True, "cwd": tmp_path, "timeout": 300}
    chat = subprocess.run(command, env=environment, check=False, **talk)
    assert chat.returncode == 0, chat.stderr[-3000:]
    assert " ".join(expected.split()) in " ".join(chat.stdout.split())
