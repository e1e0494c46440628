# SPDX-License-Identifier: Apache-2.0
"""An encoder of sentences from a larger one: its embeddings, copied as in Reimers & Gurevych, arXiv:2004.09813.

    embeddings = compress(teacher.encode(passages), model.config.hidden_size)
    data = EmbeddedPassages(passages, embeddings, tokenizer)
    EmbeddingTrainer(model, args, train_dataset=data, data_collator=data.collate).train()
    save_sentence_transformer(model, tokenizer, "runs/encoder")

The model is an [`STLMForMaskedLM`]: the mean of its hidden states over the bytes is the embedding of a passage, without
further layers, and the same pass predicts masked bytes, so that one trunk serves fill-mask, classes, spans and embeddings.
The paper has a teacher of the same width and a squared error; here the teacher's embeddings are projected on their main
directions, and the loss is one minus the cosine.

Shapes: N passages, E width of the teacher, D byte width, B rows, T bytes.
"""

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer

from modeling_stlm.heads_stlm import STLMForMaskedLM, mean_over_bytes
from modeling_stlm.layers_stlm import STLMShortConv
from modeling_stlm.modeling_stlm import STLMPreTrainedModel
from modeling_stlm.training.objectives import NUM_BYTES, random_spans


# A full stop and spaces end a sentence, as do the wide ones of Chinese and Japanese, and closing marks after these.
SENTENCE = re.compile(".+?(?:[.!?](?: +|$)|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\uff09\u201d]*|$)")
NUM_FITTED = 49_152  # embeddings that tell the main directions: more may be added later


def passages_of(document: str, max_bytes: int, generator: random.Random) -> list[str]:
    """Runs of whole sentences of a paragraph, up to a random length between 40 and `max_bytes` bytes.

    A third of them start with the first line of the document, its title, if there are others. A sentence longer than
    `max_bytes` is cut. Of n passages about the square root of n are taken, so that long documents do not outweigh all
    others.
    """
    title, *paragraphs = document.strip().split("\n")
    if not paragraphs:
        title, paragraphs = "", [title]
    found = []
    for paragraph in paragraphs:
        passage, limit = "", generator.randint(40, max_bytes)
        for sentence in sentences_of(paragraph.strip(), max_bytes):
            if passage and len((passage + sentence).encode()) > limit:
                found.append(passage.strip())
                passage, limit = "", generator.randint(40, max_bytes)
            passage += sentence
        found.append(passage.strip())
    found = [passage for passage in found if 30 <= len(passage.encode()) <= max_bytes]
    chosen = generator.sample(found, round(len(found) ** 0.5))
    return [
        f"{title} {passage}" if generator.random() < 1 / 3 and 0 < len(title) < 80 else passage for passage in chosen
    ]


def sentences_of(paragraph: str, max_bytes: int) -> list[str]:
    """Sentences with the spaces after them; pieces of at most `max_bytes` bytes of those that are longer."""
    pieces = []
    for sentence in re.findall(SENTENCE, paragraph):
        encoded = sentence.encode()
        while len(encoded) > max_bytes:
            piece = encoded[:max_bytes].decode(errors="ignore")
            pieces.append(piece)
            encoded = encoded[len(piece.encode()) :]
        pieces.append(encoded.decode())
    return pieces


def compress(embeddings: np.ndarray, size: int) -> np.ndarray:
    """Embeddings (N, E) on the `size` main directions of the first of them, of length one: float32 (N, size).

    An embedding of zeros stays one.

    Raises:
        ValueError: if E is less than `size`.
    """
    if embeddings.shape[1] < size:
        raise ValueError(f"the teacher's embeddings have width {embeddings.shape[1]}, expected at least {size}")
    embeddings = embeddings.astype(np.float32)
    sample = embeddings[:NUM_FITTED]
    _, directions = np.linalg.eigh(sample.T @ sample)  # ascending
    projected = embeddings @ directions[:, : -size - 1 : -1]
    lengths = np.linalg.norm(projected, axis=1, keepdims=True)
    return projected / np.maximum(lengths, np.finfo(np.float32).tiny)


class EmbeddedPassages(Dataset):
    """Passages with what a teacher makes of them; half of the rows are damaged, always in the same way.

    Items are dicts of `input_ids (T,)`, `labels (T,)` (-100 except at masked bytes) and `embeddings (D,)`. A quarter of the
    rows has masked spans, another quarter is noisy, if there is `noise`: the embedding to learn is that of the clean text.

    Args:
        passages (`list[str]`).
        embeddings (`np.ndarray` of shape `(N, D)`): of length one.
        tokenizer: gives ids, `mask_token_id` and `pad_token_id`.
        noise (`Callable[[str, random.Random], str]`, *optional*): makes a text noisy.
        share (`float`, defaults to 0.2), span_bytes (`int`, defaults to 5): of the bytes that are masked, and the length
            of the spans.
    """

    def __init__(
        self,
        passages: list[str],
        embeddings: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        noise: Callable[[str, random.Random], str] | None = None,
        share: float = 0.2,
        span_bytes: int = 5,
    ):
        if len(passages) != len(embeddings):
            raise ValueError(f"got {len(passages)} passages and {len(embeddings)} embeddings: give one for each")
        self.passages, self.embeddings, self.tokenizer = passages, embeddings, tokenizer
        self.noise, self.share, self.span_bytes = noise, share, span_bytes

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = random.Random(index)
        text, kind = self.passages[index], generator.choice(("clean", "clean", "masked", "noisy"))
        if kind == "noisy" and self.noise is not None:
            text = self.noise(text, generator)
        ids = torch.tensor(self.tokenizer(text)["input_ids"])
        labels = torch.full_like(ids, -100)
        if kind == "masked":
            spans = random_spans(ids[None], self.share, self.span_bytes, torch.Generator().manual_seed(index))[0]
            masked = spans & (ids < NUM_BYTES)
            labels[masked] = ids[masked]
            ids[masked] = self.tokenizer.mask_token_id
        return {"input_ids": ids, "labels": labels, "embeddings": torch.from_numpy(self.embeddings[index])}

    def collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Rows as one batch, padded to the longest."""

        def padded(name, value):
            return torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)

        ids = padded("input_ids", self.tokenizer.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": (ids != self.tokenizer.pad_token_id).long(),
            "labels": padded("labels", -100),
            "embeddings": torch.stack([row["embeddings"] for row in rows]),
        }


class EmbeddingTrainer(Trainer):
    """`Trainer` of a [`STLMForMaskedLM`] whose loss is that of the masked bytes plus `weight` times the embeddings' one.

    Args:
        embedding_weight (`float`, defaults to 10.0): of one minus the cosine to the teacher's embeddings.
    """

    def __init__(self, *args, embedding_weight: float = 10.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # a mean over rows and one over bytes: no common count
        self.embedding_weight = embedding_weight

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if "embeddings" not in self._signature_columns:  # no argument of the model, and `Trainer` would remove it
            self._signature_columns.append("embeddings")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        embeddings, labels = inputs.pop("embeddings"), inputs.pop("labels")
        outputs = model(**inputs, output_hidden_states=True)
        pooled = mean_over_bytes(outputs.hidden_states[-1], inputs["attention_mask"])
        loss = self.embedding_weight * (1 - F.cosine_similarity(pooled, embeddings)).mean()
        is_masked = labels != -100
        nats = F.cross_entropy(outputs.logits[is_masked].float(), labels[is_masked], reduction="sum")
        loss = loss + nats / is_masked.sum().clamp(min=1)
        return (loss, outputs) if return_outputs else loss


@torch.no_grad()
def look_both_ways(model: STLMPreTrainedModel) -> STLMPreTrainedModel:
    """Weights of a causal checkpoint, loaded with `is_causal=False`, with each tap of a convolution at its old place.

    A convolution over the last N bytes becomes one over bytes before and after: its oldest taps make room for new ones
    after the byte, which start at zero.
    """
    for module in model.modules():
        if isinstance(module, STLMShortConv) and module.num_after:
            module.conv.weight.copy_(F.pad(module.conv.weight[..., module.num_after :], (0, module.num_after)))
    return model


def save_sentence_transformer(model: STLMForMaskedLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the model as every Auto class loads it, and what `SentenceTransformer(folder)` wants: mean pooling.

    The tokenizer is saved without a chat template: with one, sentence-transformers makes a chat message of every text.
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    modules = [("0", "", "sentence_transformers.models.Transformer")]
    modules.append(("1", "1_Pooling", "sentence_transformers.models.Pooling"))
    width = model.config.hidden_size
    files = {
        "modules.json": [
            {"idx": i, "name": name, "path": path, "type": kind} for i, (name, path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True},
        "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = [
    "EmbeddedPassages",
    "EmbeddingTrainer",
    "compress",
    "look_both_ways",
    "passages_of",
    "save_sentence_transformer",
]
