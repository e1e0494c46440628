# SPDX-License-Identifier: Apache-2.0
"""The heads beside next-byte prediction: masked bytes, classes of rows and bytes, answers, choices."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .configuration_stlm import STLMConfig
from .modeling_stlm import STLMModel, STLMModelOutput, STLMPreTrainedModel, allow_tied_head, share_of_batch


class STLMForMaskedLM(STLMPreTrainedModel):
    """The model with a head that predicts masked bytes; needs `is_causal=False`. One `<mask>` (id 259) stands for one byte.

    Example:

    ```python
    >>> import torch
    >>> from modeling_stlm import STLMConfig, STLMForMaskedLM
    >>> model = STLMForMaskedLM(STLMConfig.from_preset("stlm-3m", is_causal=False))
    >>> model(torch.tensor([[*b"a w", 259, *b"rd"]])).logits.shape
    torch.Size([1, 6, 320])

    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        if config.is_causal:
            raise ValueError(
                "STLMForMaskedLM needs a config with is_causal=False: a causal model cannot see what follows a mask. "
                "To start from the weights of a causal checkpoint, pass is_causal=False to from_pretrained, and call look_both_ways of "
                "modeling_stlm.training.sentence_embeddings, which keeps each tap of a convolution at its byte"
            )
        self.model = STLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_load_state_dict_post_hook(allow_tied_head)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): ids at masked bytes, -100 elsewhere.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.ratio_loss is not None:
                ratio_loss = share_of_batch(outputs.ratio_loss, labels != -100, logits, **kwargs)
                loss = loss + self.config.ratio_loss_weight * ratio_loss
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class STLMClassifier(STLMPreTrainedModel):
    """What the classification heads share: the model, dropout, and one vector per row.

    Without a mask, padding ids are ignored.
    """

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = STLMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)

    def encode(self, input_ids, attention_mask, position_ids, inputs_embeds, kwargs):
        """Hidden states of every byte, and the mask used. `num_items_in_batch` is for the loss; a head needs no cache."""
        self._warn_of_rounding()  # of the head, where the model is frozen
        if inputs_embeds is None and self.model.is_empty(input_ids):
            states = self.model.no_states(len(input_ids))
            return STLMModelOutput(last_hidden_state=states), states.new_zeros(states.shape[:2])
        kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"} | {"use_cache": False}
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        return outputs, attention_mask

    def pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """One vector for each row (B, D) of `hidden_states (B, T, D)`, zero without bytes: see `config.classifier_pooling`."""
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
        if self.config.classifier_pooling == "last" and hidden_states.shape[1]:
            time = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            last = (time * (attention_mask != 0)).argmax(-1)
            return hidden_states.take_along_dim(last[:, None, None], 1)[:, 0]
        return mean_over_bytes(hidden_states, attention_mask).to(hidden_states.dtype)


def mean_over_bytes(hidden_states: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of `hidden_states (B, T, D)` where `attention_mask (B, T)` is not zero: (B, D), zero without bytes.

    In float32: a sum of bytes overflows float16.
    """
    weight = (attention_mask != 0).float()[..., None]
    return (hidden_states.float() * weight).sum(1) / weight.sum(1).clamp(min=1)


def loss_of_rows(model: PreTrainedModel, logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
    """Loss of `logits (B, num_labels)` by the `problem_type` of the model, as the share of this call in its batch."""
    loss = model.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=model.config)
    # -100 is a value like any other where labels are values.
    has_values = labels.is_floating_point() or model.config.problem_type == "regression"
    counted = torch.ones_like(labels, dtype=torch.bool) if has_values else labels != -100
    return share_of_batch(loss, counted, logits, **kwargs)


class STLMForSequenceClassification(STLMClassifier):
    """The model with a linear head on one vector per row: classification, regression, several labels at once."""

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            labels (`torch.Tensor` of shape `(B,)` or `(B, num_labels)`, *optional*):
                Classes, or values if `num_labels` is 1; floats of shape `(B, num_labels)` for several labels at once.
        """
        outputs, attention_mask = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        pooled = self.pool(outputs.last_hidden_state, attention_mask)
        logits = self.score(self.dropout(pooled))
        loss = None if labels is None else loss_of_rows(self, logits, labels, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class STLMForTokenClassification(STLMClassifier):
    """The model with a linear head on every byte."""

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): class of every byte; -100 is left out.
        """
        outputs, _ = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, config=self.config)
            loss = share_of_batch(loss, labels != -100, logits, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class STLMForQuestionAnswering(STLMClassifier):
    """The model with a head for the first and the last byte of an answer."""

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        r"""
        Inputs as in [`STLMModel.forward`], and:

        Args:
            start_positions, end_positions (`torch.LongTensor` of shape `(B,)`, *optional*):
                First and last byte of the answer; positions past the input are left out.
        """
        outputs, _ = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        start_logits, end_logits = self.qa_outputs(self.dropout(outputs.last_hidden_state)).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class STLMForMultipleChoice(STLMClassifier):
    """The model with a score for each of several texts, of which one is right."""

    def __init__(self, config: STLMConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        r"""
        Inputs as in [`STLMModel.forward`] with one more axis: `(B, choices, T)`; and:

        Args:
            labels (`torch.LongTensor` of shape `(B,)`, *optional*): which choice is right.
        """
        num_choices = (inputs_embeds if input_ids is None else input_ids).shape[1]
        input_ids, attention_mask, inputs_embeds = (
            None if tensor is None else tensor.flatten(0, 1) for tensor in (input_ids, attention_mask, inputs_embeds)
        )
        if position_ids is not None and position_ids.ndim == 3:  # or (1, T), the same for all
            position_ids = position_ids.flatten(0, 1)
        outputs, attention_mask = self.encode(input_ids, attention_mask, position_ids, inputs_embeds, kwargs)
        pooled = self.pool(outputs.last_hidden_state, attention_mask)
        logits = self.score(self.dropout(pooled)).view(-1, num_choices)
        loss = None
        if labels is not None:
            loss = share_of_batch(F.cross_entropy(logits.float(), labels), labels != -100, logits, **kwargs)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "STLMForMaskedLM",
    "STLMForMultipleChoice",
    "STLMForQuestionAnswering",
    "STLMForSequenceClassification",
    "STLMForTokenClassification",
]
