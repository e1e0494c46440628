# SPDX-License-Identifier: Apache-2.0
"""Graphs from the exporters of transformers, run by torch.export, ONNX Runtime and ExecuTorch, against the model."""

import sys

import pytest
import torch
from transformers.exporters import (
    DynamoConfig,
    DynamoExporter,
    ExecutorchConfig,
    ExecutorchExporter,
    ExportedModel,
    OnnxConfig,
    OnnxExporter,
)

from modeling_stlm import STLMForSequenceClassification, STLMTokenizer

from .test_examples import ROOT
from .tiny import MIXERS, PATCHING, SHARING, TEXT, assert_equal, batch, ids_of, randomize, tiny_config, tiny_model


sys.path.insert(0, str(ROOT / "examples"))
import export_onnx


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of the exporters, about names in torch
]

SAMPLE = [ids_of(TEXT)[:31], ids_of("A short one. ")]
OTHERS = [
    [ids_of("x"), ids_of(TEXT)[3:80], ids_of("Zoë 東京 and more, ")],
    [ids_of("One two three four")],
    [ids_of(TEXT)[i : i + 20] for i in range(4)],
]


def exported(model, backend: str, **config) -> ExportedModel:
    exporter, settings = {"dynamo": (DynamoExporter, DynamoConfig), "onnx": (OnnxExporter, OnnxConfig)}[backend]
    return exporter().export(model, dict(batch(SAMPLE, "right")), settings(dynamic=True, **config))


@torch.no_grad()
def assert_same_logits(graph: ExportedModel, model: torch.nn.Module, rows: list[list[int]]) -> None:
    for side in ("left", "right"):
        inputs = batch(rows, side)
        found, expected = graph(**inputs).logits, model(**inputs, use_cache=False).logits
        if expected.ndim == 3:
            found, expected = (logits[inputs["attention_mask"] == 1] for logits in (found, expected))
        assert_equal(found, expected)


@pytest.mark.parametrize("patching", ["fixed", "vocabulary", "learned"])
def test_a_graph_of_torch_takes_batches_of_any_shape(patching):
    model = tiny_model(use_cache=False, **MIXERS["both"], **PATCHING[patching], **SHARING["cycle"])
    graph = exported(model, "dynamo")
    for rows in (SAMPLE, *OTHERS):
        if len(rows) > 1:  # torch.export takes sizes of 1 for constants
            assert_same_logits(graph, model, rows)


def test_a_graph_of_onnx_takes_batches_of_any_shape(tmp_path):
    config = tiny_config(is_causal=False, num_labels=3, **MIXERS["both"])
    model = randomize(STLMForSequenceClassification(config)).eval()
    model.score.weight.data.mul_(4)  # means over bytes are small
    exported(model, "onnx").save_pretrained(tmp_path)
    graph = ExportedModel.from_pretrained(tmp_path)
    for rows in (SAMPLE, *OTHERS):
        assert_same_logits(graph, model, rows)


def test_executorch_has_the_logits_of_the_model():
    model = tiny_model(use_cache=False, num_trunk_layers=1)
    ids = torch.tensor([ids_of(TEXT)[:40], ids_of(TEXT)[20:60]])
    graph = ExecutorchExporter().export(model, {"input_ids": ids}, ExecutorchConfig())
    ids = ids.flip(0)
    with torch.no_grad():
        assert_equal(graph(input_ids=ids).logits, model(ids).logits)


class Recorder:
    """Runs a graph and keeps the last logits."""

    def __init__(self, runner, logits: list[torch.Tensor]):
        self.runner, self.logits = runner, logits

    def __call__(self, **kwargs):
        outputs = self.runner(**kwargs)
        self.logits.append(outputs.logits[:, -1])
        return outputs


def test_onnx_runtime_writes_the_bytes_of_generate(tmp_path, capsys, monkeypatch):
    model = tiny_model(use_cache=True, **MIXERS["both"], **SHARING["cycle"])
    model.save_pretrained(tmp_path / "model")
    STLMTokenizer().save_pretrained(tmp_path / "model")
    command = ["export_onnx.py", "--checkpoint", str(tmp_path / "model"), "--output", str(tmp_path / "onnx")]
    monkeypatch.setattr(sys, "argv", [*command, "--max_length", "128", "--num_bytes", "40"])
    export_onnx.main(export_onnx.parse_arguments())
    assert "bytes a second" in capsys.readouterr().out
    graphs = ExportedModel.from_pretrained(tmp_path / "onnx")
    runners = graphs.runners
    # Steps across patches, from prompts that end inside of one and at its end.
    for rows in (SAMPLE, *OTHERS):
        inputs, logits = batch(rows, "left"), []
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
        expected = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        graphs._runners = {name: Recorder(runner, logits) for name, runner in runners.items()}
        assert torch.equal(export_onnx.generate(graphs, **inputs, num_bytes=24), expected.sequences[:, -24:])
        assert_equal(torch.stack(logits), torch.stack(expected.logits))


def test_a_prompt_longer_than_the_graphs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export_onnx.py", "--output", str(tmp_path / "onnx"), "--max_length", "50"])
    with pytest.raises(SystemExit, match="do not fit in --max_length 50"):
        export_onnx.main(export_onnx.parse_arguments())
    assert not (tmp_path / "onnx").exists()
