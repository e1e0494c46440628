# SPDX-License-Identifier: Apache-2.0
"""transformers' own tokenizer tests."""

import tempfile
import unittest
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

from tokenization_stlm import STLMTokenizer

from . import sdist


sdist.install()

import hf_tests.test_tokenization_common as common  # noqa: E402
from hf_tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin  # noqa: E402


# The sdist has no tests/fixtures/sample_text.txt.
FIXTURES = tempfile.TemporaryDirectory()
(Path(FIXTURES.name) / "fixtures").mkdir()
SAMPLE = "The quick brown fox.\n\nZw\u00f6lf Boxk\u00e4mpfer jagen Viktor.\n" * 5
(Path(FIXTURES.name) / "fixtures" / "sample_text.txt").write_text(SAMPLE, encoding="utf-8")
common.get_tests_dir = lambda *args: FIXTURES.name

SAVED = tempfile.TemporaryDirectory()
STLMTokenizer().save_pretrained(SAVED.name)


class STLMTokenizationTest(common.TokenizerTesterMixin, TokenizersBackendTesterMixin, unittest.TestCase):
    tokenizer_class = rust_tokenizer_class = STLMTokenizer
    from_pretrained_id = [SAVED.name]
    test_seq2seq = False
    integration_test_input_string = "Zo\u00eb, 2 \u6771"
    integration_expected_token_ids = list(integration_test_input_string.encode())
    integration_expected_tokens = [bytes_to_unicode()[byte] for byte in integration_expected_token_ids]
    integration_expected_decoded_text = integration_test_input_string


del TokenizersBackendTesterMixin
