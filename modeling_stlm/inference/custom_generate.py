# SPDX-License-Identifier: Apache-2.0
"""The engine in place of a model in `generate`: the only part of it that imports torch and transformers."""

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput, GenerationMode

from .engine import Engine, Rows
from .export import check, fingerprint


def check_call(
    engine: Engine, model: PreTrainedModel, generation_config: GenerationConfig, model_kwargs: dict
) -> None:
    """Raise a `ValueError` unless the file is that of `model` and its options are known here."""
    check(model)
    # What writes through `tensor.data` is not noticed after the first call.
    versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in model.parameters()]
    if engine._known.get(model) != versions:
        if fingerprint(model) not in engine._sources:
            raise ValueError(f"{engine.path} was exported from a model with other weights: export this one")
        engine._known[model] = versions
    cache = model_kwargs.get("cache")
    mode = generation_config.get_generation_mode()
    refused = {
        f"generation mode {mode.value}": mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None,
        "a filled cache": cache is not None and int(cache.get_seq_length()) > 0,
        "dropout (call eval())": model.training and (model.config.hidden_dropout or model.config.attention_dropout),
        "output_attentions": generation_config.output_attentions,
        "output_hidden_states": generation_config.output_hidden_states,
    }
    if names := [name for name, is_asked in refused.items() if is_asked]:
        raise ValueError(f"the engine does not know {', '.join(names)}: leave out custom_generate")


def write_with(
    engine: Engine,
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_kwargs,
) -> torch.LongTensor | GenerateDecoderOnlyOutput:
    """The sampling loop of `generate`, with the engine in place of the model, which computes as one in float32.

    `tokenizer` is for stop strings, of which `generate` makes stopping criteria.

    Raises:
        ValueError: for a model with other weights than the file, and for what the engine cannot do, by name.
    """
    check_call(engine, model, generation_config, model_kwargs)
    device, mask = input_ids.device, model_kwargs.get("attention_mask")
    given = input_ids.cpu().numpy()
    valid = np.ones(given.shape, bool) if mask is None else mask.cpu().numpy() != 0
    positions = model_kwargs.get("position_ids")
    if positions is not None and positions.shape[-1] == given.shape[1]:
        steps = np.diff(np.broadcast_to(positions.cpu().numpy(), given.shape))
        if (steps[valid[:, 1:] & valid[:, :-1]] != 1).any():
            raise ValueError("position_ids restart, but a row of the engine is one document")
    rows = Rows(engine, len(given))
    rows.read([ids[is_valid] for ids, is_valid in zip(given, valid)])
    pad, kept = generation_config._pad_token_tensor, generation_config.return_dict_in_generate
    keeps_scores, keeps_logits = kept and generation_config.output_scores, kept and generation_config.output_logits
    all_scores, all_logits = () if keeps_scores else None, () if keeps_logits else None
    has_end = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
    unfinished = torch.ones(len(given), dtype=torch.long, device=device)
    while True:
        logits = torch.from_numpy(rows.logits()).to(device)
        scores = logits.clone() if keeps_logits else logits
        for processor in logits_processor:  # the list itself would look at the signature of each
            scores = processor(input_ids, scores)
        if keeps_scores:
            all_scores += (scores,)
        if keeps_logits:
            all_logits += (logits,)
        if generation_config.do_sample:
            ids = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            ids = scores.argmax(-1)
        if has_end:
            ids = ids * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat([input_ids, ids[:, None]], dim=1)
        if streamer is not None:
            streamer.put(ids.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, all_scores)
        if not unfinished.any():
            break
        rows.read(ids[:, None].cpu().numpy())
    if streamer is not None:
        streamer.end()
    if kept:
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=all_scores, logits=all_logits)
    return input_ids
