# SPDX-License-Identifier: Apache-2.0
"""A repetition penalty that the weights of a trained model learn, so that its greedy text loops less without one.

    Trainer(model=with_objectives(model, [LearnedRepetitionPenalty()]), ...).train()

The likeliest text of a small model repeats itself, and more the longer it does (Holtzman et al., arXiv:1904.09751; Xu
et al., arXiv:2206.02369). Here the model writes greedy texts while it trains, and follows on them what it was at the
start with the words made unlikely that would repeat: its own outputs with a decoding rule as the teacher (on-policy
distillation, arXiv:2306.13649). The target is a distribution, so that the bytes within words stay what they were,
which unlikelihood training (arXiv:1908.04319) drives away, too.

Shapes: B rows, T bytes, V vocabulary.
"""

import copy
import math
import random
from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers import GenerationConfig

from modeling_stlm.modeling_stlm import STLMForCausalLM
from modeling_stlm.training.objectives import IGNORED, Objective, Step


LONGEST_PROMPT = 200
CALLS_BETWEEN = 48  # a text of the default sizes is drawn three times
GENERATED_AT_ONCE = 64


def is_in_word(byte: int) -> bool:
    """Whether `byte` is of a word: ASCII letters and digits, the apostrophe, bytes beyond ASCII."""
    return 128 <= byte < 256 or (byte < 128 and (chr(byte).isalnum() or byte == ord("'")))


def repeating_ids(ids: list[int], context_bytes: int, distance: int) -> set[int]:
    """First bytes of the words that began after the last `context_bytes` of `ids` where these stood before, up to
    `distance` ids back; of anything if there is no word in these. None within a word."""
    length = len(ids)
    if length <= context_bytes or is_in_word(ids[-1]):
        return set()
    context = ids[-context_bytes:]
    starts = range(max(context_bytes, length - distance), length)
    found = {ids[i] for i in starts if ids[i - context_bytes : i] == context}
    return set(filter(is_in_word, found)) if any(map(is_in_word, context)) else found


def divergences(log_probs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence (B, T) of `logits (B, T, V)` from `log_probs (B, T, V)`."""
    return F.kl_div(F.log_softmax(logits.float(), -1), log_probs, reduction="none", log_target=True).sum(-1)


class Text(NamedTuple):
    """A greedy text with its prompt."""

    ids: list[int]
    prompt_length: int
    repeating: dict[int, list[int]]  # by the place after which a word would repeat: its first bytes


class LearnedRepetitionPenalty(Objective):
    """Follows the model as it was at the start, with a penalty on words that repeat on greedy texts of its own.

    For a trained model, or one that was fine-tuned: untrained weights have nothing to teach. The objective is the
    divergence to the probabilities of the start, on the bytes of the batch and on texts: every 48 calls the model
    goes on greedily for `text_bytes` from up to `num_texts` prompts, of at most 200 bytes, out of the rows of the
    last calls, and until the next time each call draws `rows_per_call` of these texts. Where a word begins after
    `context_bytes` that stood within the last `distance` bytes, the logits of the bytes that began a word there are
    lower by `penalty`, and the byte counts ten times (so does whatever repeats after as many bytes that are of no
    word). Repeats from further back, such as a passage that is written twice, are not touched, nor are scripts
    without spaces. The mean over the bytes that were written in the drawn texts is added to that over the bytes of
    the batch. The larger the weight of the objective, the closer the model stays to what it was on other text.

    A second model is kept in memory and reads all that the model reads. Texts take one generation of `text_bytes`
    steps every 48 calls. They are not in checkpoints: a resumed training writes new ones 48 calls later. It has to
    start from the model that it started from before. Not for FSDP, whose processes would wait for each other: their
    texts end at different lengths.

    Args:
        penalty (`float`, defaults to 6.0): nats.
        num_texts (`int`, defaults to 192): most texts at once; there is a prompt of each row of the last 48 calls.
        text_bytes (`int`, defaults to 256): length of a text.
        rows_per_call (`int`, defaults to 12): texts in a call.
        context_bytes (`int`, defaults to 10): that stand twice.
        distance (`int`, defaults to 256): bytes from a word back to where it stood.
    """

    def __init__(
        self,
        penalty: float = 6.0,
        num_texts: int = 192,
        text_bytes: int = 256,
        rows_per_call: int = 12,
        context_bytes: int = 10,
        distance: int = 256,
    ):
        super().__init__()
        sizes = {
            "num_texts": num_texts,
            "text_bytes": text_bytes,
            "rows_per_call": rows_per_call,
            "context_bytes": context_bytes,
            "distance": distance,
        }
        if not 0 < penalty < math.inf or any(not isinstance(size, int) or size < 1 for size in sizes.values()):
            raise ValueError(
                f"expected a penalty above 0 and whole numbers of at least 1, got penalty={penalty} and {sizes}"
            )
        self.penalty, self.num_texts, self.text_bytes, self.rows_per_call = (
            penalty,
            num_texts,
            text_bytes,
            rows_per_call,
        )
        self.context_bytes, self.distance = context_bytes, distance
        self.num_calls = 0
        self.prompts: list[list[int]] = []
        self.texts: list[Text] = []

    def prepare(self, model):
        start = copy.deepcopy(model).eval().requires_grad_(False)
        self.start = (start,)  # in a tuple, since its parameters are not those of the objective

    @torch.compiler.disable  # lists of ids
    def forward(self, step):
        self.prompts = [*self.prompts, *self._prompts(step)][-self.num_texts :]
        self.num_calls += 1
        if self.num_calls % CALLS_BETWEEN == 0 and self.prompts:
            self.texts, self.prompts = self.write(step.model, self.prompts), []
        counted = step.targets(1) != IGNORED
        start = self.log_probs(step.model, step.input_ids, **step.layout)
        total = divergences(start, step.model.lm_head(step.hidden_states))[counted].sum()
        if self.texts:
            drawn = random.sample(self.texts, min(self.rows_per_call, len(self.texts)))
            total = total + self.divergence(step.model, drawn) * counted.sum()
        return total

    def log_probs(
        self, model: STLMForCausalLM, input_ids: torch.Tensor, lower: torch.Tensor | float = 0.0, **layout
    ) -> torch.Tensor:
        """Of the start after `input_ids (B, T)`, with logits lower by `lower (B, T, V)`: (B, T, V)."""
        (start,) = self.start
        if start.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"expected the {start.config.vocab_size} ids of the model that with_objectives was called with, got "
                f"{model.config.vocab_size}: resize the embeddings before"
            )
        with torch.no_grad():
            logits = start.to(input_ids.device)(input_ids, **layout, use_cache=False).logits
            return F.log_softmax(logits.float() - lower, -1)

    @staticmethod
    def _prompts(step: Step) -> list[list[int]]:
        """One of each row with labels: bytes of one document."""
        prompts = []
        for row, documents, labels in zip(*(x.tolist() for x in (step.input_ids, step.documents, step.labels))):
            if given := [i for i, label in enumerate(labels) if label != IGNORED and row[i] < 256]:
                end = random.choice(given) + 1
                start = max(documents.index(documents[end - 1]), end - LONGEST_PROMPT)
                prompts.append(row[start:end])
        return prompts

    def write(self, model: STLMForCausalLM, prompts: list[list[int]]) -> list[Text]:
        """Greedy texts after `prompts`, whatever the generation config of the model says."""
        eos = model.config.eos_token_id
        ends = {eos} if isinstance(eos, int) else set(eos or [])
        pad = model.config.pad_token_id or 0  # masked
        options = GenerationConfig(
            max_new_tokens=self.text_bytes,
            do_sample=False,
            use_cache=True,
            pad_token_id=pad,
            bos_token_id=model.config.bos_token_id,
            eos_token_id=eos,
        )
        longest, texts, own = max(map(len, prompts)), [], model.generation_config
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        model.eval()
        model.generation_config = options
        try:
            for rows, rows_mask in zip(ids.split(GENERATED_AT_ONCE), mask.split(GENERATED_AT_ONCE)):
                texts += model.generate(rows, attention_mask=rows_mask)[:, longest:].tolist()
        finally:
            model.generation_config = own
            model.train()
        lengths = (next((i + 1 for i, each in enumerate(text) if each in ends), len(text)) for text in texts)
        return [self.text(p + text[:length], len(p)) for p, text, length in zip(prompts, texts, lengths)]

    def text(self, ids: list[int], prompt_length: int) -> Text:
        places = range(prompt_length, len(ids))
        found = {i - 1: sorted(repeating_ids(ids[:i], self.context_bytes, self.distance)) for i in places}
        return Text(ids, prompt_length, {place: repeating for place, repeating in found.items() if repeating})

    def divergence(self, model: STLMForCausalLM, texts: list[Text]) -> torch.Tensor:
        """Mean over the bytes that were written in `texts`."""
        longest = max(len(text.ids) for text in texts)
        rows = torch.zeros(len(texts), longest, dtype=torch.long)  # right padding of any id is not seen
        weights = torch.zeros(len(texts), longest)
        lower = torch.zeros(len(texts), longest, model.config.vocab_size)
        for row, (ids, prompt_length, repeating) in enumerate(texts):
            rows[row, : len(ids)] = torch.tensor(ids)
            weights[row, prompt_length - 1 : len(ids) - 1] = 1
            for place, repeated in repeating.items():
                weights[row, place] = 10
                lower[row, place, repeated] = self.penalty
        rows, weights, lower = (tensor.to(model.device) for tensor in (rows, weights, lower))
        logits = model.lm_head(model.model(rows, use_cache=False).last_hidden_state)
        each = divergences(self.log_probs(model, rows, lower), logits)
        return (weights * each).sum() / weights.sum()


__all__ = ["LearnedRepetitionPenalty"]
