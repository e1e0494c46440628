# SPDX-License-Identifier: Apache-2.0
"""Training compiles into one graph, forward and backward, and gives the loss and the gradients of the plain step."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from .tiny import MIXERS, PATCHING, TEXT, ids_of, tiny_model


sys.path.append(str(Path(__file__).parents[1] / "examples"))
IDS = torch.tensor([ids_of(TEXT)[:96], ids_of(TEXT)[20:116], ids_of("ab " * 32)])
POSITIONS = torch.arange(96).expand(3, -1).clone()
POSITIONS[:, 40:] -= 40
POSITIONS[1, 55:] = torch.arange(41)
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0
MASK[1, -5:] = 0
KINDS = {"plain": {}, "padded": {"attention_mask": MASK}, "packed": {"position_ids": POSITIONS}}


def gradients(model, run, num_bytes: int, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = IDS[:, :num_bytes]
    loss = run(ids, labels=ids, **{name: value[:, :num_bytes] for name, value in inputs.items()}).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_compiled_training_is_training(options: dict, inputs: dict, backend, sizes) -> None:
    torch._dynamo.reset()
    model = tiny_model(**options).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for num_bytes in sizes:
        expected = gradients(model, model, num_bytes, inputs)
        for name, gradient in gradients(model, compiled, num_bytes, inputs).items():
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 + 1e-4 * largest, msg=name)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "plain"),
        ({}, "padded"),
        ({}, "packed"),
        (MIXERS["both"], "plain"),
        ({"trunk_window_patches": 1000}, "plain"),
        ({"trunk_window_patches": 1000}, "padded"),
        ({"trunk_window_patches": 80}, "plain"),
        (MIXERS["both"], "packed"),
        (PATCHING["vocabulary"], "padded"),
        (PATCHING["learned"], "packed"),
    ],
    ids=[
        "plain",
        "padded",
        "packed",
        "both mixers",
        "a wide window",
        "a wide window, padded",
        "a window between the lengths",
        "both mixers, packed",
        "vocabulary, padded",
        "learned, packed",
    ],
)
def test_a_training_step_is_one_graph_for_every_length(options, kind):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    assert_compiled_training_is_training(options, KINDS[kind], backend, sizes=(96, 64) if options else (96, 64, 77))
    # `fullgraph` allows no break. The second graph is that of a model that has gradients already.
    assert 1 <= len(graphs) <= 2


@torch._dynamo.config.patch(recompile_limit=8)  # which is set anew
@pytest.mark.parametrize("options", [{}, {"trunk_window_patches": 3}, {"trunk_window_patches": 14}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_compiled_one_by_one_train_the_same(kind, options, monkeypatch):
    pretrain, graphs, compile_module = importlib.import_module("pretrain"), [], torch.nn.Module.compile

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compile_module(self, backend=backend, **o))
    torch._dynamo.reset()
    model, compiled = tiny_model(**options).train(), tiny_model(**options).train()
    pretrain.compile_layers(compiled)
    for num_bytes in (96, 64, 77):
        expected = gradients(model, model, num_bytes, KINDS[kind])
        for name, gradient in gradients(compiled, compiled, num_bytes, KINDS[kind]).items():
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 + 1e-4 * largest, msg=name)
    # One for each kind of layer, which its layers share; those of bytes get another one, for any length.
    assert len(graphs) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kernels_train_the_same(kind):
    assert_compiled_training_is_training({}, KINDS[kind], "inductor", sizes=(96, 64))
