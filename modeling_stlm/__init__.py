# SPDX-License-Identifier: Apache-2.0
"""Super Tiny Language Models for transformers. Importing this package registers every Auto class."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto

from tokenization_stlm import STLMTokenizer

from .committee_stlm import COMMITTEES, STLMCommittee, STLMCommitteeConfig
from .configuration_stlm import STLMConfig
from .heads_stlm import (
    STLMForMaskedLM,
    STLMForMultipleChoice,
    STLMForQuestionAnswering,
    STLMForSequenceClassification,
    STLMForTokenClassification,
)
from .modeling_stlm import (
    STLMCausalLMOutput,
    STLMForCausalLM,
    STLMModel,
    STLMModelOutput,
    STLMPreTrainedModel,
)


__version__ = "0.1.0"

_CLASSES = {
    "MODEL_MAPPING_NAMES": (AutoModel, STLMModel),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": (AutoModelForCausalLM, STLMForCausalLM),
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": (AutoModelForMaskedLM, STLMForMaskedLM),
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": (
        AutoModelForSequenceClassification,
        STLMForSequenceClassification,
    ),
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": (AutoModelForTokenClassification, STLMForTokenClassification),
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": (AutoModelForQuestionAnswering, STLMForQuestionAnswering),
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": (AutoModelForMultipleChoice, STLMForMultipleChoice),
}

_COMMITTEES = {"STLMModel": STLMCommittee, **{f"STLMFor{head}": committee for head, committee in COMMITTEES.items()}}

for _config in (STLMConfig, STLMCommitteeConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoTokenizer.register(_config, STLMTokenizer, exist_ok=True)
    _config.register_for_auto_class()
for _names, (_auto, _class) in _CLASSES.items():
    for _config, _model in ((STLMConfig, _class), (STLMCommitteeConfig, _COMMITTEES[_class.__name__])):
        _auto.register(_config, _model, exist_ok=True)
        _model.register_for_auto_class(_auto.__name__)
        # Trainer (label smoothing) and pipelines look class names up in these tables.
        getattr(modeling_auto, _names)[_config.model_type] = _model.__name__

__all__ = [
    "STLMCausalLMOutput",
    "STLMCommittee",
    "STLMCommitteeConfig",
    "STLMConfig",
    "STLMForCausalLM",
    "STLMForMaskedLM",
    "STLMForMultipleChoice",
    "STLMForQuestionAnswering",
    "STLMForSequenceClassification",
    "STLMForTokenClassification",
    "STLMModel",
    "STLMModelOutput",
    "STLMPreTrainedModel",
    "STLMTokenizer",
]
