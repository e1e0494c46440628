# SPDX-License-Identifier: Apache-2.0
"""Generation with the steps in ONNX Runtime: PyTorch reads the prompt, three small graphs write the answer.

    export_steps(model, "steps")
    model.generate(**inputs, custom_generate=OnnxSteps("steps"))

`encoder` runs the local encoder and the patching rule, `trunk` runs for rows whose patch ended, `decoder` gives the logits.
There are no modules and no Python between layers. Keys and values stay in place; `trunk` returns those of the new patch
alone. Same logits as `generate` within float32 rounding. A second way to run one byte: it goes when something faster
comes that needs no copy of the model's steps.

Shapes: B rows, R rows whose patch ended, P patches, D byte width, G trunk width, H key/value heads, K head width.
"""

import copy
import hashlib
import json
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import BaseStreamer

from modeling_stlm.batching_stlm import STLMBatch
from modeling_stlm.layers_stlm import ByteRows, rotary_embedding
from modeling_stlm.modeling_stlm import STLMForCausalLM
from modeling_stlm.patching_stlm import PatchState


GRAPHS = ("encoder", "trunk", "decoder")
RULES = ("spacelike", "fixed")  # ONNX has no `searchsorted`, which "vocabulary" needs
BATCH = STLMBatch(num_bytes=1, lengths=None, order=None, num_seen=None, positions=None)
ONE_BYTE = ByteRows(BATCH)


class _ByteStates:
    """Stands for a cache in a graph: inputs that convolutions keep, (B, N, D) by slot."""

    def __init__(self, first_slot: int, states: tuple[torch.Tensor, ...]):
        self.states = dict(enumerate(states, first_slot))

    def update(self, inputs: torch.Tensor, _, slot: int, *, keep: int, lengths=None):
        both = torch.cat([self.states[slot], inputs], dim=1)
        self.states[slot] = both[:, 1:]
        return both, None


class _Encoder(nn.Module):
    """A byte up to its patch. `sums` are those of the open patch with this byte, `kept` those after it."""

    def __init__(self, model: STLMForCausalLM):
        super().__init__()
        self.model = model.model

    def forward(self, ids, context, kept, open_bytes, rule_state, *states):
        model, cache = self.model, _ByteStates(0, states)
        state = model.patcher.fresh_state(1)._replace(open_bytes=open_bytes, rule_state=rule_state)
        context = torch.cat([context, ids], dim=1)
        hidden_states = model.embed_tokens(ids)
        if model.ngram_embedding is not None:
            hidden_states = hidden_states + model.ngram_embedding(context, BATCH)
        for layer in model.local_encoder:
            hidden_states = layer(hidden_states, ONE_BYTE, cache)
        found = model.patcher.find_ends(hidden_states, context, BATCH, state)
        ends, last = found.ends[:, 0], hidden_states[:, 0]
        sums, num_bytes = kept + last, open_bytes + 1
        kept, open_bytes = sums.masked_fill(ends[:, None], 0), num_bytes.masked_fill(ends, 0)
        return ends, last, sums, num_bytes, context[:, 1:], kept, open_bytes, found.rule_state, *cache.states.values()


class _Trunk(nn.Module):
    """Patches that just ended: what bytes see of them (R, D), then their keys and values (R, 1, H, K) of every pass.

    One query per row, so attention is written out: two products for each key head, without a copy of keys and values for
    every query head that shares them.
    """

    def __init__(self, model: STLMForCausalLM):
        super().__init__()
        self.model = model.model

    def forward(self, last, sums, num_bytes, start, *states):
        model, trunk = self.model, self.model.trunk
        mean = sums / num_bytes[:, None]
        patches = model.patcher.patch_proj(torch.cat([mean, last], dim=-1))[:, None]  # (R, 1, G)
        rotary = rotary_embedding(start[:, None], trunk.head_dim, trunk.rope_theta, patches.dtype)
        is_past = torch.arange(states[0].shape[1], device=start.device) < start[:, None]
        bias = torch.where(is_past, 0.0, float("-inf"))  # (R, P)
        bias = torch.cat([bias, torch.zeros_like(bias[:, :1])], dim=1)[:, None, None]
        new = []
        for index, (attention, feed_forward) in enumerate(trunk.schedule):
            block, past = trunk.attention_blocks[attention], states[2 * index : 2 * index + 2]
            query, *made = block.attention.project(block.attention_norm(patches), rotary)  # (R, 1, H, K)
            keys, values = (torch.cat([old, latest], dim=1) for old, latest in zip(past, made))  # (R, P + 1, H, K)
            groups = query[:, 0].unflatten(1, (keys.shape[2], -1)) * block.attention.scaling  # (R, H, queries, K)
            weights = (groups @ keys.permute(0, 2, 3, 1) + bias).softmax(-1)  # (R, H, queries, P + 1)
            output = weights @ values.transpose(1, 2)  # (R, H, queries, K)
            patches = patches + block.attention.o_proj(output.flatten(1)[:, None])
            patches = trunk.feed_forward_blocks[feed_forward](patches)
            new += made
        return model.patcher.byte_proj(trunk.final_norm(patches))[:, 0], *new


class _Decoder(nn.Module):
    def __init__(self, model: STLMForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, last, visible, *states):
        model = self.model.model
        cache = _ByteStates(len(model.local_encoder), states)
        hidden_states = (last + visible)[:, None]
        for layer in model.local_decoder:
            hidden_states = layer(hidden_states, ONE_BYTE, cache)
        return self.model.lm_head(model.final_norm(hidden_states))[:, 0], *cache.states.values()


def _check(model: STLMForCausalLM) -> None:
    if not isinstance(model, STLMForCausalLM):
        raise ValueError(f"steps are those of a STLMForCausalLM, got a {type(model).__name__}")
    if model.model.match_embedding is not None:
        raise ValueError(f"steps in ONNX have no match embeddings, but match_bytes={model.config.match_bytes}")
    if model.config.sharing_lora_rank:
        raise ValueError("steps in ONNX need passes that are equal, with sharing_lora_rank=0")
    if model.model.has_attention or model.config.patching not in RULES:
        raise ValueError(f"steps in ONNX need convolutions at the byte level and patching of {', '.join(RULES)}")


def _fingerprint(model: STLMForCausalLM) -> str:
    """The same for two models with the same configuration and weights."""
    names = (
        "patching",
        "patch_bytes",
        "max_patch_bytes",
        "max_patch_characters",
        "rope_theta",
        "norm_eps",
        "hidden_act",
    )
    settings = [model.config.trunk_schedule, *(getattr(model.config, name) for name in names)]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def export_steps(model: STLMForCausalLM, folder: str | Path, quantize: bool = False) -> None:
    """Write the graphs of one step of `model`, for any number of rows, to `folder`.

    Args:
        quantize (`bool`, defaults to `False`): weights of matrices as 8-bit integers. Then the text may differ.

    Raises:
        ValueError: for a model with attention mixers, or with `patching` of `"vocabulary"` or `"learned"`.
    """
    _check(model)
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, config = copy.deepcopy(model).float(), model.config
    rows, patches, width, keep = 2, 3, config.hidden_size, config.conv_kernel_size - 1
    counts = torch.arange(1, rows + 1)
    sums = torch.zeros(rows, width)
    context = torch.full((rows, model.model.patcher.context_bytes), 97)

    def byte_states(num_layers: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(rows, keep, width) for _ in range(num_layers))

    heads = config.trunk_num_key_value_heads, config.trunk_head_dim
    patch_states = tuple(torch.zeros(rows, patches, *heads) for _ in range(2 * len(config.trunk_schedule)))
    last = torch.zeros(rows, width)
    row, patch = torch.export.Dim("rows", min=1, max=2**20), torch.export.Dim("patches", min=1, max=2**20)
    # No tensor twice and no views: the exporter would take two inputs for one, or leave sizes open.
    small = {"ids": context[:, :1].clone(), "context": context, "kept": sums}
    small |= {"open_bytes": counts, "rule_state": torch.zeros_like(counts)}
    ended = {"last": last, "sums": sums, "num_bytes": counts, "start": counts + 1}
    seen = {"last": last, "visible": last.clone()}
    parts = {
        "encoder": (_Encoder(model), small, byte_states(config.num_local_encoder_layers), {0: row}),
        "trunk": (_Trunk(model), ended, patch_states, {0: row, 1: patch}),
        "decoder": (_Decoder(model), seen, byte_states(config.num_local_decoder_layers), {0: row}),
    }
    for name, (part, inputs, states, open_sizes) in parts.items():
        shapes = {argument: {0: row} for argument in inputs} | {"states": (open_sizes,) * len(states)}
        values = (*inputs.values(), *states)
        program = torch.onnx.export(part.eval(), values, dynamo=True, dynamic_shapes=shapes, verbose=False)
        path = folder / f"{name}.onnx"
        program.save(path)
        if quantize:
            graph = onnx.load(path)
            graph.graph.ClearField("value_info")  # the exporter's shapes disagree with those that are inferred
            quantize_dynamic(graph, path, weight_type=QuantType.QInt8)
    (folder / "steps.json").write_text(json.dumps({"model": _fingerprint(model), "quantized": quantize}))


class OnnxSteps:
    """A decoding loop for `generate(custom_generate=...)`, greedy or sampling, any number of rows.

    Args:
        folder (`str` or `Path`): what [`export_steps`] wrote for the same weights; after more training, export again.
        num_threads (`int`, defaults to 1): of ONNX Runtime; graphs of this size gain nothing from more.
    """

    def __init__(self, folder: str | Path, num_threads: int = 1):
        import onnxruntime

        about = Path(folder) / "steps.json"  # written last
        if not about.is_file():
            raise FileNotFoundError(f"{about} is missing: write it with export_steps(model, {str(folder)!r})")
        self._folder, self._fingerprint = folder, json.loads(about.read_text())["model"]
        self._known = weakref.WeakKeyDictionary()  # models that were compared, with the versions of their weights
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = num_threads
        self._sessions = {}
        for name in GRAPHS:
            path = Path(folder) / f"{name}.onnx"
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self._sessions[name] = session, [argument.name for argument in session.get_inputs()]

    def _check(self, model: STLMForCausalLM) -> None:
        """Compare the weights, unless they were compared and have the same sums since."""
        versions = tuple(float(tensor.detach().double().sum()) for tensor in model.parameters())
        if self._known.get(model) != versions:
            if not isinstance(model, STLMForCausalLM) or _fingerprint(model) != self._fingerprint:
                raise ValueError(f"{self._folder} holds the steps of a model with other weights: export them again")
            self._known[model] = versions

    def _run(self, name: str, *arrays: np.ndarray) -> list[np.ndarray]:
        session, names = self._sessions[name]
        return session.run(None, dict(zip(names, arrays)))

    def __call__(
        self,
        model: STLMForCausalLM,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        **model_kwargs,
    ) -> torch.LongTensor:
        """As the sampling loop of `generate`: ids (B, T) followed by the new ones.

        Raises:
            ValueError: for beams, for outputs other than ids, without a cache, and for a model with other weights, not
                in float32 or not on the CPU.
        """
        if model.dtype != torch.float32 or model.device.type != "cpu":
            raise ValueError(f"OnnxSteps needs a model in float32 on the CPU, got {model.dtype} on {model.device}")
        self._check(model)
        if generation_config.num_beams > 1 or generation_config.return_dict_in_generate:
            raise ValueError(
                "OnnxSteps writes one greedy or sampled text per row and returns ids: no beams, no dictionary"
            )
        if not model_kwargs.get("use_cache", True):
            raise ValueError("OnnxSteps needs use_cache=True")
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        logits = outputs.logits[:, -1].float()
        step = _Step(self, model, outputs.cache)
        pad = generation_config._pad_token_tensor
        has_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
        unfinished = torch.ones(len(input_ids), dtype=torch.long)
        while True:
            scores = logits
            for processor in logits_processor:  # the list itself would look at the signature of each
                scores = processor(input_ids, scores)
            if generation_config.do_sample:
                ids = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
            else:
                ids = scores.argmax(-1)
            if has_end:
                ids = ids * unfinished + pad * (1 - unfinished)
            input_ids = torch.cat([input_ids, ids[:, None]], dim=1)
            if streamer is not None:
                streamer.put(ids)
            unfinished = unfinished & ~stopping_criteria(input_ids, None)
            if not unfinished.any():
                if streamer is not None:
                    streamer.end()
                return input_ids
            logits = torch.from_numpy(step(ids[:, None].numpy()))


class _Step:
    """The states of all rows; a call advances every row by one byte."""

    def __init__(self, steps: OnnxSteps, model: STLMForCausalLM, cache):
        self.run, num_byte_layers = steps._run, model.model.num_byte_layers
        num_encoder = len(model.model.local_encoder)
        bytes_kept = [layer.keys.numpy() for layer in cache.layers[:num_byte_layers]]
        state, patches = PatchState(*cache.layers[num_byte_layers].state), cache.layers[num_byte_layers + 1 :]
        small = (state.last_ids, state.open_sum, state.open_bytes, state.rule_state)
        self.encoder = [tensor.numpy() for tensor in small] + bytes_kept[:num_encoder]
        self.decoder = bytes_kept[num_encoder:]
        self.visible, self.num_patches = state.visible.numpy().copy(), state.num_patches.numpy().copy()
        config = model.config
        shape = len(self.num_patches), 0, config.trunk_num_key_value_heads, config.trunk_head_dim
        empty = torch.empty(shape)
        states = [state for layer in patches for state in (layer.keys, layer.values)]
        self.patches = [(empty if state is None else state.transpose(1, 2)).contiguous().numpy() for state in states]

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Logits (B, V) after `ids` (B, 1)."""
        boundary, last, sums, num_bytes, *self.encoder = self.run("encoder", ids, *self.encoder)
        if boundary.any():
            self._complete(boundary.nonzero()[0], last, sums, num_bytes)
        logits, *self.decoder = self.run("decoder", last, self.visible, *self.decoder)
        return logits

    def _complete(self, rows: np.ndarray, last, sums, num_bytes) -> None:
        start = self.num_patches[rows]
        end = max(1, int(start.max()))  # at least one, which is masked where there is none
        if self.patches[0].shape[1] <= end:
            room = ((0, 0), (0, end + 16), (0, 0), (0, 0))
            self.patches = [np.pad(states, room) for states in self.patches]
        whole = len(rows) == len(self.num_patches)
        past = [states[:, :end] if whole else states[rows, :end] for states in self.patches]
        self.visible[rows], *new = self.run("trunk", last[rows], sums[rows], num_bytes[rows], start, *past)
        for states, patch in zip(self.patches, new):
            states[rows, start] = patch[:, 0]
        self.num_patches[rows] += 1
