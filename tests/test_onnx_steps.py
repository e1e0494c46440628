# SPDX-License-Identifier: Apache-2.0
"""Steps of generation in ONNX Runtime, against `generate` as it is."""

import copy

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import BaseStreamer

from modeling_stlm import STLMForCausalLM
from modeling_stlm.inference.onnx_steps import OnnxSteps, export_steps

from . import tiny
from .test_examples import ROOT
from .tiny import MIXERS, PATCHING, SHARING, TEXT, batch, ids_of


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:# The axis name")]

ROWS = [ids_of(TEXT)[:40], ids_of("x"), ids_of("Zoë 東京 and more, "), ids_of(TEXT)[5:23]]


def tiny_model(**overrides) -> STLMForCausalLM:
    """The steps have no match embeddings."""
    return tiny.tiny_model(**({"match_bytes": 0} | overrides))


MODELS = {
    "words, middle": {**SHARING["middle"]},
    "fixed, cycle": {**PATCHING["fixed"], **SHARING["cycle"], "ngram_orders": []},
    "n-grams summed": {"ngram_embedding_size": None},
}


@pytest.fixture(scope="module", params=MODELS)
def model_and_steps(request, tmp_path_factory):
    model = tiny_model(**MODELS[request.param])
    folder = tmp_path_factory.mktemp("steps")
    export_steps(model, folder)
    return model, OnnxSteps(folder)


def both(model, steps, rows, seed=0, side="left", **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of `generate` without and with `steps`."""
    options = {"max_new_tokens": 70, "do_sample": False, "eos_token_id": None, "use_cache": True} | options
    texts = []
    for custom in ({}, {"custom_generate": steps}):
        torch.manual_seed(seed)
        texts.append(model.generate(**batch(rows, side), **options, **custom))
    return texts


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2]], ids=["ragged", "one row", "one byte"])
def test_steps_write_the_greedy_text(model_and_steps, rows):
    expected, found = both(*model_and_steps, rows)
    assert torch.equal(found, expected)


def test_steps_sample_as_generate_does(model_and_steps):
    for seed in range(3):
        options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2}
        expected, found = both(*model_and_steps, ROWS, seed, **options)
        assert torch.equal(found, expected)


def test_steps_stop_where_generate_stops(model_and_steps):
    model, steps = model_and_steps
    text = both(model, steps, ROWS)[0][:, 40:]
    ends = [int(text[0, 9]), int(text[2, 30])]
    expected, found = both(model, steps, ROWS, eos_token_id=ends)
    assert torch.equal(found, expected) and found.shape[1] <= 110
    expected, found = both(model, steps, ROWS[:1], eos_token_id=ends[0])
    assert torch.equal(found, expected) and found.shape[1] <= 50
    expected, found = both(model, steps, ROWS[:1], valid_utf8=True)
    assert torch.equal(found, expected)


def test_a_streamer_gets_the_new_ids_and_an_end(model_and_steps):
    model, steps = model_and_steps
    streamer = Collector()
    written = model.generate(
        torch.tensor([ROWS[0]]),
        max_new_tokens=9,
        do_sample=False,
        use_cache=True,
        custom_generate=steps,
        streamer=streamer,
    )
    assert torch.equal(torch.cat(streamer.ids), written[0]) and streamer.has_ended
    with pytest.raises(ValueError, match="takes no streamer"):
        model.generate(torch.tensor([ROWS[0]]), custom_generate=lambda model, input_ids: input_ids, streamer=streamer)


class Collector(BaseStreamer):
    def __init__(self):
        self.ids, self.has_ended = [], False

    def put(self, value):
        self.ids.append(value.flatten())

    def end(self):
        self.has_ended = True


def test_steps_of_weights_that_were_trained_since_are_refused(tmp_path):
    model = tiny_model(use_cache=True)
    export_steps(model, tmp_path)
    steps, ids = OnnxSteps(tmp_path), torch.tensor([ROWS[0]])
    model.generate(ids, max_new_tokens=2, custom_generate=steps)
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(ValueError, match="other weights"):
        model.generate(ids, max_new_tokens=2, custom_generate=steps)


class Follow(LogitsProcessor):
    """Has `text` (B, T) written whatever the logits are, and keeps them."""

    def __init__(self, text: torch.Tensor):
        self.text, self.logits = text, []

    def __call__(self, ids, logits):
        self.logits.append(logits.clone())
        return torch.full_like(logits, -torch.inf).scatter(1, self.text[:, ids.shape[1]][:, None], 0.0)


def test_quantized_logits_stay_close(tmp_path):
    """With trained weights: those of a random model of width 16 have nothing to round to."""
    model = STLMForCausalLM.from_pretrained(ROOT / "examples" / "checkpoints" / "stlm-3m", dtype=torch.float32)
    export_steps(model, tmp_path, quantize=True)
    text = torch.tensor([ids_of(TEXT)[:40]])
    runs = Follow(text), Follow(text)
    for run, custom in zip(runs, ({}, {"custom_generate": OnnxSteps(tmp_path)})):
        options = {"max_new_tokens": 36, "do_sample": False, "eos_token_id": None, "use_cache": True}
        written = model.generate(text[:, :4], **options, **custom, logits_processor=LogitsProcessorList([run]))
        assert torch.equal(written, text)
    exact, rounded = (torch.stack(run.logits) for run in runs)
    errors = (exact - rounded).norm(dim=-1) / exact.norm(dim=-1)
    assert 0 < errors.mean() < 0.05 and errors.max() < 0.3


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = tiny_model().train().bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_steps(model, tmp_path)
    assert model.training and model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_steps_cannot_do_is_said(model_and_steps, tmp_path):
    model, steps = model_and_steps
    with pytest.raises(ValueError, match="no beams"):
        both(model, steps, ROWS, num_beams=2)
    with pytest.raises(ValueError, match="no dictionary"):
        both(model, steps, ROWS, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="use_cache"):
        both(model, steps, ROWS, use_cache=False)
    with pytest.raises(ValueError, match=r"float32 on the CPU, got torch\.bfloat16"):
        both(copy.deepcopy(model).bfloat16(), steps, ROWS)
    other = tiny_model(**SHARING["none"])
    with pytest.raises(ValueError, match="other weights"):
        both(other, steps, ROWS)
    with pytest.raises(FileNotFoundError, match="export_steps"):
        OnnxSteps(tmp_path)
    refused = [(config, "convolutions") for config in (MIXERS["both"], PATCHING["learned"], PATCHING["vocabulary"])]
    for config, reason in [*refused, ({"match_bytes": 3}, "match_bytes=3")]:
        with pytest.raises(ValueError, match=reason):
            export_steps(tiny_model(**config), tmp_path)
    assert not list(tmp_path.iterdir())
