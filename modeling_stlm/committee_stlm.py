# SPDX-License-Identifier: Apache-2.0
"""Soft committee: several independently trained models that answer as one (Tiny language models, arXiv:2507.14871).

The probabilities of a committee are the mean of those of its members, and its logits are their logarithm, so that losses,
pipelines and `generate` work on it as on a single model. The paper trains shallow members apart and compares them with
one deep model.

Members run one after the other. One batched call (`torch.func.stack_module_state`, `vmap`) gives the same numbers, but not
sooner on a CPU, except for members much smaller than the presets on a short text, and it needs a second copy of the
weights. One core, milliseconds; stacking the weights of each call would add 15 to 22:

    members                              text                 loop     vmap
    4, width 128, one layer (2.1M each)  1 row of 64 bytes    13.0     11.6
                                         1 row of 256 bytes   22.6     23.4
                                         32 rows of 256       451      698
    8, width 64, one layer               1 row of 48 bytes    18.6      6.5

Shapes: N members, B rows, T bytes, V vocabulary, C classes.
"""

import math
from itertools import accumulate, pairwise
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import QuestionAnsweringModelOutput
from transformers.utils import can_return_tuple

from .configuration_stlm import HEADS, STLMConfig
from .generation_stlm import STLMGenerationMixin
from .heads_stlm import (
    STLMForMaskedLM,
    STLMForMultipleChoice,
    STLMForQuestionAnswering,
    STLMForSequenceClassification,
    STLMForTokenClassification,
    loss_of_rows,
)
from .modeling_stlm import STLMForCausalLM, STLMPreTrainedModel, share_of_batch, without_first_bytes


MEMBER_CLASSES = {
    "CausalLM": STLMForCausalLM,
    "MaskedLM": STLMForMaskedLM,
    "SequenceClassification": STLMForSequenceClassification,
    "TokenClassification": STLMForTokenClassification,
    "QuestionAnswering": STLMForQuestionAnswering,
    "MultipleChoice": STLMForMultipleChoice,
}


def problem_of(config: PreTrainedConfig) -> str:
    """What a classifier predicts. The library fills `problem_type` in when it first computes a loss."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def agreed(config: STLMConfig) -> dict:
    """Fields that the members have in common."""
    fields = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "id2label")
    return {field: getattr(config, field) for field in fields} | {"problem_type": problem_of(config)}


@strict
class STLMCommitteeConfig(PreTrainedConfig):
    r"""
    Configuration of an [`STLMCommittee`]; [`STLMCommittee.from_members`] makes it.

    Args:
        head (`str`, defaults to `"CausalLM"`): the task of all members, as in `STLMFor{head}`.
        members (`list[dict]`, *optional*): the configuration of each member; their sizes may differ.
        vocab_size (`int`, defaults to 320): that of all members, as are the ids of the special tokens and the labels.
    """

    model_type = "stlm_committee"
    keys_to_ignore_at_inference = ["cache"]

    head: Literal[
        "CausalLM",
        "MaskedLM",
        "SequenceClassification",
        "TokenClassification",
        "QuestionAnswering",
        "MultipleChoice",
    ] = "CausalLM"
    members: list[dict] | None = None
    vocab_size: int = 320
    pad_token_id: int | None = 256
    bos_token_id: int | None = 257
    eos_token_id: int | list[int] | None = 258
    mask_token_id: int | None = 259
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        kwargs.pop("num_hidden_layers", None)  # of a config of another kind, which the committee then refuses in words
        super().__post_init__(**kwargs)
        self.auto_map = {
            "AutoConfig": "committee_stlm.STLMCommitteeConfig",
            "AutoModel": "committee_stlm.STLMCommittee",
            **{f"AutoModelFor{head}": f"committee_stlm.STLMCommitteeFor{head}" for head in ("CausalLM", *HEADS)},
        }

    @property
    def member_configs(self) -> list[STLMConfig]:
        return [STLMConfig.from_dict(member) for member in self.members or []]

    @property
    def layer_types(self) -> list[str]:
        """Kinds of the cache slots, those of the first member first."""
        return [kind for config in self.member_configs for kind in config.layer_types]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    def validate_layer_type(self):
        """The library checks a field `layer_types` here; ours is derived."""


class STLMCommittee(PreTrainedModel):
    r"""
    Several models of one head that answer as one: their mean probability. `members[i]` is a model of its own.

    The class makes the one for its head, as `pathlib.Path` does, so that what the library derives from the name of a
    class (losses, names of labels, whether it can generate) is right.

    - Classes, bytes, choices: mean of the softmax. Several labels at once: mean of the sigmoid. Regression: mean.
    - Answers: mean of the softmax over the bytes of the row, for the first and for the last byte.

    Without the hidden states and attentions of the members: ask those. Trained as a unit, the loss is that of the mean.
    Adapters of peft on `target_modules="all-linear"` need `exclude_modules=r".*\.lm_head"`: peft leaves out one head alone,
    and each head shares its matrix with an embedding, so that merged weights would be those of another model.

    Args:
        config ([`STLMCommitteeConfig`]).
        members (`list[STLMPreTrainedModel]`, *optional*): see [`~STLMCommittee.from_members`].

    Example:

    ```python
    >>> import torch
    >>> from modeling_stlm import STLMCommittee, STLMConfig, STLMForSequenceClassification
    >>> config = STLMConfig.from_preset("stlm-3m", num_labels=4)
    >>> committee = STLMCommittee.from_members([STLMForSequenceClassification(config) for _ in range(3)])
    >>> committee(torch.tensor([list(b"a row of text")])).logits.shape
    torch.Size([1, 4])

    ```
    """

    config: STLMCommitteeConfig
    head: str
    supports_gradient_checkpointing = True
    _no_split_modules = STLMPreTrainedModel._no_split_modules
    _skip_keys_device_placement = STLMPreTrainedModel._skip_keys_device_placement
    _supports_sdpa = True

    def __new__(cls, config: STLMCommitteeConfig | None = None, *args, **kwargs):
        return super().__new__(COMMITTEES[config.head] if cls is STLMCommittee else cls)

    def __init__(self, config: STLMCommitteeConfig, members: list[STLMPreTrainedModel] | None = None):
        super().__init__(config)
        if config.head != self.head or not config.members:
            raise ValueError(
                f"{type(self).__name__} needs members with the head {self.head!r}, but this is the config of a committee of "
                f"{len(config.members or [])} with the head {config.head!r}: load it with STLMCommittee, or make one with "
                "STLMCommittee.from_members"
            )
        if members is None:
            attention = config._attn_implementation
            members = [
                MEMBER_CLASSES[self.head](STLMConfig.from_dict(member, attn_implementation=attention))
                for member in config.members
            ]
        for i, member in enumerate(members):
            for field in ("vocab_size", "num_labels", "pad_token_id", "mask_token_id"):
                expected, found = getattr(config, field), getattr(member.config, field)
                if found != expected:
                    raise ValueError(
                        f"member {i} has {field}={found!r}, expected {expected!r} as the committee: change the members and "
                        "make a committee of them with STLMCommittee.from_members"
                    )
        self.members = nn.ModuleList(members)
        self.post_init()
        # The library looks for the ties of direct children only.
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.members[0].get_input_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "a committee has an embedding for each member: resize those of its members, and make a committee of them with "
            "STLMCommittee.from_members"
        )

    @staticmethod
    def from_members(members: list[STLMPreTrainedModel]) -> "STLMCommittee":
        """A committee of `members`, which are not copied, in evaluation mode.

        Raises:
            ValueError: if there are none, or if they disagree in head, labels or vocabulary.
        """
        if not members:
            raise ValueError("a committee needs at least one member, got none")
        names = {f"STLMFor{head}": head for head in MEMBER_CLASSES}  # classes loaded from the Hub are others
        first, name = members[0], type(members[0]).__name__
        for i, member in enumerate(members):
            if type(member).__name__ not in names or type(member).__name__ != name:
                expected = f"{name} as member 0" if i else "one of " + ", ".join(names)
                raise ValueError(f"member {i} is a {type(member).__name__}, expected {expected}")
            for (field, expected), found in zip(agreed(first.config).items(), agreed(member.config).values()):
                if found != expected:
                    raise ValueError(f"member {i} has {field}={found!r}, expected {expected!r} as member 0")
        config = STLMCommitteeConfig(
            head=names[name],
            members=[member.config.to_diff_dict() for member in members],
            use_cache=first.config.use_cache,
            **agreed(first.config),
        )
        committee = STLMCommittee(config, members)
        if committee.can_generate():
            committee.generation_config = first.generation_config
        return committee.eval()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ):
        """Inputs as those of the members, and their output with the `loss` and `logits` of the committee."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.ask_members(**inputs, **kwargs)
        logits = self.mean([output.logits for output in outputs])
        loss = None if labels is None else self.loss_of(logits, labels, **kwargs)
        return type(outputs[0])(loss=loss, logits=logits)

    def ask_members(self, caches: list[Cache | None] | None = None, num_items_in_batch=None, **inputs) -> list:
        """Outputs of all members, without a loss."""
        if inputs.get("inputs_embeds") is not None:
            raise ValueError("a committee takes input_ids, got inputs_embeds: each member embeds bytes in its own way")
        if self.training and any(member.config.patching == "learned" for member in self.members):
            raise ValueError("members with patching='learned' have losses of their own: train them apart")
        caches = caches or [None] * len(self.members)
        return [member(**inputs, cache=cache, return_dict=True) for member, cache in zip(self.members, caches)]

    def mean(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """Logarithm of the mean probability (..., C), of N tensors of logits (..., C)."""
        return torch.stack([each.float().log_softmax(-1) for each in logits]).logsumexp(0) - math.log(len(logits))

    def loss_of(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)


class STLMCommitteeForCausalLM(STLMCommittee, STLMGenerationMixin):
    head = "CausalLM"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ):
        """As [`STLMForCausalLM.forward`]. The slots of `cache` are those of the members, one member after the other."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        use_cache = self.config.use_cache if use_cache is None else use_cache
        caches = None if cache is None else self.divide(cache)
        outputs = self.ask_members(caches, **inputs, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs)
        if cache is None and outputs[0].cache is not None:
            cache = DynamicCache()
            cache.layers.extend(layer for output in outputs for layer in output.cache.layers)
        logits = self.mean([output.logits for output in outputs])
        loss = None
        if labels is not None:
            loss = self.loss_of(logits, without_first_bytes(labels, attention_mask), **kwargs)
        return type(outputs[0])(loss=loss, logits=logits, cache=cache)

    def divide(self, cache: Cache) -> list[Cache]:
        """A cache for each member, with its slots of `cache`."""
        if not cache.layers:  # made without a config
            cache.layers.extend(DynamicCache(config=self.config).layers)
        ends = accumulate((member.config.num_hidden_layers for member in self.members), initial=0)
        return [Cache(layers=cache.layers[first:end]) for first, end in pairwise(ends)]


class STLMCommitteeForMaskedLM(STLMCommittee):
    head = "MaskedLM"


class STLMCommitteeForSequenceClassification(STLMCommittee):
    head = "SequenceClassification"

    def mean(self, logits):
        if self.config.problem_type == "regression":
            return torch.stack(logits).mean(0)
        if self.config.problem_type == "multi_label_classification":
            yes, no = (
                torch.stack([F.logsigmoid(sign * each.float()) for each in logits]).logsumexp(0) for sign in (1, -1)
            )
            return yes - no
        return super().mean(logits)

    def loss_of(self, logits, labels, **kwargs):
        return loss_of_rows(self, logits, labels, **kwargs)


class STLMCommitteeForTokenClassification(STLMCommittee):
    head = "TokenClassification"

    def loss_of(self, logits, labels, **kwargs):
        loss = self.loss_function(logits=logits, labels=labels, config=self.config)
        return share_of_batch(loss, labels != -100, logits, **kwargs)


class STLMCommitteeForMultipleChoice(STLMCommittee):
    head = "MultipleChoice"

    def loss_of(self, logits, labels, **kwargs):
        return share_of_batch(F.cross_entropy(logits, labels), labels != -100, logits, **kwargs)


class STLMCommitteeForQuestionAnswering(STLMCommittee):
    head = "QuestionAnswering"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """As [`STLMForQuestionAnswering.forward`]. Padding has no probability."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        outputs = self.ask_members(**inputs, **kwargs)
        if attention_mask is None:
            attention_mask = input_ids != (-1 if self.config.pad_token_id is None else self.config.pad_token_id)
        start_logits, end_logits = (
            self.mean([output[name].float().masked_fill(attention_mask == 0, torch.finfo().min) for output in outputs])
            for name in ("start_logits", "end_logits")
        )
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start_logits, end_logits=end_logits)


COMMITTEES = {
    committee.head: committee
    for committee in (
        STLMCommitteeForCausalLM,
        STLMCommitteeForMaskedLM,
        STLMCommitteeForMultipleChoice,
        STLMCommitteeForQuestionAnswering,
        STLMCommitteeForSequenceClassification,
        STLMCommitteeForTokenClassification,
    )
}

__all__ = ["STLMCommittee", "STLMCommitteeConfig", *(f"STLMCommitteeFor{head}" for head in COMMITTEES)]
