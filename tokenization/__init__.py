# SPDX-License-Identifier: Apache-2.0
"""Byte tokenizer of STLM. Installed as `tokenization_stlm`."""

from .tokenization_stlm import STLMTokenizer


__all__ = ["STLMTokenizer"]
