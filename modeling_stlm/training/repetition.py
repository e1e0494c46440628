# SPDX-License-Identifier: Apache-2.0
"""A repetition penalty that the weights learn: greedy text no longer loops, without a penalty while decoding.

    Trainer(model=with_objectives(model, [LearnedRepetitionPenalty()]), ...).train()

The likeliest text of a small model repeats itself, and more the longer it does (Holtzman et al., arXiv:1904.09751; Xu
et al., arXiv:2206.02369). Here the model writes greedy texts while it trains, and follows on them what it was at the
start with the words made unlikely that would repeat: its own outputs with a decoding rule as the teacher (on-policy
distillation, arXiv:2306.13649). The target is a distribution, so that the bytes within words stay what they were,
which unlikelihood training (arXiv:1908.04319) drives away, too.

Shapes: B rows, T bytes, V vocabulary.
"""

import copy
import random

import torch
from torch.nn import functional as F
from transformers import GenerationConfig

from modeling_stlm.modeling_stlm import STLMForCausalLM
from modeling_stlm.training.objectives import IGNORED, Objective, Step


LONGEST_PROMPT = 200


def is_in_word(byte: int) -> bool:
    """Whether a word may go on after `byte`: ASCII letters and digits, the apostrophe, bytes beyond ASCII."""
    return 128 <= byte < 256 or (byte < 128 and (chr(byte).isalnum() or byte == ord("'")))


def repeating_ids(ids: list[int], context_bytes: int, distance: int) -> set[int]:
    """What began words after the last `context_bytes` of `ids` where these stood before, up to `distance` ids back."""
    length = len(ids)
    if length <= context_bytes or is_in_word(ids[-1]):
        return set()
    context = ids[-context_bytes:]
    starts = range(max(context_bytes, length - distance), length)
    return {ids[i] for i in starts if ids[i - context_bytes : i] == context}


class LearnedRepetitionPenalty(Objective):
    """Follows the model as it was at the start, with a penalty on words that repeat, on greedy texts of its own.

    Each row of a call gives a prompt of at most 200 bytes. Whenever there are `num_texts` of them the model goes on
    from each greedily for `text_bytes`, and from then on every call draws `rows_per_call` of these texts. At each
    byte that it wrote the loss is the divergence to the probabilities of the start. Where a word begins after
    `context_bytes` that stood within the last `distance` bytes, the logit of what followed there is lower by
    `penalty`, and the byte counts ten times. Repeats from further back, such as a passage that is written twice, are
    not touched. The objective is the mean over the bytes of the drawn texts; before there are texts it is zero.

    A second model is kept in memory, and a byte of the drawn texts costs another forward pass. The prompts and texts
    are not in checkpoints: a resumed training writes new ones. It has to start from the same model, which is the one
    that `with_objectives` is called with.

    Args:
        penalty (`float`, defaults to 6.0): nats.
        num_texts (`int`, defaults to 192): texts at once.
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
        if penalty <= 0 or min(sizes.values()) < 1:
            raise ValueError(f"expected penalty above 0 and sizes of at least 1, got penalty={penalty} and {sizes}")
        self.penalty, self.num_texts, self.text_bytes, self.rows_per_call = (
            penalty,
            num_texts,
            text_bytes,
            rows_per_call,
        )
        self.context_bytes, self.distance = context_bytes, distance
        self.prompts: list[list[int]] = []
        self.texts: list[tuple[list[int], int]] = []  # ids and the length of the prompt

    def prepare(self, model):
        start = copy.deepcopy(model).eval().requires_grad_(False)
        self.start = (start,)  # in a tuple, since its parameters are not those of the objective

    @torch.compiler.disable  # lists of ids
    def forward(self, step):
        self._collect(step)
        if len(self.prompts) >= self.num_texts:
            self.texts = self._write(step.model, self.prompts[: self.num_texts])
            self.prompts = self.prompts[self.num_texts :]
        num_targets = (step.targets(1) != IGNORED).sum()
        if not self.texts:
            return 0.0 * num_targets
        drawn = random.sample(self.texts, min(self.rows_per_call, len(self.texts)))
        return self.divergence(step.model, drawn) * num_targets

    def _collect(self, step: Step) -> None:
        """Keep a prompt of each row: bytes of one document."""
        for row, documents, labels in zip(*(x.tolist() for x in (step.input_ids, step.documents, step.labels))):
            given = [i for i, label in enumerate(labels) if label != IGNORED and row[i] < 256]
            if given:
                end = random.choice(given) + 1
                start = max(documents.index(documents[end - 1]), end - LONGEST_PROMPT)
                self.prompts.append(row[start:end])

    def _write(self, model: STLMForCausalLM, prompts: list[list[int]]) -> list[tuple[list[int], int]]:
        """Greedy texts after `prompts`, each with the length of its prompt."""
        config, device = model.config, model.device
        options = GenerationConfig(
            max_new_tokens=self.text_bytes,
            do_sample=False,
            temperature=1.0,  # with top_p: those of the model are for sampling, and `generate` warns of them
            top_p=1.0,
            use_cache=True,
            **{name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        )
        longest, texts = max(map(len, prompts)), []
        ids = torch.tensor([[config.pad_token_id] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        model.eval()
        try:
            for rows, rows_mask in zip(ids.split(64), mask.split(64)):
                written = model.generate(rows, attention_mask=rows_mask, generation_config=options)
                texts += written[:, longest:].tolist()
        finally:
            model.train()
        ends = (text.index(config.eos_token_id) + 1 if config.eos_token_id in text else len(text) for text in texts)
        return [(prompt + text[:end], len(prompt)) for prompt, text, end in zip(prompts, texts, ends)]

    def penalties(self, ids: list[int], prompt_length: int) -> dict[int, set[int]]:
        """For the places from the end of the prompt on, what would repeat after them, where anything would."""
        places = range(prompt_length, len(ids))
        found = {i - 1: repeating_ids(ids[:i], self.context_bytes, self.distance) for i in places}
        return {place: repeated for place, repeated in found.items() if repeated}

    def divergence(self, model: STLMForCausalLM, texts: list[tuple[list[int], int]]) -> torch.Tensor:
        """Mean over the bytes that were written in `texts` (ids and the length of the prompt)."""
        config, device = model.config, model.device
        longest = max(len(ids) for ids, _ in texts)
        rows = torch.full((len(texts), longest), config.pad_token_id)
        weights = torch.zeros(len(texts), longest)
        lower = torch.zeros(len(texts), longest, config.vocab_size)
        for row, (ids, prompt_length) in enumerate(texts):
            rows[row, : len(ids)] = torch.tensor(ids)
            weights[row, prompt_length - 1 : len(ids) - 1] = 1
            for place, repeated in self.penalties(ids, prompt_length).items():
                weights[row, place] = 10
                lower[row, place, list(repeated)] = self.penalty
        rows, weights, lower = rows.to(device), weights.to(device), lower.to(device)
        (start,) = self.start
        start.to(device)
        with torch.no_grad():
            target = F.log_softmax(start(rows, use_cache=False).logits.float() - lower, -1)
        logits = model.lm_head(model.model(rows, use_cache=False).last_hidden_state)
        each = F.kl_div(F.log_softmax(logits.float(), -1), target, reduction="none", log_target=True).sum(-1)  # (B, T)
        return (weights * each).sum() / weights.sum()


__all__ = ["LearnedRepetitionPenalty"]
