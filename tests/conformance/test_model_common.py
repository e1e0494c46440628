# SPDX-License-Identifier: Apache-2.0
"""transformers' own model and training tests on tiny models that really pool."""

import unittest

import torch

from modeling_stlm import (
    STLMConfig,
    STLMForCausalLM,
    STLMForMaskedLM,
    STLMForMultipleChoice,
    STLMForQuestionAnswering,
    STLMForSequenceClassification,
    STLMForTokenClassification,
    STLMModel,
)

from . import sdist


sdist.install()

from hf_tests.test_configuration_common import ConfigTester  # noqa: E402
from hf_tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor  # noqa: E402
from hf_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402


class STLMModelTester:
    """Tiny sizes. Of 99 ids, 62 are letters or digits and the rest ends words, so patches are two to four bytes."""

    batch_size, seq_length, vocab_size, hidden_size = 13, 7, 99, 32
    num_hidden_layers = 2  # byte layers: those whose hidden states and attentions are recorded
    num_attention_heads = 2
    num_choices = 3
    is_training = True
    base_model_class, causal_lm_class, config_class = STLMModel, STLMForCausalLM, STLMConfig

    def __init__(self, parent, **options):
        self.parent, self.options = parent, options

    def get_config(self) -> STLMConfig:
        return STLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_local_encoder_layers=1,
            num_local_decoder_layers=1,
            num_attention_heads=self.num_attention_heads,
            ngram_rows=64,
            trunk_hidden_size=48,
            trunk_intermediate_size=64,
            trunk_num_attention_heads=4,
            num_trunk_layers=4,
            num_unique_trunk_layers=3,
            layer_sharing="middle",
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.tril(torch.ones_like(input_ids))}


class STLMModelTests(ModelTesterMixin):
    all_model_classes = (
        STLMModel,
        STLMForCausalLM,
        STLMForSequenceClassification,
        STLMForTokenClassification,
        STLMForQuestionAnswering,
        STLMForMultipleChoice,
    )
    options: dict
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = STLMModelTester(self, **self.options)
        self.config_tester = ConfigTester(self, config_class=STLMConfig)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_the_tiny_model_pools(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        boundaries = STLMModel(config)(inputs["input_ids"], output_boundaries=True).boundaries
        assert 0.1 < boundaries.float().mean() < 0.5


# The sdist has no generation tester: what stands in its place is empty, and tests/test_generate.py tests generation.
class AttentionMixerTest(STLMModelTests, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    options = {"byte_mixers": ["attention"] * 2}


class ConvMixerTest(STLMModelTests, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    options = {"byte_mixers": ["conv"] * 2}
    has_attentions = False  # no attention at the byte level; AttentionMixerTest has the tests of attentions


class BothWaysTest(STLMModelTests, unittest.TestCase):
    options = {"byte_mixers": ["attention"] * 2, "is_causal": False, "mask_token_id": 3}
    all_model_classes = (
        STLMModel,
        STLMForMaskedLM,
        STLMForSequenceClassification,
        STLMForTokenClassification,
        STLMForQuestionAnswering,
        STLMForMultipleChoice,
    )


del GenerationTesterMixin, ModelTesterMixin, TrainingTesterMixin, STLMModelTests
