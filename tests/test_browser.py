# SPDX-License-Identifier: Apache-2.0
"""The engine in WebAssembly against the engine of this machine, in node; the page in a headless browser."""

import codecs
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import threading
from functools import partial
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import modeling_stlm
from modeling_stlm.inference.engine import Engine, Rows
from modeling_stlm.inference.export import TYPES, export_gguf

from .test_engine import SHIPPED, step_logits
from .tiny import MIXERS, TEXT, tiny_model


pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="the engine is compiled with cc"),
    pytest.mark.usefixtures("built"),
]

FOLDER = Path(__file__).parents[1] / "examples" / "browser"
PACKAGE = FOLDER / "stlm"
PROMPT = "Zoë saw 東京 and the trunk "


def load(path: Path):
    """The module of a script."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, browser = load(FOLDER / "build.py"), load(FOLDER.parent / "research" / "browser.py")
in_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
in_chromium = pytest.mark.skipif(browser.EXECUTABLE is None, reason="neither chromium nor google-chrome is installed")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A tiny model in every type."""
    model = tiny_model(
        **MIXERS["both"], trunk_hidden_size=64, ngram_embedding_size=32, hidden_size=96, ngram_word_bytes=8
    )
    folder = tmp_path_factory.mktemp("models")
    for type in TYPES:
        export_gguf(model, folder / f"{type}.gguf", type)
    return {type: folder / f"{type}.gguf" for type in TYPES}


@pytest.fixture(scope="module", params=["shipped", "compiled"])
def package(request, tmp_path_factory) -> Path:
    """The package with stlm.wasm as it is in the repository, and as it is compiled here."""
    if request.param == "shipped":
        return PACKAGE
    if shutil.which("emcc") is None:
        pytest.skip("emscripten is not installed")
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(PACKAGE, folder, dirs_exist_ok=True)
    (folder / "stlm.wasm").unlink()
    build.build(folder)
    return folder


def run(package: Path, file: Path, script: str, *arguments: str):
    """What `script` prints, as JSON; it has `engine` of `file`, `Engine`, `print` and `args`."""
    program = (
        f"import {{ Engine }} from {json.dumps((package / 'stlm.mjs').as_uri())};"
        "const [path, ...args] = process.argv.slice(1);"
        "const print = (value) => process.stdout.write(JSON.stringify(value));"
        "const engine = await Engine.load(new URL(path));" + script
    )
    command = ["node", "--input-type=module", "--eval", program, file.as_uri(), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def characters(data: bytes) -> str:
    """Whole characters, and U+FFFD for what is no UTF-8."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


# The package


def test_the_shipped_module_was_compiled_from_the_sources_as_they_are():
    made_from = json.loads((PACKAGE / "stlm.wasm.json").read_text(encoding="utf-8"))
    assert made_from["sources"] == build.digest(), "stlm.c changed: run `python examples/browser/build.py` and commit"
    assert (PACKAGE / "stlm.wasm").stat().st_size < 100_000


def test_the_package_has_its_files_types_and_version():
    package = json.loads((PACKAGE / "package.json").read_text(encoding="utf-8"))
    assert package["version"] == modeling_stlm.__version__
    exports = package["exports"]
    named = [*package["files"], *exports["."].values(), exports["./stlm.wasm"]]
    assert [name for name in named if not (PACKAGE / name).is_file()] == []
    source = (PACKAGE / "stlm.mjs").read_text(encoding="utf-8")
    methods = set(re.findall(r"^  (?:static async |\*|get )?([a-z]\w+)\(.*\) \{$", source, re.MULTILINE))
    methods |= set(re.findall(r"\bthis\.([a-z]\w+) =|, this\.([a-z]\w+)\] =", source)[0]) - {""}
    types = (PACKAGE / "stlm.d.mts").read_text(encoding="utf-8")
    assert len(methods) >= 10
    assert [name for name in methods if not re.search(rf"\b{name}(\(|: )", types)] == []


@in_node
@pytest.mark.parametrize("type", TYPES)
def test_logits_in_webassembly_are_the_same_bits(package, files, type):
    text = TEXT.encode()
    expected = step_logits(Rows(Engine(files[type]), 1), list(text))
    script = """
      const text = new TextEncoder().encode(args[0]), bits = () => [...new Int32Array(engine.logits().buffer)];
      const inPieces = [], inSteps = [];
      for (let end = 7; end <= text.length; end += 7) engine.prompt(text.subarray(0, end)), inPieces.push(bits());
      engine.prompt(text.subarray(0, 1));
      for (const byte of text.subarray(1)) engine.step(byte), inSteps.push(bits());
      print([inPieces, inSteps]);
    """
    pieces, steps = (np.array(a, np.int32).view(np.float32) for a in run(package, files[type], script, TEXT))
    assert np.array_equal(steps, expected[1:])
    assert np.array_equal(pieces, expected[6::7])


@in_node
@pytest.mark.parametrize("type", ["q8", "f32"])
def test_text_written_in_webassembly_is_that_of_the_engine(package, files, type):
    script = """
      const options = { temperature: 0.9, topK: 40, topP: 0.9, minP: 0.01, repetitionPenalty: 1.1, seed: 7 };
      print({
        greedy: [...engine.generate(args[0], 300)],
        sampled: [...engine.generate(args[0], 300, options)],
        stream: [...engine.stream(args[0], 300, options)].join(""),
        completion: engine.complete(args[0], 9),
        empty: [...engine.generate("", 9)],
        none: [...engine.generate(args[0], 0)],
      });
    """
    found, engine = run(package, files[type], script, PROMPT), Engine(files[type])
    options = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "seed": 7}
    sampled = engine.generate(PROMPT, 300, do_sample=True, **options)
    assert bytes(found["greedy"]) == engine.generate(PROMPT, 300)
    assert bytes(found["sampled"]) == sampled and found["stream"] == characters(sampled)
    assert found["completion"] == characters(engine.complete(PROMPT, 9))
    assert bytes(found["empty"]) == engine.generate("", 9) and found["none"] == []


@in_node
def test_a_text_ends_where_the_model_ends_it(tmp_path):
    model, options = tiny_model(), {"temperature": 1.0, "seed": 3}
    export_gguf(model, tmp_path / "goes_on.gguf")
    written = Engine(tmp_path / "goes_on.gguf").generate(b"x", 60, do_sample=True, **options)
    last = next(i for i in range(8, 60) if written[i] not in written[:i])
    model.generation_config.eos_token_id = [written[last], 258]
    export_gguf(model, tmp_path / "ends.gguf")
    script = """
      const [options, write] = [JSON.parse(args[0]), () => [...engine.generate("x", 60, options)]];
      print([write(), write(), [...engine.stream("x", 60, options)].join(""), [...engine.text], engine.endIds]);
    """
    once, again, stream, text, ends = run(PACKAGE, tmp_path / "ends.gguf", script, json.dumps(options))
    assert bytes(once) == bytes(again) == written[:last] and stream == characters(written[:last])
    assert bytes(text) == b"x" + bytes(once) and ends == [written[last], 258]


@in_node
def test_texts_are_those_of_a_fresh_engine_whatever_was_read_before(files):
    random, texts, text = np.random.default_rng(0), [], ""
    long = TEXT * 8  # several pieces with snapshots between them
    for _ in range(60):
        text = text[: int(random.integers(0, len(text) + 1))]
        text += long[len(text) :][: int(random.integers(0, 400))] if random.integers(0, 3) else "ab"
        texts.append(text)
    texts += ["", long, long + "x", long[:600], long + "xy", ""]
    script = """
      const complete = (engine, text) => [engine.complete(text, 5), engine.patches(text).join("") === text];
      const fresh = async (text) => complete(await Engine.load(new URL(path)), text);
      const texts = JSON.parse(args[0]);
      const found = texts.map((text) => complete(engine, text));
      print([found, await Promise.all(texts.map(fresh))]);
    """
    found, expected = run(PACKAGE, files["q8"], script, json.dumps(texts))
    assert found == expected and all(is_text for _, is_text in found) and len({a for a, _ in found}) > 5


@in_node
def test_patches_and_probabilities_are_those_of_the_engine(files):
    script = """
      const patches = engine.patches(args[0]), probabilities = [...engine.nextBytes()];
      print([patches, probabilities, engine.patches(new Uint8Array([0xe6, 0x9d])), engine.patches("\\ufeffa")]);
    """
    patches, probabilities, incomplete, mark = run(PACKAGE, files["f32"], script, TEXT)
    rows, data = Rows(Engine(files["f32"]), 1), TEXT.encode()
    rows.read([data])
    ends = [0, *rows.patch_ends(0), len(data)]
    assert [a.encode() for a in patches] == [data[a:b] for a, b in pairwise(ends)] and len(patches) > 20
    logits = rows.logits()[0].astype(np.float64)
    expected = np.exp(logits - logits.max())
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-4, atol=1e-9)
    assert incomplete == ["\ufffd"] and "".join(mark) == "\ufeffa"


@in_node
def test_wrong_files_and_calls_are_refused_in_words(files, tmp_path):
    data = files["q8"].read_bytes()
    newer = data.replace(b"GGUF\3", b"GGUF\x09", 1)
    flipped = data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]
    bad = {"short": data[:3], "cut": data[:5000], "half": data[: len(data) // 2], "zip": b"PK" + data[2:]}
    bad |= {"newer": newer, "flipped": flipped}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    script = """
      const words = {};
      for (const name of args.slice(1)) {
        await Engine.load(new URL(name, args[0])).catch((error) => (words[name] = error.message));
      }
      const calls = {
        option: () => engine.generate("x", 3, { top_p: 0.5 }),
        range: () => engine.generate("x", 3, { topP: 0 }),
        id: () => engine.step(320),
        stream: () => { for (const _ of engine.stream("x", 99)) engine.prompt("y"); },
      };
      for (const [name, call] of Object.entries(calls)) try { call(); } catch (error) { words[name] = String(error); }
      print({ ...words, after: [...engine.generate("x", 5)] });
    """
    words = run(PACKAGE, files["q8"], script, tmp_path.as_uri() + "/", *bad)
    assert "not a GGUF file" in words["short"] and "not a GGUF file" in words["zip"]
    assert "truncated" in words["cut"] and "damaged or truncated" in words["half"]
    assert "damaged" in words["flipped"] and "version 9 of GGUF" in words["newer"]
    assert "unknown option top_p" in words["option"] and "topP=0 is out of its range" in words["range"]
    assert "an id below 320, got 320" in words["id"] and "another text" in words["stream"]
    assert bytes(words["after"]) == Engine(files["q8"]).generate(b"x", 5)


@in_node
def test_a_module_that_was_not_found_is_looked_for_again(files):
    program = """
      const [module, path, none] = process.argv.slice(1).map((address) => new URL(address));
      const { Engine } = await import(module);
      const words = await Engine.load(path, { wasm: none }).catch((error) => error.message);
      process.stdout.write(JSON.stringify([words, [...(await Engine.load(path)).generate("x", 5)]]));
    """
    addresses = [path.as_uri() for path in (PACKAGE / "stlm.mjs", files["q8"], PACKAGE / "none.wasm")]
    command = ["node", "--input-type=module", "--eval", program, *addresses]
    words, text = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert "none.wasm" in words and bytes(text) == Engine(files["q8"]).generate(b"x", 5)


@in_node
def test_the_snippet_of_the_readme_runs(files):
    readme = (PACKAGE / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```js\n(.*?)```", readme, re.DOTALL)
    body = "".join(line for line in snippet.splitlines(keepends=True) if "import" not in line and "load(" not in line)
    assert run(PACKAGE, files["q8"], body + "print(1)") == 1


# The page


@pytest.fixture
def site(tmp_path):
    """Address of the page, its folder with a model in it, and the paths that were asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    folder = tmp_path / "site"
    shutil.copytree(FOLDER, folder)
    export_gguf(AutoModelForCausalLM.from_pretrained(SHIPPED[-1], dtype=torch.float32), folder / "model.gguf", "q8")
    (folder / "bad.gguf").write_bytes((folder / "model.gguf").read_bytes()[:5000])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html", folder, asked
        server.shutdown()


@in_chromium
def test_the_page_completes_what_is_typed(site, tmp_path):
    address, folder, asked = site
    engine = Engine(folder / "model.gguf")
    ghost = "document.querySelector('#mirror .ghost')?.textContent"

    def completed(text: str) -> str:
        """The completion, as soon as the page has that of `text`."""
        expected = characters(engine.complete(text, 48))
        page.wait(f"window.text?.value === {json.dumps(text)} && {ghost} === {json.dumps(expected)}")
        return expected

    def value(id: str) -> str:
        return page.evaluate(f"document.getElementById({id!r}).value")

    def column(name: str) -> list[str]:
        return page.evaluate(f"[...document.querySelectorAll('#next .{name}')].map((cell) => cell.textContent)")

    with browser.Page(tmp_path / "profile") as page:
        text = "東京: the café and the caf"
        page.open(f"{address}?model=model.gguf&text={quote(text[:14])}")
        completed(text[:14])
        for character in text[14:]:
            page.type(character)
        completed(text)
        rows = Rows(engine, 1)
        rows.read([text.encode()])
        count = len(rows.patch_ends(0))
        assert page.evaluate("document.querySelectorAll('#mirror .odd, #mirror .even').length") == count
        assert value("patches").startswith(f"{len(text.encode())} bytes, {count} patches of ")
        logits = rows.logits()[0].astype(np.float64)
        best = np.argsort(-logits)[:8]
        expected = (np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[best]
        shares = [float(share.strip("<%")) for share in column("value")]
        np.testing.assert_allclose(shares, 100 * expected, atol=0.1)
        assert column("bytes") == [f"{id:02X}" for id in best] and max(best) < 256
        # Bytes that begin a character are shown as the character.
        starts = [i for i, id in enumerate(best) if id >= 0xC0]
        for i in starts:
            lead = bytes([best[i]])
            assert column("character")[i] == characters(lead + engine.generate(text.encode() + lead, 3))[0]
        page.evaluate(f"document.querySelectorAll('#next g')[{starts[0]}].dispatchEvent(new MouseEvent('click'))")
        text += "é"
        completion = completed(text)
        assert re.fullmatch(r"[\d,]+ bytes/s", value("speed"))

        page.press("Tab")
        text += completion
        completion = completed(text)
        page.press("ArrowRight")
        page.wait(f"window.text.value.length > {len(text)}")
        assert (text + completion).startswith(value("text")) and len(value("text")) < len(text + completion)
        page.wait(ghost)
        page.press("Escape")
        assert page.evaluate(ghost) == ""

        page.evaluate("document.getElementById('write').click()")
        page.wait(f"window.text.value.length > {len(value('text')) + 40}")
        page.evaluate("document.getElementById('write').click()")
        page.wait("document.getElementById('write').textContent === 'Write on'")
        page.open(f"{address}?model=bad.gguf")
        page.wait("document.getElementById('message')?.textContent.includes('truncated')")
    assert {path for path in asked if "/stlm/" in path} == {"/stlm/stlm.mjs", "/stlm/stlm.wasm"}
