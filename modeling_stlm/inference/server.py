# SPDX-License-Identifier: Apache-2.0
"""`stlm serve`: completions over HTTP in the format of OpenAI, from the standard library and the engine.

    curl localhost:8000/v1/completions --json '{"prompt": "The history of the", "max_tokens": 100, "stream": true}'

Tokens are bytes, and a prompt may also be a list of ids. All texts of all requests are rows of one batch: a thread reads their
prompts and writes their bytes, a few at a time, and a text that ends makes room for the next one. Rows do not influence each
other, so a text with a `seed` is the same whatever else is written meanwhile. After an empty prompt, which is the default, a
text begins. `usage` counts the ids of prompts, and the bytes returned plus special tokens generated.

Pages of other sites are kept out: they cannot send `application/json`, and a name that was made to point at a loopback
address (the default `--host`) is refused. On other addresses the server answers under every name. Not for the open internet:
there are no keys and no limits on who asks.
"""

import codecs
import errno
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from urllib.parse import quote, unquote

from .engine import Engine, Rows, _Sampling, _written


PROMPT_PIECE, PIECE = 256, 8  # bytes that a row reads, and writes, before the others have their turn
MAX_BODY = 1 << 24
MAX_TEXTS = 128  # of a request
MAX_LENGTH = 1 << 20  # bytes of a prompt and what may be written after it
GRACE = 5  # seconds in which requests are told that the server stops
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
KNOWN = (*OPTIONS, "model", "prompt", "max_tokens", "seed", "stop", "stream", "stream_options", "n", "echo", "user")
NEUTRAL = {  # what clients send of the rest, if it changes nothing
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}


class Refusal(Exception):
    """What is wrong with a request, for an answer with `status`."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.answer = {"error": {"message": message, "type": kind, "param": param, "code": None}}


def stopped() -> Refusal:
    return Refusal("the server has stopped", status=503)


class Text:
    """A text to be written: `put` receives its ids, then its last ids with the reason of its end, or why it failed."""

    def __init__(
        self,
        prompt: Sequence[int],
        sampling: _Sampling,
        seed: int,
        max_bytes: int,
        put: Callable[[Sequence[int], str | Refusal | None], None],
    ):
        self.prompt, self.sampling, self.seed, self.left, self.put = prompt, sampling, seed, max_bytes, put
        self.num_read = 0  # of the prompt
        self.is_cancelled = False

    def is_unread(self) -> bool:
        return self.num_read < len(self.prompt)


class Writer(threading.Thread):
    """Writes all texts of [`Writer.add`] as rows of one batch."""

    def __init__(self, engine: Engine, num_rows: int):
        super().__init__(name="stlm-writer")
        self.rows = Rows(engine, num_rows)
        self.empty = self.rows.take()
        self.nothing = Text(b"", engine.sampling(), 0, 0, None)  # of a row that is free
        self.texts = [self.nothing] * num_rows
        self.waiting: SimpleQueue[Text | None] = SimpleQueue()
        self.adding, self.stopping = threading.Lock(), threading.Event()

    def add(self, text: Text) -> None:
        with self.adding:
            if not self.stopping.is_set():
                self.waiting.put(text)
                return
        text.put(b"", stopped())

    def stop(self) -> None:
        """End the thread, and with it the texts that are being written or wait."""
        with self.adding:
            self.stopping.set()
        self.waiting.put(None)  # wakes the thread
        self.join()

    def run(self) -> None:
        while not self.stopping.is_set():
            try:
                self.admit()
                self.advance()
            except Exception as error:  # whatever it is, texts that come later are written
                traceback.print_exc()
                self.fail(Refusal(f"error: {str(error) or type(error).__name__}", status=500))
        self.fail(stopped())
        while not self.waiting.empty():
            if text := self.waiting.get():
                text.put(b"", stopped())

    def admit(self) -> None:
        """Give free rows to waiting texts, of which one is waited for if all rows are free."""
        for row, text in enumerate(self.texts):
            if text.is_cancelled:
                self.texts[row] = self.nothing
        for row, text in enumerate(self.texts):
            is_idle = all(text is self.nothing for text in self.texts)
            if text is self.nothing and (is_idle or not self.waiting.empty()):
                if (new := self.waiting.get()) is None:
                    return
                self.texts[row] = new
                self.rows.rewind(self.empty, row)

    def advance(self) -> None:
        """Every text reads a piece of its prompt or, after it, writes a few bytes."""
        active = bytearray(text.left > 0 and not text.is_unread() for text in self.texts)
        writing = [row for row, is_writing in enumerate(active) if is_writing]
        if any(text.is_unread() for text in self.texts):
            self.rows.read([text.prompt[text.num_read : text.num_read + PROMPT_PIECE] for text in self.texts])
            for text in self.texts:
                text.num_read += PROMPT_PIECE
        if writing:
            count = min(PIECE, max(self.texts[row].left for row in writing))
            samplings, seeds = zip(*((text.sampling, text.seed) for text in self.texts))
            written = self.rows.write(samplings, seeds, active, count)
            for row in writing:
                self.deliver(row, written[row], has_ended=not active[row])

    def deliver(self, row: int, ids: list[int], has_ended: bool) -> None:
        text = self.texts[row]
        reason = "stop" if has_ended and len(ids) <= text.left else "length" if len(ids) >= text.left else None
        text.put(ids[: text.left], reason)
        text.left -= len(ids)
        if reason:
            self.texts[row] = self.nothing

    def fail(self, refusal: Refusal) -> None:
        for row, text in enumerate(self.texts):
            if text is not self.nothing:
                text.put(b"", refusal)
                self.texts[row] = self.nothing


def parsed(body: bytes):
    """The value of a body of JSON."""
    try:
        return json.loads(body)
    except ValueError as error:
        raise Refusal(f"the body is not JSON: {error}") from None


def field(body: dict, name: str, kinds: type | tuple[type, ...], default, words: str):
    """`body[name]`, or `default` for none; refused unless it is of `kinds`."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise Refusal(f"{name} should be {words}, got {json.dumps(value)[:80]}", name)
    return value


def prompts_of(body: dict, vocab_size: int) -> list[Sequence[int]]:
    """The prompts of a request, as bytes or as ids."""
    words = "a string, a list of ids, or a list of such"
    given = field(body, "prompt", (str, list), "", words)
    if given == []:
        raise Refusal("prompt is an empty list, expected at least one text", "prompt")
    prompts = [given] if isinstance(given, str) or _are_ids(given) else given
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not _are_ids(prompt):
            raise Refusal(f"prompt should be {words}, got {json.dumps(prompt)[:80]}", "prompt")
        prompts[i] = prompt = _encoded(prompt) if isinstance(prompt, str) else prompt
        if prompt and not 0 <= min(prompt) <= max(prompt) < vocab_size:
            found = f"{str(min(prompt))[:20]} to {str(max(prompt))[:20]}"
            raise Refusal(f"prompt has ids from {found}, expected 0 to {vocab_size - 1}", "prompt")
    return prompts


def stops_of(body: dict) -> list[bytes]:
    words = "a string or a list of strings"
    given = field(body, "stop", (str, list), [], words)
    stops = given if isinstance(given, list) else [given]
    for stop in stops:
        if not isinstance(stop, str):
            raise Refusal(f"stop should be {words}, got {json.dumps(stop)[:80]}", "stop")
        if not stop:
            raise Refusal("stop has an empty string, at which every text would stop: leave it out", "stop")
    return [_encoded(stop) for stop in stops]


class Completion:
    """A request to `/v1/completions`: its texts, and the answer."""

    def __init__(self, engine: Engine, model: str, body: dict):
        if not isinstance(body, dict):
            raise Refusal("the body should be a JSON object")
        for name, value in body.items():
            if name not in KNOWN and value not in NEUTRAL.get(name, ()):
                raise Refusal(f"this server does not know {name}={json.dumps(value)[:80]}", name)
        if field(body, "model", str, model, "a string") != model:
            raise Refusal(f"this server has the model {model}, not {body['model'][:80]}", "model", 404)
        prompts, self.stops = prompts_of(body, engine.vocab_size), stops_of(body)
        number, whole = "a number", "an integer"
        copies, max_bytes = (
            field(body, name, int, default, whole) for name, default in (("n", 1), ("max_tokens", 16))
        )
        if not 1 <= copies * len(prompts) <= MAX_TEXTS:
            raise Refusal(f"{len(prompts)} prompts times n={copies} should be 1 to {MAX_TEXTS} texts", "n")
        longest = max(map(len, prompts))
        if not 1 <= max_bytes <= MAX_LENGTH - longest:
            most = f"{MAX_LENGTH} less the {longest} bytes of the prompt"
            raise Refusal(
                f"max_tokens should be at least 1 and at most {most}, got {str(max_bytes)[:20]}", "max_tokens"
            )
        kinds = dict.fromkeys(OPTIONS, ((int, float), number)) | {"top_k": (int, whole)}
        options = {name: field(body, name, kind, None, words) for name, (kind, words) in kinds.items()}
        options = {name: value for name, value in options.items() if value is not None}
        do_sample = options.get("temperature") != 0
        if not do_sample:
            del options["temperature"]
        try:
            sampling = engine.sampling(do_sample, **options)
        except (OverflowError, ValueError) as error:
            raise Refusal(str(error)) from None
        seed = field(body, "seed", int, int.from_bytes(os.urandom(8), "little"), whole)
        self.model = model
        self.stream = field(body, "stream", bool, False, "true or false")
        self.echo = field(body, "echo", bool, False, "true or false")
        stream_options = field(body, "stream_options", dict, {}, "an object")
        if stream_options.keys() - {"include_usage"}:
            raise Refusal("of stream_options, this server knows include_usage", "stream_options")
        self.include_usage = field(stream_options, "include_usage", bool, False, "true or false")
        self.num_read = sum(map(len, prompts))  # once, however many texts follow
        self.num_written = 0  # bytes and special tokens so far
        self.prompts = [prompt for prompt in prompts for _ in range(copies)]
        self.refusal: Refusal | None = None
        self.events: SimpleQueue[tuple[int, Sequence[int], str | Refusal | None]] = SimpleQueue()
        self.texts = [
            Text(prompt or [engine.bos_token_id], sampling, (seed + i) % 2**64, max_bytes, self.receiver(i))
            for i, prompt in enumerate(self.prompts)
        ]
        self.head = {"id": f"cmpl-{os.urandom(12).hex()}", "object": "text_completion", "created": int(time.time())}

    def receiver(self, i: int) -> Callable[[Sequence[int], str | Refusal | None], None]:
        def put(ids: Sequence[int], reason: str | Refusal | None) -> None:
            if isinstance(reason, Refusal):
                self.refusal = reason  # known at once, however much is still to be sent
            self.events.put((i, ids, reason))

        return put

    def pieces(self, check: Callable[[], None]) -> Iterator[tuple[int, str, str | None]]:
        """Index of a text, what was written of it, and, at its end, the reason. Calls `check` at least once a second."""
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in self.texts]
        held, num_open = [b""] * len(self.texts), len(self.texts)
        if self.echo:
            yield from ((i, _written(prompt).decode(errors="replace"), None) for i, prompt in enumerate(self.prompts))
        while num_open:
            check()
            if self.refusal is not None:
                raise self.refusal
            try:
                i, ids, reason = self.events.get(timeout=1)
            except Empty:
                continue
            if self.texts[i].is_cancelled:
                continue
            if isinstance(reason, Refusal):
                continue
            piece = _written(ids)
            written, held[i], is_stopped = cut(held[i] + piece, self.stops)
            if is_stopped:
                self.texts[i].is_cancelled, reason = True, "stop"
            elif reason:
                written += held[i]
            num_open -= reason is not None
            self.num_written += len(written) + len(ids) - len(piece)
            text = decoders[i].decode(written, final=reason is not None)
            if text or reason:
                yield i, text, reason

    def cancel(self) -> None:
        for text in self.texts:
            text.is_cancelled = True

    def chunk(self, i: int, text: str, reason: str | None) -> dict:
        choice = {"text": text, "index": i, "logprobs": None, "finish_reason": reason}
        return self.head | {"model": self.model, "choices": [choice]}

    def usage(self) -> dict:
        read, written = self.num_read, self.num_written
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def answer(self, check: Callable[[], None]) -> dict:
        texts, reasons = [""] * len(self.texts), [""] * len(self.texts)
        for i, text, reason in self.pieces(check):
            texts[i] += text
            reasons[i] = reason
        choices = [self.chunk(i, text, reasons[i])["choices"][0] for i, text in enumerate(texts)]
        return self.head | {"model": self.model, "choices": choices, "usage": self.usage()}

    def chunks(self, check: Callable[[], None]) -> Iterator[dict]:
        """Every piece and, if asked for, the usage, for which the pieces then have a field."""
        no_usage = {"usage": None} if self.include_usage else {}
        for piece in self.pieces(check):
            yield self.chunk(*piece) | no_usage
        if self.include_usage:
            yield self.head | {"model": self.model, "choices": [], "usage": self.usage()}


def cut(text: bytes, stops: list[bytes]) -> tuple[bytes, bytes, bool]:
    """What of `text` comes before the first of `stops`, what may be the beginning of one, and whether there was one."""
    places = [at for stop in stops if (at := text.find(stop)) >= 0]
    if places:
        return text[: min(places)], b"", True
    held = max(
        (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - held], text[len(text) - held :], False


def _are_ids(value) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)  # true and false are none


def _encoded(prompt: str) -> bytes:
    return prompt.encode(errors="replace")  # JSON may hold halves of surrogate pairs


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body that waits for the acknowledgement of its headers takes 40 ms more
    has_ended = False  # the input of the client
    server: "Server"

    def log_message(self, *message):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has gone
            self.close_connection = True

    def send(self, answer: dict, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.has_body():
            self.close_connection = True  # the body is not read
        try:
            self.check_host()
        except Refusal as refusal:
            self.refuse(refusal)
            return
        model = {"id": self.server.model, "object": "model", "created": self.server.created, "owned_by": "stlm"}
        answers = {"/health": {"status": "ok"}, "/v1/models": {"object": "list", "data": [model]}}
        names = {"errors": "surrogateescape"}  # of files may be any bytes
        answers[f"/v1/models/{quote(self.server.model, **names)}"] = model
        path = quote(unquote(self.path, **names), **names)  # however it was written
        if path in answers:
            self.send(answers[path])
        else:
            self.refuse(Refusal(f"there is nothing at {self.path[:80]}: GET {', '.join(answers)}", status=404))

    def do_POST(self):
        try:
            completion = self.read_completion()
        except Refusal as refusal:
            self.refuse(refusal)
            return
        self.server.answering.add(completion)
        try:
            for text in completion.texts:
                self.server.writer.add(text)
            if completion.stream:
                self.send_events(completion)
            else:
                # Clients pass over interim answers since HTTP/1.1. For those of before, a text is written to its end.
                probe = b"" if self.request_version == "HTTP/1.0" else b"HTTP/1.1 100 Continue\r\n\r\n"
                self.send(completion.answer(lambda: self.check(probe)))
        except Refusal as refusal:
            self.refuse(refusal)
        finally:
            completion.cancel()
            self.server.answering.discard(completion)

    def has_body(self) -> bool:
        return "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"

    def check(self, probe: bytes) -> None:
        """Raise `ConnectionError` if the client has gone.

        One that has ended its input may still wait for the answer: it passes over `probe`, which the system of one that
        has gone refuses.
        """
        if error := self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise ConnectionAbortedError(error, os.strerror(error))
        if self.has_ended:
            return
        self.connection.setblocking(False)
        try:
            self.has_ended = not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            pass
        finally:
            self.connection.setblocking(True)
        if self.has_ended:
            self.wfile.write(probe)

    def check_host(self) -> None:
        """Refuse a request to a name that is not ours: it comes from a page whose own name was made to point here."""
        host = self.headers.get("Host")
        if host is not None and not self.server.names.fullmatch(host):
            self.close_connection = True  # the body is not read
            raise Refusal(
                f"this server answers to its address and to localhost, not to the name {host[:80]}: --host 0.0.0.0 serves "
                "under every name",
                status=403,
            )

    def read_completion(self) -> Completion:
        self.check_host()
        size = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not size.isdecimal():
            self.close_connection = True
            raise Refusal("the body should come in one piece, with its Content-Length", status=411)
        if len(size) > len(str(MAX_BODY)) or int(size) > MAX_BODY:
            self.close_connection = True
            raise Refusal(f"the body should have a Content-Length of at most {MAX_BODY} bytes", status=413)
        body = self.rfile.read(int(size))
        if self.path != "/v1/completions":
            raise Refusal(f"there is nothing at {self.path[:80]}: POST /v1/completions", status=404)
        if self.headers.get_content_type() != "application/json":  # which browsers let no page of another origin send
            kind = self.headers.get("Content-Type", "none")[:80]
            raise Refusal(
                f"the Content-Type should be application/json, got {kind}: `curl --json` sends it", status=415
            )
        try:
            return Completion(self.server.engine, self.server.model, parsed(body))
        except RecursionError:  # of reading, or of quoting what could just be read
            raise Refusal("the body is nested too deeply") from None

    def refuse(self, refusal: Refusal) -> None:
        self.send(refusal.answer, refusal.status)

    def send_events(self, completion: Completion) -> None:
        self.close_connection = True  # the end of the answer is that of the connection
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for chunk in completion.chunks(lambda: self.check(b":\n\n")):  # a comment
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        except Refusal as refusal:  # in the middle of the answer
            self.wfile.write(f"data: {json.dumps(refusal.answer)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")


class Server(ThreadingHTTPServer):
    """Serves `engine` at `host` and `port` (0: any) from [`Server.serve_forever`] to [`Server.server_close`]."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, engine: Engine, host: str, port: int, num_rows: int):
        self.engine, self.model, self.created = engine, Path(engine.path).stem, int(time.time())
        self.writer = Writer(engine, num_rows)
        self.writer.start()
        self.answering: set[Completion] = set()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)  # closes the server if it fails
        # What `Host` may say. A name can be made to point at a loopback address by anybody; an address is itself.
        is_local = self.server_address[0].startswith("127.") or self.server_address[0] == "::1"
        names = rf"(localhost|{re.escape(host)}|[\d.]+|\[[\da-f:.]+\])(:\d+)?" if is_local else ".*"
        self.names = re.compile(names, re.IGNORECASE)

    def server_close(self):
        super().server_close()
        self.writer.stop()
        deadline = time.monotonic() + GRACE
        while self.answering and time.monotonic() < deadline:
            time.sleep(0.01)


def tell(line: str) -> None:
    """Print a line; to nobody where standard output is closed, as of a service that is started so."""
    try:
        print(line, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def serve(engine: Engine, host: str, port: int, num_rows: int) -> None:
    try:
        server = Server(engine, host, port, num_rows)
    except OSError as error:
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        expected = "a free --port, or 0 for any" if is_port else "a --host of this machine"
        raise ValueError(f"{host}:{port}: {error.strerror}. Expected {expected}") from None
    with server:
        # Not in this thread: an interrupt (Ctrl-C) would shut a connection that has just been handed on.
        loop = threading.Thread(target=server.serve_forever, name="stlm-server", daemon=True)
        loop.start()
        try:
            tell(f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/v1")
            while loop.is_alive():
                loop.join(1)  # on Windows, a wait without an end cannot be interrupted
            raise RuntimeError("the server has ended by itself")  # after the traceback of its thread
        finally:
            server.shutdown()
