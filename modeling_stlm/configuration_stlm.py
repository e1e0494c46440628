# SPDX-License-Identifier: Apache-2.0
"""Configuration of STLM: a pooled byte-level transformer with a weight-tied trunk (arXiv:2405.14159).

Sizes come in two levels. Fields of the byte level (embedding, local encoder, local decoder, head) have the usual names
of the library, since ids, logits, hidden states and attentions are per byte. Fields of the patch level start with
`trunk_`. Lengths carry their unit: `_bytes`, `_characters`, `_layers`.
"""

import json
from pathlib import Path
from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .cache_stlm import BYTE_SLOT, PATCH_STATE_SLOT, TRUNK_SLOT


PRESETS = Path(__file__).with_name("presets")
HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")


@strict
class STLMConfig(PreTrainedConfig):
    r"""
    Configuration of an [`STLMModel`]. The defaults are the sizes of the preset `stlm-10m`, without layer sharing,
    match embeddings and a window of the trunk.

    Args:
        vocab_size (`int`, defaults to 320): 256 bytes, then special tokens, with room for added ones.
        hidden_size, intermediate_size (`int`, default to 128 and 320): byte level and its feed-forward layers.
        num_local_encoder_layers, num_local_decoder_layers (`int`, default to 1 and 2): before and after the trunk.
        byte_mixers (`list[str]`, *optional*):
            Mixer of every byte layer, local encoder first: `"conv"` (gated short convolution over `conv_kernel_size`
            bytes, as in LFM2) or `"attention"` (over `attention_window_bytes`, the current byte included, with
            `num_attention_heads`, `num_key_value_heads` and `head_dim`). Defaults to all `"conv"`.
        ngram_orders (`list[int]`, *optional*):
            Lengths in bytes of the hashed n-grams whose embeddings are added to the byte embedding (BLT,
            arXiv:2412.09871, section 3.2.1); `[]` for none. Defaults to `[2, 3, 4, 5]`.
        ngram_word_bytes (`int`, defaults to 12): one more: the word so far, at most its last so many bytes; 0 for none.
        ngram_rows (`int`, defaults to 39400): rows of the table of each n-gram length and of the words.
        ngram_embedding_size (`int`, *optional*, defaults to 32):
            Their width; one matrix projects them to `hidden_size`. `None`: as wide as that and summed, as in BLT.
        match_bytes (`int`, defaults to 0):
            Add an embedding of the byte that followed the last occurrence of the same so many bytes; 0 for none.
        match_doublings (`int`, defaults to 0):
            Prefer the last place where twice, four times, ... so many bytes are the same, up to so many doublings.
        context_ngram_orders (`list[int]`, *optional*):
            Different lengths in bytes (1 to 6) of n-grams whose last places in the document so far are looked up, to add
            the mean of embeddings of the bytes that followed there (n-gram heads, arXiv:2401.12973). Defaults to `[]`.
        context_ngram_places (`int`, defaults to 4): how many places of each n-gram.
        patching (`str`, defaults to `"spacelike"`):
            Where patches end. `"spacelike"`: at the first byte after a word that is neither letter, digit nor part of
            a multi-byte character (SpaceByte, arXiv:2404.14408). `"fixed"`: every `patch_bytes` (MegaByte).
            `"vocabulary"`: where a piece of `patch_vocabulary` has ended (the BPE pooling of arXiv:2405.14159, made
            causal). `"learned"`: where a router finds a byte unlike the one before it (H-Net, arXiv:2507.07955).
        patch_bytes (`int`, defaults to 6):
            Length of a patch under `"fixed"`, target for the average length under `"learned"` (2 or more).
        max_patch_bytes (`int`, defaults to 16): of the other rules; pieces of a vocabulary are cut to one byte less.
        max_patch_characters (`int`, defaults to 3): of three or more bytes under `"spacelike"`, for text without spaces.
        patch_vocabulary (`str`, *optional*): pieces of byte-level BPE, `" ".join(tokenizer.get_vocab())`.
        ratio_loss_weight (`float`, defaults to 0.03): of the loss that keeps learned patches near `patch_bytes`.
        trunk_hidden_size, trunk_intermediate_size (`int`, default to 320 and 768): widths of the trunk.
        trunk_num_attention_heads, trunk_num_key_value_heads (`int`, default to 10 and 2): heads of the trunk.
        trunk_window_patches (`int`, *optional*):
            Attention of the trunk sees the last so many patches, the current one included (with `is_causal=False`, as
            many on either side); all of them if left out. Caches keep all: it saves time, not memory.
        num_trunk_layers, num_unique_trunk_layers (`int`, default to 5 and all): layers that run, layers that are stored.
        layer_sharing (`str`, defaults to `"none"`):
            How stored layers make up the depth. `"none"`: each runs once. `"immediate"`: each inner layer runs several
            times in a row (MobileLLM, arXiv:2402.14905). `"cycle"`: the stored layers run in turn, repeatedly.
            `"middle"`: one layer in the middle runs several times. `"ffn"`: every layer has its own attention; the
            stored feed-forward layers are shared as in `"immediate"`. Except in `"cycle"`, the first and the last
            layer keep weights of their own (in `"middle"` of two stored layers, the first).
        sharing_lora_rank (`int`, defaults to 0): of what passes add to matrices they share (arXiv:2410.20672).
        hidden_act (`str`, defaults to `"relu2"`): activation of the feed-forward layers.
        rope_theta, norm_eps (`float`, default to 10000.0 and 1e-06): base of rotary embeddings, addend in LayerNorms.
        initializer_range (`float`, defaults to 0.02): of fresh embeddings and convolutions.
        hidden_dropout, attention_dropout (`float`, default to 0.0): of all block outputs, and of attention probabilities.
        is_causal (`bool`, defaults to `True`):
            With `False` (encoders, masked language models) every part looks both ways, the end of the text closes the
            last patch, a byte sees the patch that it belongs to, and there is no cache.
        mask_token_id (`int`, *optional*, defaults to 259): with `is_causal=False`, a letter for the patching rule.
        classifier_pooling (`str`, defaults to `"mean"`), classifier_dropout (`float`, defaults to 0.0):
            Classification heads read the `"mean"` over the bytes or the `"last"` one, after this dropout.
        max_position_embeddings (`int`, defaults to 16384): context in bytes; nothing in the model is sized by it.
        num_hidden_layers (`int`, *optional*): number of cache slots, derived: the library sizes its caches by it.
    """

    model_type = "stlm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "boundaries", "ratio_loss"]
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "ngram_embedding": "free_full_weight",
        "match_embedding": "free_full_weight",
        "context_ngram_embedding": "free_full_weight",
        "local_encoder.*": "free_full_weight",
        "trunk.attention_blocks.*": "free_full_weight",
        "trunk.feed_forward_blocks.*": "free_full_weight",
        "trunk.own_matrices.*": "free_full_weight",
        "local_decoder.*": "free_full_weight",
        "final_norm": "keep_full_weight",
    }

    vocab_size: int = 320
    hidden_size: int = 128
    intermediate_size: int = 320
    num_local_encoder_layers: int = 1
    num_local_decoder_layers: int = 2
    byte_mixers: list[Literal["conv", "attention"]] | None = None
    conv_kernel_size: int = 4
    attention_window_bytes: int = 64
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    ngram_orders: list[int] | None = None
    ngram_word_bytes: int = 12
    ngram_rows: int = 39400
    ngram_embedding_size: int | None = 32
    match_bytes: Literal[0, 2, 3, 4, 5, 6] = 0
    match_doublings: Literal[0, 1, 2, 3, 4] = 0
    context_ngram_orders: list[int] | None = None
    context_ngram_places: int = 4
    patching: Literal["spacelike", "fixed", "vocabulary", "learned"] = "spacelike"
    patch_bytes: int = 6
    max_patch_bytes: int = 16
    max_patch_characters: int = 3
    patch_vocabulary: str | None = None
    ratio_loss_weight: float | int = 0.03
    trunk_hidden_size: int = 320
    trunk_intermediate_size: int = 768
    trunk_num_attention_heads: int = 10
    trunk_num_key_value_heads: int | None = 2
    trunk_head_dim: int | None = None
    trunk_window_patches: int | None = None
    num_trunk_layers: int = 5
    num_unique_trunk_layers: int | None = None
    layer_sharing: Literal["none", "immediate", "cycle", "middle", "ffn"] = "none"
    sharing_lora_rank: int = 0
    hidden_act: str = "relu2"
    rope_theta: float | int = 10000.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    is_causal: bool = True
    mask_token_id: int | None = 259
    classifier_pooling: Literal["mean", "last"] = "mean"
    classifier_dropout: float | int = 0.0
    max_position_embeddings: int = 16384
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 256
    bos_token_id: int | None = 257
    eos_token_id: int | list[int] | None = 258
    num_hidden_layers: int | None = None

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "STLMConfig":
        """The configuration shipped under `name` (`"stlm-3m"`, `"stlm-10m"`, ...), with `overrides` on top."""
        path = PRESETS / f"{name}.json"
        if not path.is_file():
            known = sorted(preset.stem for preset in PRESETS.glob("*.json"))
            hint = f"choose one of {known}" if known else "presets come with the installed package `stlm` only"
            raise ValueError(f"there is no preset {name!r}: {hint}")
        return cls(**(json.loads(path.read_text(encoding="utf-8")) | overrides))

    def __post_init__(self, **kwargs):
        def default(name, value):
            if getattr(self, name) is None:
                setattr(self, name, value)

        default("byte_mixers", ["conv"] * self.num_byte_layers)
        default("ngram_orders", [2, 3, 4, 5])
        default("context_ngram_orders", [])
        default("num_key_value_heads", self.num_attention_heads)
        default("head_dim", self.hidden_size // max(1, self.num_attention_heads))
        default("trunk_num_key_value_heads", self.trunk_num_attention_heads)
        default("trunk_head_dim", self.trunk_hidden_size // max(1, self.trunk_num_attention_heads))
        default("num_unique_trunk_layers", self.num_trunk_layers)
        self.derive_slots()
        super().__post_init__(**kwargs)
        # A checkpoint of any head loads through every Auto class, also where the package is not installed.
        self.auto_map = {
            "AutoConfig": "configuration_stlm.STLMConfig",
            "AutoModel": "modeling_stlm.STLMModel",
            "AutoModelForCausalLM": "modeling_stlm.STLMForCausalLM",
            **{f"AutoModelFor{head}": f"heads_stlm.STLMFor{head}" for head in HEADS},
        }

    def derive_slots(self) -> None:
        """Set `num_hidden_layers`, whatever it was: a value must not outlive a change of the layers that it counts."""
        self.num_hidden_layers = self.num_byte_layers + 1 + self.num_trunk_layers

    def settle(self) -> None:
        """Derive and check again, for a model: fields may have been set since the config was made.

        Not `validate`, which refuses `output_attentions` once a model has chosen its attention.
        """
        self.derive_slots()
        self.validate_sizes()
        self.validate_patching()
        self.validate_trunk()

    @property
    def num_byte_layers(self) -> int:
        return self.num_local_encoder_layers + self.num_local_decoder_layers

    @property
    def longest_lookup(self) -> int:
        """Most bytes that are looked up at once in the document so far; 0 if none are."""
        return max([self.match_bytes, *self.context_ngram_orders])

    @property
    def layer_types(self) -> list[str]:
        """Kind of each cache slot, from which the library builds caches (`cache_stlm.py` registers the kinds)."""
        # Not a field: a process without this code would refuse a saved list of our own kinds.
        slots = [BYTE_SLOT] * self.num_byte_layers + [PATCH_STATE_SLOT] + [TRUNK_SLOT] * self.num_trunk_layers
        return slots[: self.num_hidden_layers]

    @property
    def trunk_schedule(self) -> list[tuple[int, int]]:
        """For each pass of the trunk, which stored attention block and which stored feed-forward block run."""
        depth, unique = self.num_trunk_layers, self.num_unique_trunk_layers
        before, after = unique // 2, unique - 1 - unique // 2  # own layers around the repeated one of "middle"
        inner = range(depth - 2)  # of "immediate": dealt out evenly, in order, to the inner stored layers
        passes = {
            "none": [*range(depth)],
            "cycle": [i % unique for i in range(depth)],
            "middle": [*range(before), *[before] * (depth - before - after), *range(before + 1, unique)],
            "immediate": [0, *(1 + i * (unique - 2) // (depth - 2) for i in inner), unique - 1][:depth],
        }
        order = passes["immediate" if self.layer_sharing == "ffn" else self.layer_sharing]
        return list(zip(range(depth) if self.layer_sharing == "ffn" else order, order))

    def validate_sizes(self):
        for name in ("patch_bytes", "max_patch_bytes", "max_patch_characters", "ngram_rows", "conv_kernel_size") + (
            *("num_local_encoder_layers", "num_local_decoder_layers", "attention_window_bytes", "hidden_size"),
            "context_ngram_places",
            *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "ngram_embedding_size"),
            *(
                "trunk_hidden_size",
                "trunk_intermediate_size",
                "trunk_num_attention_heads",
                "trunk_num_key_value_heads",
            ),
            *("trunk_head_dim", "trunk_window_patches", "num_trunk_layers", "num_unique_trunk_layers", "vocab_size"),
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.sharing_lora_rank < 0:
            raise ValueError(f"sharing_lora_rank={self.sharing_lora_rank} must be at least 0")
        if any(order < 2 for order in [*self.ngram_orders, self.ngram_word_bytes or 2]):
            raise ValueError(
                f"ngram_orders={self.ngram_orders} and ngram_word_bytes={self.ngram_word_bytes} must be at least 2 "
                "(a byte has its own embedding), or [] and 0 for none"
            )
        orders = self.context_ngram_orders
        if len(set(orders)) < len(orders) or any(not 1 <= order <= 6 for order in orders):
            raise ValueError(
                f"context_ngram_orders={orders} must be different lengths from 1 to 6, or [] for none: match_bytes and "
                "match_doublings look up longer n-grams"
            )
        if len(self.byte_mixers) != self.num_byte_layers:
            raise ValueError(
                f"byte_mixers has {len(self.byte_mixers)} entries for {self.num_byte_layers} byte layers "
                "(num_local_encoder_layers + num_local_decoder_layers): give one for each, or leave it out"
            )
        for level in ("", "trunk_"):
            heads, groups, width = (
                getattr(self, level + name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
            )
            if heads % groups:
                raise ValueError(
                    f"{level}num_attention_heads={heads} must be a multiple of {level}num_key_value_heads={groups}"
                )
            if width % 2:
                raise ValueError(f"{level}head_dim={width} must be even: rotary embedding turns pairs of channels")

    def validate_patching(self):
        if self.patching == "vocabulary" and (self.max_patch_bytes < 2 or not (self.patch_vocabulary or "").split()):
            raise ValueError(
                f"patching='vocabulary' needs max_patch_bytes of at least 2, got {self.max_patch_bytes}, and pieces in "
                "the alphabet of byte-level BPE separated by spaces, as in ' '.join(tokenizer.get_vocab()): got "
                f"{len((self.patch_vocabulary or '').split())} pieces in patch_vocabulary"
            )
        if self.patching == "learned" and not 2 <= self.patch_bytes < self.max_patch_bytes:
            raise ValueError(
                f"patching='learned' needs an average length patch_bytes={self.patch_bytes} of at least 2 and less than "
                f"max_patch_bytes={self.max_patch_bytes}"
            )

    def validate_trunk(self):
        depth, unique, sharing = self.num_trunk_layers, self.num_unique_trunk_layers, self.layer_sharing
        smallest = {"none": depth, "immediate": min(depth, 3), "ffn": min(depth, 3)}.get(sharing, 1)
        if not smallest <= unique <= depth:
            raise ValueError(
                f"num_unique_trunk_layers={unique} counts the stored layers: layer_sharing={sharing!r} with "
                f"num_trunk_layers={depth} needs {smallest} to {depth} of them"
            )

    def validate_layer_type(self):
        """The library checks a field `layer_types` here; ours is derived."""


__all__ = ["STLMConfig"]
