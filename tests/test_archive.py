# SPDX-License-Identifier: Apache-2.0
"""`stlm zip`: what is packed comes back, on every CPU, and nothing else does."""

import ctypes
import io
import math
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_stlm.inference.archive import (
    CONTEXT,
    HEADER_SIZE,
    SEGMENT,
    Coder,
    output,
    pack,
    pack_file,
    unpack,
    unpack_file,
)
from modeling_stlm.inference.engine import Engine, Rows
from modeling_stlm.inference.export import export_gguf

from .test_engine import isas
from .tiny import MIXERS, PATCHING, TEXT, tiny_model


pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="the engine is compiled with cc"),
    pytest.mark.usefixtures("built"),
]

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "checkpoints" / "stlm-3m"
SHAKESPEARE = (ROOT / "examples" / "data" / "shakespeare.txt").read_bytes()
RANDOM = random.Random(0).randbytes(20_000)
CONTENTS = {
    "nothing": b"",
    "one byte": b"\xff",
    "a short text": TEXT.encode(),
    "a segment": SHAKESPEARE[:SEGMENT],
    "less than a segment": SHAKESPEARE[: SEGMENT - 1],
    "more than a segment": SHAKESPEARE[: SEGMENT + 1],
    "segments": SHAKESPEARE[: 3 * SEGMENT],
    "zeros": bytes(5000),
    "all bytes": bytes(range(256)) * 9,
    "random bytes": RANDOM,
    "text, random bytes, text": SHAKESPEARE[:3000] + RANDOM[:5000] + SHAKESPEARE[3000:6000],
}


@pytest.fixture(scope="module")
def engine(built, tmp_path_factory) -> Engine:
    path = tmp_path_factory.mktemp("model") / "3m.gguf"
    export_gguf(AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32), path, "q8")
    return Engine(path)


def packed(engine: Engine, content: bytes) -> bytes:
    archive = io.BytesIO()
    lengths = pack(engine, io.BytesIO(content), archive)
    assert lengths == (len(content), len(archive.getvalue()))
    return archive.getvalue()


def unpacked(engine: Engine, archive: bytes) -> bytes:
    content = io.BytesIO()
    assert unpack(engine, archive, content) == len(content.getvalue())
    return content.getvalue()


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_packed_comes_back_and_is_hardly_ever_longer(engine, name):
    content = CONTENTS[name]
    archive = packed(engine, content)
    assert unpacked(engine, archive) == content
    assert len(archive) <= len(content) + 64
    if name == "random bytes":
        assert len(archive) <= len(content) + 32  # the flags of stored segments cost a few bytes together


def test_a_text_takes_hardly_more_bits_than_its_scores_say(engine):
    content, bits = SHAKESPEARE[: 20 * SEGMENT], 0.0
    for at in range(0, len(content), SEGMENT):
        rows = Rows(engine, 1)
        rows.read([[engine.bos_token_id, *content[max(0, at - CONTEXT) : at]]])
        bits -= float(rows.score([content[at : at + SEGMENT]])[0].sum()) / math.log(2)
    # Repetition saves some; kinds of segments, checksums and rounding take little.
    assert 0.9 * bits / 8 < len(packed(engine, content)) < 1.001 * bits / 8 + 40


def test_a_long_text_comes_back(engine):
    content = SHAKESPEARE[:300_000]
    archive = packed(engine, content)
    assert len(archive) < 0.32 * len(content)
    assert unpacked(engine, archive) == content


def test_what_was_there_before_takes_next_to_nothing(engine):
    log = b"".join(b"2026-11-%02d error in unit %d\n" % (i % 28 + 1, i % 7) for i in range(100))
    content = SHAKESPEARE[:3000] + log + RANDOM[:3000]
    once, twice = (len(packed(engine, text)) for text in (content, content + content))
    assert twice - once < 0.03 * len(content)  # above all for bytes at random, which the model expects least


@pytest.mark.parametrize("type", ["f32", "q8", "q4_0"])
def test_archives_are_the_same_with_all_instructions_and_read_by_all(type, tmp_path):
    export_gguf(tiny_model(**MIXERS["both"], **PATCHING["learned"], hidden_size=32), tmp_path / "m.gguf", type)
    engines = [Engine(tmp_path / "m.gguf", isa) for isa in isas()]
    content = SHAKESPEARE[:2000] + RANDOM[:1000] + TEXT.encode() + SHAKESPEARE[:1000]
    archives = {packed(engine, content) for engine in engines}
    assert len(archives) == 1
    for engine in engines:
        assert unpacked(engine, *archives) == content


def test_every_flipped_bit_and_every_lost_byte_is_noticed(engine):
    archive = packed(engine, TEXT.encode())
    for at in range(len(archive)):
        for bit in range(8):
            flipped = bytearray(archive)
            flipped[at] ^= 1 << bit
            with pytest.raises(ValueError, match=r"not an archive|version|damaged"):
                unpacked(engine, bytes(flipped))
        with pytest.raises(ValueError, match=r"not an archive|truncated"):
            unpacked(engine, archive[:at])
    with pytest.raises(ValueError, match="damaged"):
        unpacked(engine, archive + b"\0")


def test_archives_of_another_model_are_refused_by_name(engine, tmp_path):
    export_gguf(tiny_model(), tmp_path / "tiny.gguf", "q8")
    with pytest.raises(ValueError, match=r"another model than .*tiny\.gguf"):
        unpacked(Engine(tmp_path / "tiny.gguf"), packed(engine, b"x"))


def test_an_archive_belongs_to_the_model_that_was_loaded_not_to_the_name_of_its_file(engine, tmp_path):
    path, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    shutil.copy(engine.path, path)
    loaded = Engine(path)
    export_gguf(tiny_model(), other, "q8")
    os.replace(other, path)
    assert unpacked(engine, packed(loaded, b"abc")) == b"abc"
    loaded = Engine(path)
    path.write_bytes(engine.path.read_bytes())
    with pytest.raises(ValueError, match=r"m\.gguf was overwritten after it was loaded"):
        packed(loaded, b"abc")


def test_a_source_may_read_less_than_it_is_asked_for(engine):
    class Pipe(io.BytesIO):
        def read(self, size):
            return super().read(min(size, 100))

    archive, content = io.BytesIO(), SHAKESPEARE[: SEGMENT + 300]
    assert pack(engine, Pipe(content), archive)[0] == len(content)
    assert unpacked(engine, archive.getvalue()) == content


def test_outputs_replace_files_and_nothing_else(tmp_path):
    part, real, link = tmp_path / "x.part", tmp_path / "real", tmp_path / "link"
    part.write_bytes(b"mine")
    with output(str(tmp_path / "x")) as file:
        file.write(b"content")
    assert part.read_bytes() == b"mine" and (tmp_path / "x").read_bytes() == b"content"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to("real")
    with output(str(link)) as file:
        file.write(b"new")
    assert link.is_symlink() and real.read_bytes() == b"new" and real.stat().st_mode & 0o777 == 0o640
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit((tmp_path / "pipe").read_bytes)
        with output(str(tmp_path / "pipe")) as file:
            file.write(b"through")
        assert read.result() == b"through" and (tmp_path / "pipe").is_fifo()
    with open(os.devnull, "wb") as sink, output(f"/dev/fd/{sink.fileno()}") as file:
        file.write(b"nowhere")
    with pytest.raises(KeyError), output(str(tmp_path / "x")) as file:
        raise KeyError
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.part", "y", "real", "link", "pipe"}


def test_a_file_is_not_replaced_by_its_own_archive(engine, tmp_path):
    text, link = tmp_path / "text", tmp_path / "link"
    text.write_bytes(b"a text")
    link.symlink_to(text)
    for act in (pack_file, unpack_file):
        for target in (text, link):
            with pytest.raises(ValueError, match="are the same file"):
                act(engine, str(text), str(target))
    assert text.read_bytes() == b"a text" and link.is_symlink()


def test_a_model_without_all_bytes_is_refused(tmp_path):
    export_gguf(tiny_model(vocab_size=200, bos_token_id=1, pad_token_id=0, eos_token_id=2), tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="200 ids, expected all 256 bytes"):
        Coder(Engine(tmp_path / "m.gguf"))


def test_any_code_is_decoded_to_something_or_refused(engine):
    # Not reached through `unpack`, which compares checksums first.
    draw, refused = random.Random(1), 0
    for size in [0, 1, 7, 8, 9, *(draw.randrange(400) for _ in range(20))]:
        coder, length = Coder(engine, (ctypes.c_char * size)(*draw.randbytes(size))), SEGMENT
        try:
            while length == SEGMENT:
                length = len(coder.decode())
        except ValueError as error:
            refused += "ends before its content" in str(error)
    assert refused > 10


def test_the_command_packs_files_and_streams(engine, engine_build, tmp_path):
    def stlm(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "stlm_command", *arguments, "--model", engine.path]
        environment = os.environ | {"PYTHONPATH": str(engine_build)}
        return subprocess.run(command, cwd=tmp_path, env=environment, input=given, capture_output=True)

    content = SHAKESPEARE[:2500]
    (tmp_path / "in.txt").write_bytes(content)
    run = stlm("zip", "in.txt", "in.stlz")
    assert run.returncode == 0 and b"2,500 -> " in run.stderr and b"bits per byte" in run.stderr
    assert (tmp_path / "in.stlz").read_bytes() == packed(engine, content)
    assert stlm("unzip", "in.stlz", "out.txt").returncode == 0 and (tmp_path / "out.txt").read_bytes() == content
    archive = stlm("zip", "-", "-", given=content).stdout
    assert stlm("unzip", "-", "-", given=archive).stdout == content
    # A fault leaves no file, and one that was there stays as it was.
    (tmp_path / "bad.stlz").write_bytes(archive[:-9])
    for target in ("new.txt", "out.txt"):
        run = stlm("unzip", "bad.stlz", target)
        assert run.returncode == 1 and b"truncated or damaged" in run.stderr and run.stderr.count(b"\n") == 1
    assert stlm("zip", "none.txt", "new.txt").returncode == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.stlz", "in.stlz", "in.txt", "out.txt"]
    assert (tmp_path / "out.txt").read_bytes() == content


def test_headers_are_small(engine):
    assert len(packed(engine, b"")) <= HEADER_SIZE + 10
