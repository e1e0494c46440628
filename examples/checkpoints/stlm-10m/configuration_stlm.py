# SPDX-License-Identifier: Apache-2.0
"""Configuration of STLM: a pooled byte-level transformer with a weight-tied trunk (arXiv:2405.14159).

Sizes come in two levels. The *byte level* (front and back layers) uses the usual field names of the library, because
that is the level users see: ids, logits, hidden states and attentions are per byte. The *patch level* (trunk) carries
the prefix `trunk_`. Lengths carry their unit: `_bytes`, `_characters`, `_layers`.
"""

import json
from pathlib import Path
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


PRESETS = Path(__file__).with_name("presets")
PATCHING_RULES = ("spacelike", "fixed", "vocabulary", "entropy", "learned")
PATCH_POOLING = ("mean_last", "mean", "last", "attention")
LAYER_SHARING = ("none", "immediate", "cycle", "middle", "ffn")
BYTE_MIXERS = ("conv", "attention")
NORM_TYPES = ("layer_norm", "rms_norm")
CLASSIFIER_POOLING = ("mean", "last")
# STLMForCausalLM and so on, each with the Auto class of the same ending.
HEADS = (
    "CausalLM",
    "MaskedLM",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
)


@strict
class STLMConfig(PreTrainedConfig):
    r"""
    Configuration of an [`STLMModel`]. The defaults are the sizes of the preset `stlm-10m`, without layer sharing.

    Args:
        vocab_size (`int`, defaults to 320):
            Number of ids: 256 bytes, then special tokens, rounded up to a multiple of 64 so that tokens can be added.
        hidden_size (`int`, defaults to 128):
            Width of the byte level, of the byte embedding and of the head.
        intermediate_size (`int`, defaults to 320):
            Width of the feed-forward layers of the byte level.
        num_front_layers (`int`, defaults to 1):
            Byte layers before pooling (the local encoder).
        num_back_layers (`int`, defaults to 2):
            Byte layers after unpooling (the local decoder).
        byte_mixers (`list[str]`, *optional*):
            Mixer of every byte layer, front layers first: `"conv"` (gated short causal convolution, as in LFM2) or
            `"attention"` (causal attention over a window). Both cost the same for every byte. Defaults to all `"conv"`.
        conv_kernel_size (`int`, defaults to 4):
            Bytes seen by one `"conv"` mixer, the current one included.
        attention_window_bytes (`int`, defaults to 64):
            Bytes seen by one `"attention"` mixer, the current one included.
        num_attention_heads (`int`, defaults to 4):
            Heads of the `"attention"` mixers.
        num_key_value_heads (`int`, *optional*):
            Key/value heads of the `"attention"` mixers. Defaults to `num_attention_heads`.
        head_dim (`int`, *optional*):
            Width of one head of the `"attention"` mixers. Defaults to `hidden_size // num_attention_heads`.
        ngram_orders (`list[int]`, *optional*):
            Lengths in bytes of the hashed n-grams whose embeddings are added to the byte embedding (BLT,
            arXiv:2412.09871, section 3.2.1). An empty list turns them off. Defaults to `[2, 3, 4, 5]`.
        ngram_word_bytes (`int`, defaults to 12):
            One more n-gram at each byte: the word so far, at most its last so many bytes. A word ends with the first byte
            behind it that is neither letter, digit nor part of a multi-byte character, and with any special token, a
            mask included. 0 turns it off.
        ngram_rows (`int`, defaults to 39400):
            Rows of the embedding table of each n-gram length and of the words.
        ngram_embedding_size (`int`, *optional*, defaults to 32):
            Width of the n-gram embeddings, which one matrix takes to `hidden_size` together: more rows for the same
            parameters. With `None` they are as wide as `hidden_size` and added up, as in BLT.
        patching (`str`, defaults to `"spacelike"`):
            Where patches end. `"spacelike"`: at the first byte after a word that is neither letter, digit nor part of
            a multi-byte character (SpaceByte, arXiv:2404.14408). `"fixed"`: every `patch_bytes` bytes (MegaByte).
            `"vocabulary"`: at the byte that proves that a piece of `patch_vocabulary` has ended (the pooling by a BPE
            tokenizer of arXiv:2405.14159, made causal). `"entropy"`: after bytes whose next one a table of byte n-grams
            finds hard to guess (BLT); the table is filled by `modeling_stlm.training.entropy_table`. `"learned"`: where
            a router finds a byte unlike the one before it (H-Net, arXiv:2507.07955).
        patch_bytes (`int`, defaults to 6):
            Length of a patch under `patching="fixed"`; average length to train for under `"learned"`, from 2 on.
        max_patch_bytes (`int`, defaults to 16):
            Longest patch of every rule but `"fixed"`; longer pieces of a vocabulary are cut to one byte less.
        max_patch_characters (`int`, defaults to 3):
            Under `patching="spacelike"`, complete UTF-8 characters of three or more bytes after which a patch ends
            (scripts such as Chinese, Japanese or Thai have no spaces).
        patch_vocabulary (`str`, *optional*):
            Pieces of `patching="vocabulary"` in the alphabet of byte-level BPE, with spaces between them:
            `" ".join(tokenizer.get_vocab())`.
        entropy_order (`int`, defaults to 4):
            Under `patching="entropy"`, bytes from which the table guesses the next.
        entropy_rows (`int`, defaults to 65536):
            Rows of that table, into which byte n-grams are hashed.
        entropy_threshold (`float`, defaults to 3.5):
            Entropy in bits above which a patch ends. The default makes patches of about 5 bytes of English.
        ratio_loss_weight (`float`, defaults to 0.03):
            Weight of the loss that holds the patches of `patching="learned"` near `patch_bytes`.
        patch_pooling (`str`, defaults to `"mean_last"`):
            What the trunk reads of a patch: the `"mean"` over its bytes, the `"last"` byte, both (`"mean_last"`), or an
            `"attention"` of `num_attention_heads` learned queries over its bytes.
        trunk_hidden_size (`int`, defaults to 320):
            Width of the trunk.
        trunk_intermediate_size (`int`, defaults to 768):
            Width of the feed-forward layers of the trunk.
        trunk_num_attention_heads (`int`, defaults to 10):
            Attention heads of the trunk.
        trunk_num_key_value_heads (`int`, *optional*, defaults to 2):
            Key/value heads of the trunk. `None` means `trunk_num_attention_heads`.
        trunk_head_dim (`int`, *optional*):
            Width of one head of the trunk. Defaults to `trunk_hidden_size // trunk_num_attention_heads`.
        num_trunk_layers (`int`, defaults to 5):
            Depth of the trunk: layers that run for every patch.
        num_unique_trunk_layers (`int`, *optional*):
            Layers of the trunk that are stored. Defaults to `num_trunk_layers`.
        layer_sharing (`str`, defaults to `"none"`):
            How stored layers make up the depth. `"none"`: each runs once. `"immediate"`: each inner layer runs several
            times in a row (MobileLLM, arXiv:2402.14905). `"cycle"`: the stored layers run in turn, again and again.
            `"middle"`: one layer in the middle runs several times. `"ffn"`: every layer has its own attention and the
            stored feed-forward layers are shared as in `"immediate"`. Except in `"cycle"`, the first and the last
            layer keep weights of their own (in `"middle"` of two stored layers, the first).
        hidden_act (`str`, defaults to `"relu2"`):
            Activation of the feed-forward layers.
        rope_theta (`float`, defaults to 10000.0):
            Base of the rotary embedding over the patch index and, in `"attention"` mixers, over the byte index.
        norm_type (`str`, defaults to `"layer_norm"`):
            `"layer_norm"` (with a scale and without a bias: one kernel everywhere) or `"rms_norm"` (several kernels on a
            CPU, three to four times as slow there).
        norm_eps (`float`, defaults to 1e-06):
            Added to the variance, or mean square, in every norm.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of embeddings and short convolutions at the start. Linear layers start at `1 / sqrt(fan_in)`, output
            projections at zero.
        hidden_dropout (`float`, defaults to 0.0):
            Dropout on the output of every mixer, attention and feed-forward layer; for training on repeated data.
        attention_dropout (`float`, defaults to 0.0):
            Dropout on attention probabilities.
        is_causal (`bool`, defaults to `True`):
            Whether a byte sees earlier bytes only. With `False` (for masked language modelling and encoders) every part
            looks both ways, the end of the text closes the last patch, a byte sees the patch it belongs to, and there is
            no cache.
        mask_token_id (`int`, *optional*, defaults to 259):
            With `is_causal=False`, stands for an unknown letter when patches are made.
        classifier_pooling (`str`, defaults to `"mean"`):
            What classification heads read: the `"mean"` over the bytes of a row or its `"last"` byte.
        classifier_dropout (`float`, defaults to 0.0):
            Dropout in front of classification heads.
        max_position_embeddings (`int`, defaults to 16384):
            Context in bytes that users may rely on. Nothing in the model is sized by it.
        tie_word_embeddings (`bool`, defaults to `True`):
            Whether the head shares the byte embedding.
        use_cache (`bool`, defaults to `True`):
            Whether `forward` returns a cache.
        num_hidden_layers (`int`, *optional*):
            Number of cache slots: one for each byte layer, one for pooling, one for each pass of the trunk. Derived;
            the library sizes its caches by it.

    Example:

    ```python
    >>> from modeling_stlm import STLMConfig
    >>> config = STLMConfig.from_preset("stlm-3m")
    >>> config.num_trunk_layers, config.num_unique_trunk_layers
    (4, 3)

    ```
    """

    model_type = "stlm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "boundaries", "ratio_loss"]
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "ngram_embed_tokens": "free_full_weight",
        "front_layers.*": "free_full_weight",
        "trunk.attention_blocks.*": "free_full_weight",
        "trunk.feed_forward_blocks.*": "free_full_weight",
        "back_layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 320
    hidden_size: int = 128
    intermediate_size: int = 320
    num_front_layers: int = 1
    num_back_layers: int = 2
    byte_mixers: list[str] | None = None
    conv_kernel_size: int = 4
    attention_window_bytes: int = 64
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    ngram_orders: list[int] | None = None
    ngram_word_bytes: int = 12
    ngram_rows: int = 39400
    ngram_embedding_size: int | None = 32
    patching: str = "spacelike"
    patch_bytes: int = 6
    max_patch_bytes: int = 16
    max_patch_characters: int = 3
    patch_vocabulary: str | None = None
    entropy_order: int = 4
    entropy_rows: int = 65536
    entropy_threshold: float | int = 3.5
    ratio_loss_weight: float | int = 0.03
    patch_pooling: str = "mean_last"
    trunk_hidden_size: int = 320
    trunk_intermediate_size: int = 768
    trunk_num_attention_heads: int = 10
    trunk_num_key_value_heads: int | None = 2
    trunk_head_dim: int | None = None
    num_trunk_layers: int = 5
    num_unique_trunk_layers: int | None = None
    layer_sharing: str = "none"
    hidden_act: str = "relu2"
    rope_theta: float | int = 10000.0
    norm_type: str = "layer_norm"
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    is_causal: bool = True
    mask_token_id: int | None = 259
    classifier_pooling: str = "mean"
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
        """The configuration shipped under `name` (`"stlm-3m"`, `"stlm-10m"`, ...), with `overrides` on top.

        Raises:
            ValueError: if there is no such preset.
        """
        path = PRESETS / f"{name}.json"
        if not path.is_file():
            known = sorted(preset.stem for preset in PRESETS.glob("*.json"))
            hint = f"choose one of {known}" if known else "presets come with the installed package `stlm` only"
            raise ValueError(f"there is no preset {name!r}: {hint}")
        return cls(**(json.loads(path.read_text(encoding="utf-8")) | overrides))

    def __post_init__(self, **kwargs):
        num_byte_layers = self.num_front_layers + self.num_back_layers
        if self.byte_mixers is None:
            self.byte_mixers = ["conv"] * num_byte_layers
        if self.ngram_orders is None:
            self.ngram_orders = [2, 3, 4, 5]
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.trunk_num_key_value_heads is None:
            self.trunk_num_key_value_heads = self.trunk_num_attention_heads
        if self.trunk_head_dim is None:
            self.trunk_head_dim = self.trunk_hidden_size // max(1, self.trunk_num_attention_heads)
        if self.num_unique_trunk_layers is None:
            self.num_unique_trunk_layers = self.num_trunk_layers
        # Whatever was passed: a saved value must not outlive a change of `num_trunk_layers`.
        self.num_hidden_layers = num_byte_layers + 1 + self.num_trunk_layers
        super().__post_init__(**kwargs)
        # A checkpoint of any head can be loaded through every Auto class, also where the package is not installed.
        self.auto_map = {
            "AutoConfig": "configuration_stlm.STLMConfig",
            "AutoModel": "modeling_stlm.STLMModel",
            **{f"AutoModelFor{head}": f"modeling_stlm.STLMFor{head}" for head in HEADS},
        }

    @property
    def ngram_lengths(self) -> list[int]:
        """Bytes that the hash of each n-gram table looks at: those of `ngram_orders`, then `ngram_word_bytes`."""
        return [*self.ngram_orders, *([self.ngram_word_bytes] if self.ngram_word_bytes else [])]

    @property
    def num_byte_layers(self) -> int:
        return self.num_front_layers + self.num_back_layers

    @property
    def pieces(self) -> list[bytes]:
        """Pieces of `patch_vocabulary` as bytes."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode  # slow to import, and rarely needed

        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        words = (self.patch_vocabulary or "").split()
        if foreign := [word for word in words if not all(character in byte_of for character in word)]:
            raise ValueError(
                f"patch_vocabulary has {len(foreign)} pieces that are not in the alphabet of byte-level BPE, such as "
                f"{foreign[:3]}: take the vocabulary of a byte-level tokenizer (GPT-2, Llama 3), without added tokens"
            )
        return [bytes(byte_of[character] for character in word) for word in words]

    @property
    def layer_types(self) -> list[str]:
        """Kind of each cache slot, from which the library builds caches (`cache_stlm.py` registers the kinds)."""
        # Not a field: a serialized list of our own kinds would fail the validation of a process without this code.
        types = ["stlm_byte"] * self.num_byte_layers + ["stlm_pool"] + ["stlm_patch"] * self.num_trunk_layers
        return types[: self.num_hidden_layers]

    @property
    def trunk_schedule(self) -> list[tuple[int, int]]:
        """For each pass of the trunk, the indices of the attention block and of the feed-forward block that run."""
        depth, unique = self.num_trunk_layers, self.num_unique_trunk_layers
        if self.layer_sharing == "none":
            order = list(range(depth))
        elif self.layer_sharing == "cycle":
            order = [i % unique for i in range(depth)]
        elif self.layer_sharing == "middle":
            before = unique // 2  # own layers before the repeated one; the others come after it
            after = unique - 1 - before
            order = [*range(before), *[before] * (depth - before - after), *range(unique - after, unique)]
        else:
            # Inner passes are dealt out evenly, in order, to the inner stored layers.
            inner = [1 + i * (unique - 2) // (depth - 2) for i in range(depth - 2)] if depth > 2 else []
            order = [0, *inner, unique - 1][:depth]
        attention = list(range(depth)) if self.layer_sharing == "ffn" else order
        return list(zip(attention, order))

    def validate_patching(self):
        if self.patching not in PATCHING_RULES:
            raise ValueError(f"patching={self.patching!r} is not known: choose one of {PATCHING_RULES}")
        if self.patch_pooling not in PATCH_POOLING:
            raise ValueError(f"patch_pooling={self.patch_pooling!r} is not known: choose one of {PATCH_POOLING}")
        if self.patching == "vocabulary" and not self.patch_vocabulary:
            raise ValueError(
                "patching='vocabulary' needs patch_vocabulary: pieces in the alphabet of byte-level BPE with spaces "
                "between them, as in ' '.join(tokenizer.get_vocab())"
            )
        if self.patching == "vocabulary" and not self.pieces:
            raise ValueError(f"patch_vocabulary={self.patch_vocabulary!r} has no pieces")
        if self.patching == "vocabulary" and self.max_patch_bytes < 2:
            raise ValueError(f"max_patch_bytes={self.max_patch_bytes} must be at least 2 under patching='vocabulary'")
        if self.patching == "learned" and not 2 <= self.patch_bytes < self.max_patch_bytes:
            raise ValueError(
                f"patch_bytes={self.patch_bytes} must be at least 2 and less than max_patch_bytes="
                f"{self.max_patch_bytes} under patching='learned': an average"
            )
        if self.patch_pooling == "attention" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads} "
                "under patch_pooling='attention'"
            )
        for name in (
            *("patch_bytes", "max_patch_bytes", "max_patch_characters", "ngram_rows"),
            *("entropy_order", "entropy_rows"),
            *("conv_kernel_size", "attention_window_bytes", "hidden_size", "trunk_hidden_size"),
            *("num_attention_heads", "num_key_value_heads"),
            *("trunk_num_attention_heads", "trunk_num_key_value_heads"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if any(order < 2 for order in self.ngram_orders or []):
            raise ValueError(f"ngram_orders={self.ngram_orders} must all be at least 2: a byte has its own embedding")
        if self.ngram_embedding_size is not None and self.ngram_embedding_size < 1:
            raise ValueError(
                f"ngram_embedding_size={self.ngram_embedding_size} must be at least 1, or None for hidden_size"
            )
        if self.ngram_word_bytes < 0 or self.ngram_word_bytes == 1:
            raise ValueError(
                f"ngram_word_bytes={self.ngram_word_bytes} must be at least 2, or 0 for no table of words: a byte has its "
                "own embedding"
            )

    def validate_byte_level(self):
        if self.num_front_layers < 1 or self.num_back_layers < 1:
            raise ValueError(
                f"num_front_layers={self.num_front_layers} and num_back_layers={self.num_back_layers} must be at least 1"
            )
        if self.norm_type not in NORM_TYPES:
            raise ValueError(f"norm_type={self.norm_type!r} is not known: choose one of {NORM_TYPES}")
        if len(self.byte_mixers) != self.num_byte_layers:
            raise ValueError(
                f"byte_mixers has {len(self.byte_mixers)} entries for {self.num_byte_layers} byte layers "
                f"(num_front_layers + num_back_layers): give one of {BYTE_MIXERS} for each, or leave it out"
            )
        if unknown := sorted(set(self.byte_mixers) - set(BYTE_MIXERS)):
            raise ValueError(f"byte_mixers={unknown} are not known: choose from {BYTE_MIXERS}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs of channels")

    def validate_trunk(self):
        depth, unique, sharing = self.num_trunk_layers, self.num_unique_trunk_layers, self.layer_sharing
        if sharing not in LAYER_SHARING:
            raise ValueError(f"layer_sharing={sharing!r} is not known: choose one of {LAYER_SHARING}")
        if not 1 <= unique <= depth:
            raise ValueError(
                f"num_unique_trunk_layers={unique} must be between 1 and num_trunk_layers={depth}: "
                "it counts the layers that are stored"
            )
        if sharing == "none" and unique != depth:
            raise ValueError(
                f"num_unique_trunk_layers={unique} differs from num_trunk_layers={depth}, "
                "but layer_sharing='none' stores every layer: set another layer_sharing or drop the field"
            )
        if sharing in ("immediate", "ffn") and unique < min(depth, 3):
            raise ValueError(
                f"layer_sharing={sharing!r} keeps the first and the last layer apart from the inner ones, so "
                f"num_unique_trunk_layers={unique} must be at least {min(depth, 3)}; use 'cycle' to share all"
            )
        if self.trunk_num_attention_heads % self.trunk_num_key_value_heads:
            raise ValueError(
                f"trunk_num_attention_heads={self.trunk_num_attention_heads} must be a multiple of "
                f"trunk_num_key_value_heads={self.trunk_num_key_value_heads}"
            )
        if self.trunk_head_dim % 2:
            raise ValueError(f"trunk_head_dim={self.trunk_head_dim} must be even: rotary embedding turns pairs")

    def validate_heads(self):
        if self.classifier_pooling not in CLASSIFIER_POOLING:
            raise ValueError(
                f"classifier_pooling={self.classifier_pooling!r} is not known: choose one of {CLASSIFIER_POOLING}"
            )

    def validate_layer_type(self):
        """The library checks the field `layer_types` here; ours is derived and always consistent."""


__all__ = ["STLMConfig"]
