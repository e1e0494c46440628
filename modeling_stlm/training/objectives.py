# SPDX-License-Identifier: Apache-2.0
"""Training objectives beside the next byte, a direction of Super Tiny Language Models (arXiv:2405.14159).

    model = with_objectives(model, [(MultiByte(4), 0.3), MaskedNextByte(0.15)])
    Trainer(model=model, ...).train()

The loss in training is that of the next byte plus the weighted objectives. In evaluation and in `generate` the model is
the plain one, and `save_pretrained` writes the plain one. Parameters of objectives are only in the checkpoints of
`Trainer`, where a resumed training finds them and `from_pretrained` leaves them out.

An objective is a sum over the bytes of a call that is divided by the number of predicted bytes in the batch
(`num_items_in_batch`), so that gradient accumulation and several processes have the gradient of the whole batch. Only
bytes with a label are targets, and nothing is predicted across the documents of a packed row.

`MaskedNextByte`, `Denoising` and `EarlyExit` run the model a second time: a byte costs about twice as much.

Shapes: B rows, T bytes, D byte width, G trunk width, P patches, V vocabulary. Rows are compact: valid bytes first.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import can_return_tuple

from modeling_stlm.batching_stlm import STLMBatch
from modeling_stlm.modeling_stlm import STLMCausalLMOutput, STLMForCausalLM, STLMModel, without_first_bytes


IGNORED = -100
NUM_BYTES = 256


class Step(NamedTuple):
    """One call in training, as objectives see it."""

    model: STLMForCausalLM
    input_ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T) -100 at padding, too
    documents: torch.Tensor  # (B, T) index of the document of each byte in its row
    hidden_states: torch.Tensor  # (B, T, D) from which the next byte is predicted
    ends: torch.Tensor  # (B, T) bool, where patches end
    layout: dict[str, torch.Tensor]  # attention_mask and position_ids for another pass over these rows

    @property
    def starts(self) -> torch.Tensor:
        """Bool (B, T), the first byte of each document."""
        return self.documents.diff(dim=1, prepend=torch.full_like(self.documents[:, :1], -1)) != 0

    def targets(self, ahead: int) -> torch.Tensor:
        """Label `ahead` bytes after each byte (B, T), -100 where there is none in its document."""
        ahead = min(ahead, self.labels.shape[1])
        labels = F.pad(self.labels[:, ahead:], (0, ahead), value=IGNORED)
        documents = F.pad(self.documents[:, ahead:], (0, ahead), value=-1)
        return labels.masked_fill(documents != self.documents, IGNORED)

    def logits(self, model: STLMModel, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) of another pass over these rows, with other ids and perhaps in another way."""
        return self.model.lm_head(model(input_ids, **self.layout, use_cache=False).last_hidden_state)


def sum_of_nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of `logits (..., V)` at `targets (...)`, summed over those that are not -100."""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def random_spans(
    like: torch.Tensor, share: float, span_bytes: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Bool like `like (B, T)`: spans of `span_bytes`, which may overlap; each byte is in one with probability `share`."""
    starts = torch.rand(like.shape[0], like.shape[1] + span_bytes - 1, generator=generator, device=like.device)
    starts = starts < 1 - (1 - share) ** (1 / span_bytes)
    return F.max_pool1d(starts[:, None].float(), span_bytes, stride=1)[:, 0] > 0


def check_share(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"{name}={share} is a share of the bytes: at least 0 and less than 1")


class Objective(nn.Module):
    """Base of the objectives. `prepare` makes parameters that fit the model, `forward` gives the loss of a step."""

    def prepare(self, model: STLMForCausalLM) -> None:
        """Make the parameters. May raise a `ValueError` if the model cannot be trained this way."""

    @contextmanager
    def during(self, model: STLMForCausalLM) -> Iterator[None]:
        """Around the pass that predicts the next byte."""
        yield

    def forward(self, step: Step) -> torch.Tensor:
        """Loss of shape `()`, summed over the bytes of the call."""
        raise NotImplementedError


class MultiByte(Objective):
    """The `num_bytes` next bytes instead of one (Gloeckle et al. 2024, arXiv:2404.19737).

    The next byte has the head of the model. Each further one has a matrix (D, D) before that same head, which starts at
    zero, where the paper has a layer of the transformer. The loss is the mean over the further bytes.

    Args:
        num_bytes (`int`): 2 or more.
    """

    def __init__(self, num_bytes: int):
        super().__init__()
        if num_bytes < 2:
            raise ValueError(f"num_bytes={num_bytes} must be at least 2: one is what the model predicts anyway")
        self.num_bytes = num_bytes

    def prepare(self, model):
        width = model.config.hidden_size
        self.projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(self.num_bytes - 1))
        for projection in self.projections:
            nn.init.zeros_(projection.weight)

    def forward(self, step):
        total = 0
        for ahead, projection in enumerate(self.projections, start=2):
            logits = step.model.lm_head(step.hidden_states + projection(step.hidden_states))
            total = total + sum_of_nats(logits, step.targets(ahead))
        return total / len(self.projections)


class PatchReconstruction(Objective):
    """The bytes of a patch from its pooled embedding, through the head of the model.

    As in the byte-level model of arXiv:2405.14159, whose decoder reads the input patch off its embedding: one matrix
    makes a vector for each place in the patch, and the head predicts its byte. Bytes of the patch that stays open at the
    end of a row or document have no loss.
    """

    def prepare(self, model):
        self.longest = model.model.patcher.rule.cap_bytes
        self.places = nn.Linear(model.config.trunk_hidden_size, self.longest * model.config.hidden_size, bias=False)

    @contextmanager
    def during(self, model):
        def keep(trunk, inputs):
            self.pooled = inputs[0]  # (B, P, G)

        handle = model.model.trunk.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def forward(self, step):
        time = torch.arange(step.ends.shape[1], device=step.ends.device)
        patch = step.ends.cumsum(1) - step.ends.long()  # (B, T)
        # The next end of a patch at or after each byte, T where there is none.
        end = torch.where(step.ends, time, len(time)).flip(1).cummin(1)[0].flip(1)
        documents = F.pad(step.documents, (0, 1), value=-1)
        is_inside = documents.gather(1, end) == step.documents
        is_first = F.pad(step.ends[:, :-1], (1, 0)) | step.starts
        place = time - torch.where(is_first, time, 0).cummax(1)[0]
        row, at = (is_inside & (step.labels != IGNORED)).nonzero(as_tuple=True)
        vectors = self.places(self.pooled).unflatten(-1, (self.longest, -1))  # (B, P, places, D)
        self.pooled = None
        logits = step.model.lm_head(vectors[row, patch[row, at], place[row, at]])
        return sum_of_nats(logits, step.labels[row, at])


class NextThought(Objective):
    """The latent of the next sentence, from the last byte of a sentence ("next thought" in arXiv:2405.14159).

    A latent is the mean of the final hidden states over the bytes of a sentence. One matrix predicts it; the loss is one
    minus the cosine to it, for each byte of the sentence. No gradient flows through the target, or all sentences could be
    made alike. A sentence ends with a line, or with the space after a full stop, question or exclamation mark.
    """

    def prepare(self, model):
        width = model.config.hidden_size
        self.projection = nn.Linear(width, width, bias=False)

    @staticmethod
    def sentence_ends(input_ids: torch.Tensor) -> torch.Tensor:
        """Bool (B, T), decided from this byte and the one before it."""
        before = F.pad(input_ids[:, :-1], (1, 0), value=-1)
        is_stop = (before == ord(".")) | (before == ord("!")) | (before == ord("?"))
        return (input_ids == ord("\n")) | ((input_ids == ord(" ")) & is_stop)

    def forward(self, step):
        hidden_states = step.hidden_states.float()
        starts = F.pad(self.sentence_ends(step.input_ids)[:, :-1], (1, 0)) | step.starts
        sentence = starts.cumsum(1)  # (B, T) index in the row, counted from one
        counted = (step.labels != IGNORED).float()
        num_bytes = torch.zeros_like(F.pad(counted, (0, 1))).scatter_add(1, sentence, counted)  # (B, sentences)
        with torch.no_grad():
            index = sentence[..., None].expand_as(hidden_states)
            sums = hidden_states.new_zeros(*num_bytes.shape, hidden_states.shape[-1])
            sums = sums.scatter_add(1, index, hidden_states * counted[..., None])
            latents = sums / num_bytes.clamp(min=1)[..., None]
            latents = latents.gather(1, index[:, 1:])  # of the sentence that the byte after each one belongs to
        is_last = starts[:, 1:] & ~step.starts[:, 1:]
        distance = 1 - F.cosine_similarity(self.projection(step.hidden_states[:, :-1]).float(), latents, dim=-1)
        return (distance * num_bytes.gather(1, sentence[:, 1:]) * is_last).sum()


class MaskedNextByte(Objective):
    """Masked bytes, looking both ways, by the same weights (GPT-BERT, arXiv:2410.24159).

    A second pass runs the model as `is_causal=False` does: convolutions and attention look both ways, and a byte sees the
    patch it belongs to. Masked bytes are the mask token there. Each is predicted one byte to its left, as the next byte
    is, so that both passes train one head. The pass that predicts the next byte stays causal. Trained like that,
    `STLMModel.from_pretrained(folder, is_causal=False)` is an encoder, and the causal model is what it was.

    The paper divides the rows of a batch among the two; here every row has both, and the weight is the ratio.

    Args:
        share (`float`): of the bytes that are masked; the loss is the mean over them.
        span_bytes (`int`, defaults to 4): length of the masked spans. A single byte is guessed from its neighbours.
    """

    FLAGS = ("is_causal", "num_after", "mask_token_id")  # what the modules derive from `config.is_causal`

    def __init__(self, share: float = 0.15, span_bytes: int = 4):
        super().__init__()
        check_share("share", share)
        if share == 0:
            raise ValueError("share=0.0 masks nothing")
        self.share, self.span_bytes = share, span_bytes

    def prepare(self, model):
        config = copy.copy(model.config)
        config.is_causal, self.mask_token_id = False, mask_token_of(model)
        with torch.device("meta"):
            modules = dict(STLMModel(config).named_modules())
        self.flags = {
            name: {flag: vars(module)[flag] for flag in self.FLAGS if flag in vars(module)}
            for name, module in modules.items()
        }

    def both_ways(self, model: STLMModel) -> STLMModel:
        """The modules of `model` with its weights, adapters and settings, run without causality."""
        twin = with_own_modules(model)
        for name, flags in self.flags.items():
            if flags:
                vars(twin.get_submodule(name)).update(flags)
        return twin

    @torch.compiler.disable  # the twin is made in every call, and would be compiled in every call
    def forward(self, step):
        masked = random_spans(step.input_ids, self.share, self.span_bytes) & (step.input_ids < NUM_BYTES)
        logits = step.logits(self.both_ways(step.model.model), step.input_ids.masked_fill(masked, self.mask_token_id))
        is_target = F.pad(masked[:, 1:], (0, 1))
        return sum_of_nats(logits, step.targets(1).masked_fill(~is_target, IGNORED)) / self.share


def with_own_modules(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules that shares parameters, buffers and hooks with it, but no attributes."""
    own = copy.copy(module)
    own._modules = {
        name: None if child is None else with_own_modules(child) for name, child in module._modules.items()
    }
    return own


def mask_token_of(model: STLMForCausalLM) -> int:
    if model.config.mask_token_id is None:
        raise ValueError("config.mask_token_id is None, expected the id of the token that hides a byte (259)")
    return model.config.mask_token_id


class Denoising(Objective):
    """The next byte of the clean text after a damaged one: masked spans and misspelt letters.

    Unlike in T5 (arXiv:1910.10683) the text keeps its length, so a second pass over the damaged ids has the targets of the
    first, also for padded and packed rows. A misspelt letter (ASCII) is a random one or changes its case, half and half.

    Args:
        spans (`float`): share of the bytes in masked spans.
        noise (`float`): share of the letters that are misspelt.
        span_bytes (`int`, defaults to 8): length of the spans.
    """

    def __init__(self, spans: float = 0.15, noise: float = 0.05, span_bytes: int = 8):
        super().__init__()
        check_share("spans", spans)
        check_share("noise", noise)
        self.spans, self.noise, self.span_bytes = spans, noise, span_bytes

    def prepare(self, model):
        self.mask_token_id = mask_token_of(model)

    def damage(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids (B, T)` with noise and masks."""
        lower = input_ids | 32
        is_letter = (lower >= ord("a")) & (lower <= ord("z"))
        draw = torch.rand(input_ids.shape, device=input_ids.device)
        other = torch.randint_like(input_ids, ord("a"), ord("z") + 1)
        noisy = torch.where(draw < self.noise / 2, input_ids ^ 32, other)
        damaged = torch.where(is_letter & (draw < self.noise), noisy, input_ids)
        masked = random_spans(input_ids, self.spans, self.span_bytes) & (input_ids < NUM_BYTES)
        return damaged.masked_fill(masked, self.mask_token_id)

    def forward(self, step):
        return sum_of_nats(step.logits(step.model.model, self.damage(step.input_ids)), step.targets(1))


class EarlyExit(Objective):
    """The next byte after the first passes of the trunk only, with layer-drop (LayerSkip, arXiv:2404.16710).

    Makes the drafts of `generate(..., assistant_early_exit=objective.slots(model.config))` good, which leave the trunk
    after `passes`. The paper trains all exits in turn; this trains the one that will be used, by a second pass over the
    bytes. While the next byte is trained, layer l of L is left out of a call with probability
    `layer_drop * (2 ** (l / (L - 1)) - 1)`, as in the paper, and the same one in all processes.

    The text is that of greedy search, and not faster on a CPU: the trunk runs once per patch anyway, so a draft of a byte
    costs nearly what a byte costs (`stlm-3m` after 0.6 MB, 150 bytes: 0.24 s without, 0.38 s with drafts that left 40 full
    calls of 150).

    Args:
        passes (`int`): of the trunk that run before the exit.
        layer_drop (`float`, defaults to 0.0): probability for the last layer.
    """

    def __init__(self, passes: int, layer_drop: float = 0.0):
        super().__init__()
        if passes < 0 or not 0 <= layer_drop <= 1:
            raise ValueError(f"passes={passes} must be 0 or more, and layer_drop={layer_drop} a probability")
        self.passes, self.layer_drop = passes, layer_drop

    def prepare(self, model):
        depth = model.config.num_trunk_layers
        if self.passes >= depth:
            raise ValueError(f"passes={self.passes} must be fewer than the {depth} passes of the trunk")
        if self.layer_drop and model.config.sharing_lora_rank:
            raise ValueError("layer_drop needs passes that are equal, got sharing_lora_rank above 0")
        # In the checkpoints, so that a resumed training draws the layers that it would have drawn.
        self.register_buffer("seed", torch.randint(2**31, ()))
        self.register_buffer("num_calls", torch.tensor(0))

    def slots(self, config) -> int:
        """What `assistant_early_exit` takes: cache slots up to the exit."""
        return config.num_byte_layers + 1 + self.passes

    @contextmanager
    def during(self, model):
        trunk = model.model.trunk
        schedule = trunk.schedule
        depth = max(1, len(schedule) - 1)
        generator = torch.Generator().manual_seed(int(self.seed) + int(self.num_calls))
        draws = torch.rand(len(schedule), generator=generator).tolist()
        trunk.schedule = [
            layer
            for i, (layer, draw) in enumerate(zip(schedule, draws))
            if draw >= self.layer_drop * (2 ** (i / depth) - 1)
        ]
        try:
            yield
        finally:
            trunk.schedule = schedule
            self.num_calls += 1

    def forward(self, step):
        config = step.model.config
        num_slots = config.num_hidden_layers
        config.num_hidden_layers = self.slots(config)
        try:
            logits = step.logits(step.model.model, step.input_ids)
        finally:
            config.num_hidden_layers = num_slots
        # Layers that were left out have a gradient of zero: processes would wait for one that is missing.
        unused = sum(parameter.sum() for parameter in step.model.model.trunk.parameters() if parameter.requires_grad)
        return sum_of_nats(logits, step.targets(1)) + 0 * unused


class WeightedSum(Objective):
    """Several objectives as one, so that peft can keep them as one of its `modules_to_save`."""

    def __init__(self, objectives: list[tuple[Objective, float]]):
        super().__init__()
        self.terms = nn.ModuleList(objective for objective, _ in objectives)
        self.weights = [weight for _, weight in objectives]

    def prepare(self, model):
        for term in self.terms:
            term.prepare(model)

    @contextmanager
    def during(self, model):
        with ExitStack() as stack:
            for term in self.terms:
                stack.enter_context(term.during(model))
            yield

    def forward(self, step):
        return sum(weight * term(step) for weight, term in zip(self.weights, self.terms))


class STLMForCausalLMWithObjectives(STLMForCausalLM):
    """What [`with_objectives`] returns: the modules of a model, trained with more than the next byte."""

    def __init__(self, model: STLMForCausalLM, objectives: list[tuple[Objective, float]]):
        with torch.device("meta"):
            super().__init__(model.config)
        self.model, self.lm_head, self.generation_config = model.model, model.lm_head, model.generation_config
        self.objectives = WeightedSum(objectives)
        self.objectives.prepare(model)
        self.objectives.to(device=model.device, dtype=model.dtype)
        self.train(model.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> STLMCausalLMOutput:
        """As [`STLMForCausalLM.forward`]; in training the loss contains the objectives."""
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        if not self.training:
            return super().forward(input_ids, **inputs, **kwargs)
        if input_ids is None or labels is None:
            raise ValueError(
                "objectives need input_ids and labels in training. label_smoothing_factor and compute_loss_func take the "
                "labels away from the model: do without them, or call eval() for a forward pass without a loss"
            )
        outputs_needed = {"output_hidden_states": True, "output_boundaries": True}
        with self.objectives.during(self):
            outputs = super().forward(input_ids, **inputs, **(kwargs | outputs_needed))
        step = self._step(input_ids, attention_mask, position_ids, labels, outputs)
        count = kwargs.get("num_items_in_batch")
        if count is None:
            count = (without_first_bytes(labels, attention_mask)[:, 1:] != IGNORED).sum()
        outputs.loss = outputs.loss + self.objectives(step) / count
        return outputs

    forward.__signature__ = STLMForCausalLM.forward.__signature__

    def _step(self, input_ids, attention_mask, position_ids, labels, outputs) -> Step:
        batch = STLMBatch.of(input_ids, attention_mask, position_ids=position_ids)
        documents, layout = torch.zeros_like(input_ids), {}
        if batch.positions is not None:
            documents, layout["position_ids"] = (batch.positions == 0).cumsum(1), batch.positions
        if batch.lengths is not None:
            labels, layout["attention_mask"] = labels.masked_fill(~batch.is_given, IGNORED), batch.is_valid.long()
        return Step(
            model=self,
            input_ids=batch.compact(input_ids),
            labels=batch.compact(labels),
            documents=documents,
            hidden_states=batch.compact(outputs.hidden_states[-1]),
            ends=batch.compact(outputs.boundaries),
            layout=layout,
        )

    def plain(self) -> STLMForCausalLM:
        """The model without objectives, on the same modules."""
        with torch.device("meta"):
            plain = STLMForCausalLM(self.config)
        plain.model, plain.lm_head, plain.generation_config = self.model, self.lm_head, self.generation_config
        return plain.train(self.training)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """Write the plain model, and into a checkpoint of `Trainer` (by its name) the parameters of the objectives, too."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        if not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(save_directory).name):
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith("objectives.")}
        self.plain().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


def with_objectives(
    model: STLMForCausalLM, objectives: list[Objective | tuple[Objective, float]]
) -> STLMForCausalLMWithObjectives:
    """`model` with more objectives than the next byte, for `Trainer`. The modules are those of `model`, not copies.

    With peft, wrap the result: `get_peft_model(with_objectives(...), LoraConfig(..., modules_to_save=["objectives"]))`
    trains the parameters of the objectives in full and keeps them in the checkpoints. The trainers of trl compute losses
    from the hidden states and never ask the model for one: with them the objectives are left out, without a word.

    Args:
        model ([`STLMForCausalLM`]).
        objectives: each with its weight, 1 if it comes alone. The next byte has weight 1.

    Raises:
        ValueError: if the model is none of these, or has objectives already, or if there are no objectives.
    """
    if not isinstance(model, STLMForCausalLM) or isinstance(model, STLMForCausalLMWithObjectives):
        raise ValueError(
            f"the model is a {type(model).__name__}, expected a plain STLMForCausalLM: give all objectives at once, and "
            "wrap the result with peft"
        )
    if not objectives:
        raise ValueError("there are no objectives: Trainer takes the model as it is")
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in objectives]
    return STLMForCausalLMWithObjectives(model, pairs)
