# SPDX-License-Identifier: Apache-2.0
"""The models STLM is compared with, at a given stored size: Llama over bytes, Llama over a BPE, and BLT."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BltConfig,
    BltForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

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


def blt_config(stored_parameters: int) -> BltConfig:
    """BLT (arXiv:2412.09871) with small local parts, the widest global part that fits, and hash rows for the rest.

    Raises:
        ValueError: where not even the smallest fits, as at the size of `stlm-3m`.
    """

    def part(width: int, num_layers: int, **more) -> dict:
        sizes = {"hidden_size": width, "intermediate_size": 8 * width // 3 // 8 * 8, "num_hidden_layers": num_layers}
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
        return sizes | heads | {"vocab_size": 320, "max_position_embeddings": 16384} | more

    def model_of(width: int, hash_rows: int) -> tuple[BltConfig, int]:
        config = BltConfig(
            vocab_size=320,
            max_position_embeddings=16384,
            encoder_hash_byte_group_vocab=hash_rows,
            patcher_config=part(128, 2),
            encoder_config=part(192, 1, hidden_size_global=width),
            decoder_config=part(192, 3, hidden_size_global=width),
            global_config=part(width, 4),
            pad_token_id=256,
            bos_token_id=257,
            eos_token_id=258,
        )
        for name, value in part(width, 4).items():  # `generate` looks for sizes in the config itself
            setattr(config, name, value)
        with torch.device("meta"):
            return config, BltForCausalLM(config).num_parameters()

    rows, width = 2048, 192
    if model_of(width, rows)[1] > stored_parameters:
        raise ValueError(
            f"{stored_parameters:,} parameters are too few for BLT, whose smallest has {model_of(width, rows)[1]:,}: "
            "leave it out"
        )
    while model_of(width + 64, rows)[1] <= stored_parameters:
        width += 64
    config, used = model_of(width, rows)
    row_cost = len(config.encoder_hash_byte_group_size) * config.encoder_config.hidden_size
    return model_of(width, rows + (stored_parameters - used) // row_cost)[0]


@torch.no_grad()
def blt(stored_parameters: int, text: str, patch_bytes: float = 4.5) -> tuple[BltForCausalLM, STLMTokenizer]:
    """An untrained BLT whose patches have `patch_bytes` bytes of `text` on average.

    Its byte model is untrained, too, and finds nearly every byte surprising; so the threshold is a quantile of its entropies.
    """
    model, tokenizer = BltForCausalLM(blt_config(stored_parameters)).eval(), STLMTokenizer()
    sample = torch.tensor([tokenizer(text[:4096])["input_ids"]])
    entropies, _, _ = model.model.patcher(sample)
    model.config.patching_threshold = float(entropies.flatten().quantile(1 - 1 / patch_bytes))
    return model, tokenizer
