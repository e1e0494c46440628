# SPDX-License-Identifier: Apache-2.0
"""Tiny models of four families behind one interface, so that the same checks run on all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BltConfig,
    ByT5Tokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    TokenizersBackend,
)

from modeling_stlm import STLMTokenizer
from tests.tiny import MIXERS, SHARING, TEXT, randomize, tiny_config


NUM_NEW = 24
IDS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16}


def stlm_config(**overrides) -> PreTrainedConfig:
    return tiny_config(**MIXERS["both"], **SHARING["cycle"], **({"use_cache": True} | overrides))


def llama_config(**overrides) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=320, intermediate_size=24, **SIZES, tie_word_embeddings=True, pad_token_id=0, **overrides
    )


def blt_config(**overrides) -> PreTrainedConfig:
    part = SIZES | {"intermediate_size": 24, "vocab_size": 320, "max_position_embeddings": 512}
    config = BltConfig(
        vocab_size=320,
        max_position_embeddings=512,
        encoder_hash_byte_group_size=[3, 4],
        encoder_hash_byte_group_vocab=64,
        patcher_config=part,
        encoder_config=part,
        decoder_config=part | {"hidden_size_global": 32},
        global_config=part | {"hidden_size": 32},
        **IDS,
        **overrides,
    )
    # Without these, generation and several parts of the library find no sizes in a BltConfig.
    for name, value in SIZES.items():
        setattr(config, name, value)
    return config


def byt5_config(**overrides) -> PreTrainedConfig:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return T5Config(vocab_size=384, **sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **overrides)


def words_tokenizer() -> TokenizersBackend:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    return TokenizersBackend(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@dataclass(frozen=True)
class Kit:
    """A family of models: `config(**overrides)` is tiny, with a vocabulary for `tokenizer()`."""

    name: str
    config: Callable[..., PreTrainedConfig]
    tokenizer: Callable[[], TokenizersBackend]
    is_encoder_decoder: bool = False

    def model(self, auto_class=None, **overrides) -> PreTrainedModel:
        auto_class = auto_class or (AutoModelForSeq2SeqLM if self.is_encoder_decoder else AutoModelForCausalLM)
        return randomize(auto_class.from_config(self.config(**overrides)))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer().encode(text, add_special_tokens=self.is_encoder_decoder)  # encoders want an end

    def batch(self, rows: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
        tokenizer = self.tokenizer()
        tokenizer.padding_side = side
        padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}

    def generate(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
        """New ids (B, NUM_NEW)."""
        options = {"do_sample": False, "min_new_tokens": NUM_NEW, "max_new_tokens": NUM_NEW} | options
        found = model.generate(**inputs, eos_token_id=None, pad_token_id=self.tokenizer().pad_token_id, **options)
        return found[:, -NUM_NEW:]

    def logits(self, model: PreTrainedModel, rows: list[list[int]], side: str = "left") -> list[torch.Tensor]:
        """Logits at the ids of each row; of a decoder behind an encoder, those of a few ids after each row."""
        inputs = self.batch(rows, side)
        with torch.no_grad():
            if self.is_encoder_decoder:
                decoder_ids = torch.tensor([[0, 40, 50, 60]]).expand(len(rows), -1)
                return list(model(**inputs, decoder_input_ids=decoder_ids).logits)
            logits = model(**inputs).logits
        return [row[mask == 1] for row, mask in zip(logits, inputs["attention_mask"])]


KITS = {
    "STLM": Kit("STLM", stlm_config, STLMTokenizer),
    "BLT": Kit("BLT", blt_config, STLMTokenizer),  # its own tokenizer is on the Hub only; bytes are bytes
    "ByT5": Kit("ByT5", byt5_config, ByT5Tokenizer, is_encoder_decoder=True),
    "Llama": Kit("Llama", llama_config, words_tokenizer),
}
