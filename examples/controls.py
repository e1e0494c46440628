# SPDX-License-Identifier: Apache-2.0
"""The two models STLM is compared with: Llama over bytes and Llama over a BPE vocabulary, at a given stored size."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokenization_stlm import STLMTokenizer


def train_bpe(texts: Iterable[str | bytes], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries, special tokens included."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    strings = (text if isinstance(text, str) else text.decode("utf-8") for text in texts)
    backend.train_from_iterator(strings, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def llama_config(tokenizer: PreTrainedTokenizerBase, stored_parameters: int) -> LlamaConfig:
    """The widest tied Llama with at most `stored_parameters`, of a depth usual for its size."""
    vocab_size = 320 if isinstance(tokenizer, STLMTokenizer) else len(tokenizer)
    num_layers = 6 if stored_parameters < 2e7 else 12
    head_dim = 64 if stored_parameters > 5e6 else 32
    best = None
    for num_heads in range(2, 64):
        width = num_heads * head_dim
        # attention 4 w^2, norms 2 w a layer, embedding and final norm; the rest goes to the feed-forward layers
        left = stored_parameters - vocab_size * width - width - num_layers * (4 * width**2 + 2 * width)
        intermediate_size = left // (3 * width * num_layers) // 8 * 8
        if intermediate_size < 2 * width:
            break
        best = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=16384,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    if best is None:
        raise ValueError(f"{stored_parameters} parameters are too few for a vocabulary of {vocab_size}")
    return best


def flat_byte_llama(stored_parameters: int) -> tuple[LlamaConfig, STLMTokenizer]:
    tokenizer = STLMTokenizer()
    return llama_config(tokenizer, stored_parameters), tokenizer


def bpe_llama(
    stored_parameters: int, vocab_size: int, texts: Iterable[str | bytes]
) -> tuple[LlamaConfig, PreTrainedTokenizerFast]:
    tokenizer = train_bpe(texts, vocab_size)
    return llama_config(tokenizer, stored_parameters), tokenizer
