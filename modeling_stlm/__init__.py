# SPDX-License-Identifier: Apache-2.0
"""Super Tiny Language Models for transformers. Importing this package registers every Auto class."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto import modeling_auto

from tokenization_stlm import STLMTokenizer

from .configuration_stlm import STLMConfig
from .modeling_stlm import STLMCausalLMOutput, STLMForCausalLM, STLMModel, STLMModelOutput, STLMPreTrainedModel


__version__ = "0.1.0"

_HEADS = {
    "MODEL_MAPPING_NAMES": (AutoModel, STLMModel),
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": (AutoModelForCausalLM, STLMForCausalLM),
}

AutoConfig.register(STLMConfig.model_type, STLMConfig, exist_ok=True)
AutoTokenizer.register(STLMConfig, STLMTokenizer, exist_ok=True)
STLMConfig.register_for_auto_class()
for _names, (_auto, _head) in _HEADS.items():
    _auto.register(STLMConfig, _head, exist_ok=True)
    _head.register_for_auto_class(_auto.__name__)
    # Trainer (label smoothing) and pipelines look class names up in these tables.
    getattr(modeling_auto, _names)[STLMConfig.model_type] = _head.__name__

__all__ = [
    "STLMCausalLMOutput",
    "STLMConfig",
    "STLMForCausalLM",
    "STLMModel",
    "STLMModelOutput",
    "STLMPreTrainedModel",
    "STLMTokenizer",
]
