# SPDX-License-Identifier: Apache-2.0
"""STLM: a pooled byte-level transformer with a weight-tied trunk.

    bytes -> embed, n-grams, match -> local encoder --pool--> trunk (once per patch) --unpool--> + -> local decoder
                                               |                                                      |
                                               +---------------------- residual ----------------------+

Byte t sees the trunk output of the last patch that is complete at t (a learned start vector before the first), so
nothing leaks from later bytes, and the trunk runs only when a patch is complete. Training, prefill, a chunk and one byte
are the same code: a call without a cache starts from the fresh state and drops the new one.

Shapes: B rows, T bytes of this call, C ids of context before it, P patches, D byte width, G trunk width, H heads, K head
width, V vocabulary. R rows that completed a patch, S patches that any of these may see.
Reference: Super Tiny Language Models, arXiv:2405.14159; other sources are named where they are used.
"""

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .batching_stlm import STLMBatch
from .budget_stlm import BudgetMixin
from .cache_stlm import STLMPatchStateSlot
from .configuration_stlm import STLMConfig
from .embedding_stlm import ByteHistory, STLMContextNgramEmbedding, STLMMatchEmbedding, STLMNgramEmbedding
from .generation_stlm import STLMGenerationMixin
from .layers_stlm import (
    ByteRows,
    OutputProjection,
    STLMAttention,
    STLMByteLayer,
    STLMTrunkFeedForwardBlock,
    STLMWindowAttention,
    make_norm,
    rotary_embedding,
    window_mask,
)
from .patching_stlm import PatchState, RouterProjection
from .trunk_stlm import STLMPatcher, STLMStart, STLMTrunk, is_static, pool_patches


if TYPE_CHECKING:  # `save_pretrained` copies the modules that relative imports name: the other heads travel along
    from .committee_stlm import STLMCommittee  # noqa: F401
    from .heads_stlm import STLMForMaskedLM  # noqa: F401


logger = logging.get_logger(__name__)
SOFT_ID = -2  # in the byte history: an embedding that matches no id


class STLMOutput(ModelOutput):
    """A cheaper `__setattr__`: the base class scans all fields, which costs microseconds per byte."""

    def __setattr__(self, name, value):
        if name in ("past_key_values", "cache_params"):  # the old names, as in the base class
            name = "cache"
        if value is not None and name in self.__dataclass_fields__:
            self[name] = value
        else:
            object.__setattr__(self, name, value)


@dataclass
class STLMModelOutput(STLMOutput):
    """
    Output of [`STLMModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, hidden_size)`):
            After the final norm. At padding: that of the last valid byte before it, zero if there is none.
        cache (`Cache`, *optional*): with `use_cache=True`; in training only if one was passed.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): byte level, `(B, T, hidden_size)` for the embedding and
            each byte layer, undefined at padding; with `output_hidden_states=True`.
        attentions (`tuple(torch.FloatTensor)`, *optional*): byte level, `(B, num_attention_heads, T, past + T)` for each
            `"attention"` mixer, undefined at padding; with `output_attentions=True` and eager attention. The bytes
            of a row before this call come right before it.
        patch_hidden_states (`tuple(torch.FloatTensor)`, *optional*): `(R, P, trunk_hidden_size)` after each pass of the
            trunk; with `output_patch_hidden_states=True`. All rows without a cache, else those that completed a patch.
        patch_attentions (`tuple(torch.FloatTensor)`, *optional*): `(B, trunk_num_attention_heads, P, P)` for each pass;
            with `output_patch_attentions=True`. With a cache `(R, trunk_num_attention_heads, P, S)`: the R rows that completed a
            patch in this call, and their S patches so far; with `trunk_window_patches` those from the first one on that
            any new patch may see.
        boundaries (`torch.BoolTensor` of shape `(B, T)`, *optional*): where patches end; with `output_boundaries=True`.
        ratio_loss (`torch.FloatTensor` of shape `()`, *optional*):
            With `patching="learned"`, in training: see [`LearnedRule`].
    """

    last_hidden_state: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    patch_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    patch_attentions: tuple[torch.FloatTensor, ...] | None = None
    boundaries: torch.BoolTensor | None = None
    ratio_loss: torch.FloatTensor | None = None


@dataclass
class STLMCausalLMOutput(STLMOutput):
    """
    Output of [`STLMForCausalLM`]: `loss` in nats per byte (in training with `patching="learned"` plus
    `ratio_loss_weight` times `ratio_loss`), `logits (B, T, vocab_size)`, and the rest as in [`STLMModelOutput`].
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    patch_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    patch_attentions: tuple[torch.FloatTensor, ...] | None = None
    boundaries: torch.BoolTensor | None = None
    ratio_loss: torch.FloatTensor | None = None


class STLMPreTrainedModel(PreTrainedModel, BudgetMixin):
    config: STLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Pre-training leaves what other tasks do not need: its head, and the parameters of more objectives than the next byte.
    _keys_to_ignore_on_load_unexpected = [r"^objectives\.", r"^lm_head\."]
    _no_split_modules = ["STLMByteLayer", "STLMTrunkAttentionBlock", "STLMTrunkFeedForwardBlock"]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True
    # Patches are ragged, so attention needs a mask: flash attention takes none, and the compiled CPU kernel of flex
    # attention, given one, corrupts memory in torch 2.13.
    _supports_flex_attn = False
    _supports_flash_attn = False
    # Engines behind this flag key their own cache by layer and know nothing of patches (vLLM, SGLang).
    _supports_attention_backend = False
    _can_record_outputs = {
        "hidden_states": OutputRecorder(STLMByteLayer, num_hidden_layers_key="num_byte_layers"),
        "attentions": OutputRecorder(STLMWindowAttention, index=1),
        "patch_hidden_states": OutputRecorder(STLMTrunkFeedForwardBlock),
        "patch_attentions": OutputRecorder(STLMAttention, index=1, layer_name="attention_blocks"),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # embeddings, start       normal, std initializer_range
        # linear                  normal, std 1 / sqrt(fan_in)
        # short convolution       normal, std initializer_range: 1 / sqrt(kernel) learns more slowly
        # output projections      zero: every residual block starts as the identity
        # norms                   one
        # router of "learned"     identity: bytes are compared as they are
        super()._init_weights(module)
        if isinstance(module, OutputProjection):
            init.zeros_(module.weight)
        elif isinstance(module, RouterProjection):
            init.eye_(module.weight)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, STLMStart):
            init.normal_(module.weight, std=self.config.initializer_range)

    def _warn_of_rounding(self) -> None:
        """Warn, once, where weights are trained in bfloat16. Adapters have their own dtype, which is what counts."""
        if not self.training or not torch.is_grad_enabled() or is_torchdynamo_compiling():
            return
        if any(weight.dtype is torch.bfloat16 and weight.requires_grad for weight in self.parameters()):
            logger.warning_once(
                "Training weights in bfloat16: at the usual rates most updates are smaller than half a rounding step, and "
                "most weights will not move. Load the model with dtype=torch.float32; `bf16=True` of TrainingArguments "
                "then computes in bfloat16 all the same."
            )


class STLMModel(STLMPreTrainedModel):
    """The model without a head: hidden states of every byte.

    Example:

    ```python
    >>> import torch
    >>> from modeling_stlm import STLMConfig, STLMModel
    >>> model = STLMModel(STLMConfig.from_preset("stlm-3m"))
    >>> model(torch.tensor([list(b"a word and a word")])).last_hidden_state.shape
    torch.Size([1, 17, 128])

    ```
    """

    def __init__(self, config: STLMConfig):
        config.settle()  # `from_pretrained(..., num_trunk_layers=6)` sets fields of a config that is made
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        has_ngrams = config.ngram_orders or config.ngram_word_bytes
        self.ngram_embedding = STLMNgramEmbedding(config) if has_ngrams else None
        self.match_embedding = STLMMatchEmbedding(config) if config.match_bytes else None
        self.context_ngram_embedding = STLMContextNgramEmbedding(config) if config.context_ngram_orders else None
        self.longest_lookup = config.longest_lookup
        slots, num_encoder = range(config.num_byte_layers), config.num_local_encoder_layers
        self.local_encoder = nn.ModuleList(STLMByteLayer(config, slot) for slot in slots[:num_encoder])
        self.patcher = STLMPatcher(config)
        self.trunk = STLMTrunk(config)
        self.local_decoder = nn.ModuleList(STLMByteLayer(config, slot) for slot in slots[num_encoder:])
        self.final_norm = make_norm(config, config.hidden_size)
        # Copies: reading a field of a config costs microseconds, which add up over the bytes of a text.
        self.num_byte_layers, self.has_attention = config.num_byte_layers, "attention" in config.byte_mixers
        self.is_causal, self.patch_slot_type = config.is_causal, config.layer_types[config.num_byte_layers]
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> STLMModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(B, T)`): bytes (0 to 255) and special tokens.
            attention_mask (`torch.Tensor` of shape `(B, past + T)`, *optional*):
                0 at padding, which may be anywhere. A padded row gives the outputs of the row alone.
            position_ids (`torch.LongTensor` of shape `(B, T)` or `(1, T)`, *optional*):
                Only read without a filled cache, to find packed documents: a document starts wherever the positions
                do not go on by one; in rows with padding, wherever they are zero.
            cache (`Cache`, *optional*): a `DynamicCache` or `StaticCache`, updated in place.
            inputs_embeds (`torch.FloatTensor` of shape `(B, T, D)`, *optional*):
                Instead of `input_ids`. Vectors that equal a byte's embedding count as that byte for patching,
                n-grams and matches, all others as a byte that is not there.

        Ids of no bytes (B, 0) have no states in an encoder (`is_causal=False`) that is not training; all else refuses them.

        Raises:
            ValueError: if a shape does not fit, or if the cache was not made for this model.
        """
        if not self.is_causal and inputs_embeds is None and self.is_empty(input_ids):
            return STLMModelOutput(last_hidden_state=self.no_states(len(input_ids)))
        input_ids = self._checked_ids(input_ids, inputs_embeds)
        self._warn_of_rounding()
        if cache is not None:
            self._check_cache(cache, input_ids)
        num_past = self._num_past(cache, attention_mask, input_ids)
        if num_past != 0 or (cache is not None and is_static(cache)):
            position_ids = None
        batch = STLMBatch.of(input_ids, attention_mask, num_past, position_ids, self.is_causal)
        if batch.positions is not None and cache is not None:
            raise ValueError(
                "a cache cannot hold packed documents (position_ids that restart): pass one document per row"
            )
        wants_cache = self.is_causal and not self.training and batch.positions is None
        if cache is None and wants_cache and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        state = self._state_of(cache, input_ids)
        compact_embeds = None if inputs_embeds is None else batch.compact(inputs_embeds)
        is_done = False
        try:
            outputs = self._forward_rows(
                batch.compact(input_ids), compact_embeds, batch, state, cache, **(kwargs | {"return_dict": True})
            )
            is_done = True
        finally:
            if cache is not None and not is_done:  # some layers have seen these bytes, others have not
                self._patch_slot(cache).forget()
        if cache is not None:
            self._patch_slot(cache).append_history(batch.hide_padding(input_ids))
            for layer in cache.layers:
                layer.end_call(input_ids.shape[1])
            outputs.cache = cache
        if batch.num_seen is not None:
            batch.restore_outputs(outputs, state.last_output)
        return outputs

    @capture_outputs
    def _forward_rows(
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.FloatTensor | None,
        batch: STLMBatch,
        state: PatchState,
        cache: Cache | None,
        output_attentions: bool | None = None,
        output_boundaries: bool = False,
        **kwargs,
    ) -> STLMModelOutput:
        """The model on compact rows."""
        context = torch.cat([state.last_ids, input_ids.clamp(min=-1)], dim=1)  # (B, C + T)
        hidden_states = self._embed(input_ids, inputs_embeds, context, batch, state, cache)  # (B, T, D)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        rows = self._byte_rows(batch, state, cache, hidden_states, output_attentions)
        for layer in self.local_encoder:
            hidden_states = layer(hidden_states, rows, cache)

        if cache is not None and cache.is_compileable:
            self.trunk.make_room(cache, hidden_states)
        seen, found, new_state = self.patcher(self.trunk.__call__, hidden_states, context, batch, state, cache)
        decoded = hidden_states + seen
        for layer in self.local_decoder:
            decoded = layer(decoded, rows, cache)
        decoded = self.final_norm(decoded)

        if cache is not None:
            slot = self._patch_slot(cache)
            by_byte = None if batch.lengths is not None else (input_ids, hidden_states, seen, decoded)
            slot.record(tuple(state), by_byte)
            slot.state = tuple(new_state._replace(last_output=batch.at_end(decoded, state.last_output)))
        is_routed = self.training and found.confidence is not None
        return STLMModelOutput(
            last_hidden_state=decoded,
            boundaries=found.ends if output_boundaries else None,
            ratio_loss=self.patcher.rule.ratio_loss(found, batch) if is_routed else None,
        )

    # Bytes

    def is_empty(self, input_ids: torch.Tensor | None) -> bool:
        """Whether these are empty texts, which a tokenizer makes tensors of shape (B, 0); there is nothing to train on them."""
        return (
            not self.training
            and input_ids is not None
            and input_ids.ndim == 2
            and input_ids.shape[1] == 0 < len(input_ids)
        )

    def no_states(self, num_rows: int) -> torch.Tensor:
        """Those of empty texts (B, 0, D)."""
        return self.embed_tokens.weight.new_zeros(num_rows, 0, self.config.hidden_size)

    def _checked_ids(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Ids (B, T) as int64, those of `inputs_embeds` if these were given."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("specify exactly one of input_ids and inputs_embeds")
        if input_ids is None:
            width = self.config.hidden_size
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != width:
                raise ValueError(
                    f"inputs_embeds has shape {tuple(inputs_embeds.shape)}, expected (rows, bytes, {width})"
                )
            input_ids = self._ids_of(inputs_embeds)
        elif input_ids.is_floating_point() or input_ids.dtype == torch.bool:
            raise ValueError(
                f"input_ids has dtype {input_ids.dtype}, expected integers: ids of bytes and special tokens"
            )
        if input_ids.ndim != 2 or input_ids.numel() == 0:
            raise ValueError(
                f"the input has shape {tuple(input_ids.shape)}, expected (rows, bytes) with at least one of each"
            )
        return input_ids.long()

    @torch.no_grad()
    def _ids_of(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Ids (B, T) whose embeddings were passed; `SOFT_ID` where a vector is the embedding of no id.

        Only equality counts: rows of a resized table can lie closer together than distances are precise.
        """
        # Called and not read, so that an adapter of the embedding takes part.
        table = self.embed_tokens(torch.arange(self.config.vocab_size, device=inputs_embeds.device))
        some = slice(0, 4)  # numbers that tell ids apart, without a difference of shape (B, T, V, D)
        ids = (inputs_embeds[..., None, some] == table[:, some]).all(-1).int().argmax(-1)
        return ids.masked_fill((table[ids] != inputs_embeds).any(-1), SOFT_ID)

    def _embed(self, input_ids, inputs_embeds, context, batch: STLMBatch, state: PatchState, cache) -> torch.Tensor:
        """Byte embedding, plus those of the n-grams that end at each byte and of what followed them before: (B, T, D)."""
        try:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        except IndexError as error:
            low, high, size = int(input_ids.min()), int(input_ids.max()), self.config.vocab_size
            raise ValueError(f"input_ids are between {low} and {high}, expected 0 to {size - 1}") from error
        if self.ngram_embedding is not None:
            hidden_states = hidden_states + self.ngram_embedding(context, batch)
        if self.longest_lookup:
            slot = None if cache is None else self._patch_slot(cache)
            history = ByteHistory.of(context, batch, state.num_bytes, slot, self.longest_lookup)
            if self.match_embedding is not None:
                hidden_states = hidden_states + self.match_embedding(history)
            if self.context_ngram_embedding is not None:
                hidden_states = hidden_states + self.context_ngram_embedding(history, slot)
        return hidden_states

    def _byte_rows(
        self, batch: STLMBatch, state: PatchState, cache, like: torch.Tensor, output_attentions
    ) -> ByteRows:
        if not self.has_attention:
            return ByteRows(batch)
        num_past = int(cache.get_seq_length()) if output_attentions and cache is not None else 0
        index = torch.arange(batch.num_bytes, device=like.device) + state.num_bytes[:, None]
        window = self.config.attention_window_bytes
        block = batch.num_bytes if output_attentions else min(batch.num_bytes, window)
        mask = window_mask(index if batch.positions is None else batch.positions, batch.remaining, window, block)
        rotary = rotary_embedding(index, self.config.head_dim, self.config.rope_theta, like.dtype)
        return ByteRows(batch, num_past, rotary, mask, output_attentions)

    # Cache

    def _patch_slot(self, cache: Cache) -> STLMPatchStateSlot:
        return cache.layers[self.num_byte_layers]

    def _num_past(
        self, cache: Cache | None, attention_mask: torch.Tensor | None, input_ids: torch.Tensor
    ) -> int | None:
        """Positions in the cache; `None` where a graph must not know them, or if the mask leaves them out."""
        num_past = 0 if cache is None else cache.get_seq_length()
        if not isinstance(num_past, torch.Tensor):
            return num_past
        # With a static cache the mask may be that of the new bytes, as `create_masks_for_generate` makes it.
        if is_static(cache) or (attention_mask is not None and attention_mask.shape[1] == input_ids.shape[1]):
            return None
        return int(num_past)

    def _check_cache(self, cache: Cache, input_ids: torch.Tensor) -> None:
        """Raise unless the cache was made for this model and these rows."""
        if not self.is_causal:
            raise ValueError("a model with is_causal=False has no cache: every byte changes what all others see")
        if not hasattr(cache, "layers"):
            raise ValueError(f"cache is a {type(cache).__name__}, expected a DynamicCache or a StaticCache")
        if self.training and torch.is_grad_enabled() and self.local_encoder[0].gradient_checkpointing:
            raise ValueError(
                "gradient checkpointing runs layers twice, which would write to the cache twice: train without a cache or "
                "without gradient checkpointing"
            )
        if not cache.layers:  # made without a config
            cache.layers.extend(DynamicCache(config=self.config).layers)
        is_known = len(cache.layers) == self.config.num_hidden_layers > self.num_byte_layers
        slot = self._patch_slot(cache) if is_known else None
        if slot is None or slot._layer_type != self.patch_slot_type or not slot.is_initialized:
            self._check_slots(cache)
            slot = self._patch_slot(cache)
        num_rows = input_ids.shape[0]  # `len` would fix it in an exported graph
        if slot.state is not None and slot.state[0].shape[0] != num_rows:
            raise ValueError(f"the cache holds {slot.state[0].shape[0]} rows, but the input has {num_rows}")
        if not is_static(cache):
            slot.check_room(input_ids.shape[1])

    def _check_slots(self, cache: Cache) -> None:
        kinds = [layer._layer_type for layer in cache.layers]
        if kinds != self.config.layer_types or len(kinds) <= self.num_byte_layers:
            raise ValueError(
                f"the cache has slots {kinds}, but this model needs {self.config.layer_types}: make it with "
                "DynamicCache(config=model.config). Keys and values from elsewhere (prefix tuning) do not fit patches: use "
                "LoRA, or prompt tuning, which generates with use_cache=False"
            )

    def _state_of(self, cache: Cache | None, input_ids: torch.Tensor) -> PatchState:
        """The state of the rows before this call."""
        num_rows, device = input_ids.shape[0], input_ids.device
        if cache is None:
            return self.patcher.fresh_state(num_rows, device)
        slot = self._patch_slot(cache)
        if slot.is_cropped:
            self._recover(cache)
        state = self.patcher.fresh_state(num_rows, device) if slot.state is None else PatchState(*slot.state)
        if not slot.is_initialized:
            slot.lazy_initialization(state.visible)
        return state

    @torch.no_grad()
    def _recover(self, cache: Cache) -> None:
        """After a crop, the state of the bytes that are left."""
        slot = self._patch_slot(cache)
        if slot.recent is None:  # deeper than the recorded call: replay the history
            if int(cache.get_seq_length()) == 0:
                cache.reset()
                return
            if slot.history is None:
                raise ValueError("the last call was interrupted, and a static cache keeps no history: reset it")
            history = slot.history[:, : slot.seen_bytes].long()
            if (history == SOFT_ID).any():
                raise ValueError(
                    f"cannot run the {history.shape[1]} bytes that crop left again: some were embeddings of no byte "
                    "(soft prompts), which are not kept"
                )
            cache.reset()
            is_done = False
            try:
                self(history.clamp(min=0), attention_mask=(history != -1).long(), cache=cache)
                is_done = True
            finally:
                if not is_done:  # as before, to be replayed by the next call
                    cache.reset()
                    slot.append_history(history)
                    for layer in cache.layers:
                        layer.end_call(history.shape[1])
                    slot.forget()
            return
        state, (ids, hidden_states, seen, decoded) = PatchState(*slot.recent), slot.recent_bytes
        if ids.shape[1]:  # advance again over the bytes that are left
            batch = STLMBatch.of(ids)
            context = torch.cat([state.last_ids, ids], dim=1)
            found = self.patcher.find_ends(hidden_states, context, batch, state)
            _, pooled = pool_patches(hidden_states, found.ends, batch, state, int(found.ends.sum(1).max()))
            last_output = batch.at_end(decoded, state.last_output)
            state = self.patcher.advance(pooled, context, found, seen[:, -1], batch)._replace(last_output=last_output)
        slot.state, slot.is_cropped = tuple(state), False


class STLMForCausalLM(STLMPreTrainedModel, STLMGenerationMixin):
    """The model with a head that predicts the next byte.

    `generate` takes `valid_utf8=True`, or finds it in the generation config: text is well-formed UTF-8 then, whatever the
    logits are.

    Example:

    ```python
    >>> import torch
    >>> from modeling_stlm import STLMConfig, STLMForCausalLM
    >>> model = STLMForCausalLM(STLMConfig.from_preset("stlm-3m"))
    >>> model.generate(torch.tensor([list(b"Once")]), max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 8])

    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "STLMForCausalLM needs a config with is_causal=True, got that of an encoder, which has seen the next bytes"
            )
        self.model = STLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_load_state_dict_post_hook(allow_tied_head)
        self.post_init()

    @deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> STLMCausalLMOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*):
                Ids, shifted here; -100 is left out of the loss, and so is the first byte of each row.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): logits of the last so many bytes only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            labels = without_first_bytes(labels, attention_mask)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.ratio_loss is not None:
                ratio_loss = share_of_batch(outputs.ratio_loss, labels[:, 1:] != -100, logits, **kwargs)
                loss = loss + self.config.ratio_loss_weight * ratio_loss
        return STLMCausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_hidden_states=outputs.patch_hidden_states,
            patch_attentions=outputs.patch_attentions,
            boundaries=outputs.boundaries,
            ratio_loss=outputs.ratio_loss,
        )

    # `generate` looks at it in every step of a class from outside the library. Made once, it costs nothing then.
    forward.__signature__ = inspect.signature(forward)


def allow_tied_head(model: PreTrainedModel, incompatible_keys) -> None:
    """Hook of `load_state_dict`: a tied head is not missing from a state without it, as `save_pretrained` writes it.

    `Trainer` reports missing keys when it resumes.
    """
    if model.lm_head.weight is model.model.embed_tokens.weight:
        missing = incompatible_keys.missing_keys  # named with the prefix of a wrapper, if there is one
        missing[:] = [name for name in missing if not f".{name}".endswith(".lm_head.weight")]


def without_first_bytes(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`labels (B, T)` without those of the first byte of each row, which no byte predicts: on the left stands padding.

    Shifting drops the first label of a row as it is, so a padded row has the loss of the row alone. (`num_items_in_batch` of
    `Trainer` counts it on the left.) `attention_mask` is that of `labels`, or longer by the bytes in the cache.
    """
    if attention_mask is None:
        return labels
    is_byte = (attention_mask != 0).long()
    has_before = (is_byte.cumsum(1) - is_byte)[:, -labels.shape[1] :] > 0
    return labels.masked_fill(~has_before, -100)


def share_of_batch(
    loss: torch.Tensor, counted: torch.Tensor, logits: torch.Tensor, num_items_in_batch=None, **_
) -> torch.Tensor:
    """A mean over the `counted` labels (bool) of this call, as its share of the mean over `num_items_in_batch`.

    `Trainer` counts the latter, so gradient accumulation gives the gradient of the whole batch. A call without labels has
    no share.
    """
    if num_items_in_batch is None:
        return loss
    count = counted.sum()
    return torch.where(count > 0, loss * count, 0 * logits.float().sum()) / num_items_in_batch


__all__ = ["STLMCausalLMOutput", "STLMForCausalLM", "STLMModel", "STLMModelOutput", "STLMPreTrainedModel"]
