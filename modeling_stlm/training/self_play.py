# SPDX-License-Identifier: Apache-2.0
"""Self-play fine-tuning (SPIN, arXiv:2401.01335): real text against what the model of the round before writes.

With the logistic loss, its objective is that of DPO (arXiv:2305.18290) whose chosen text is the real one, whose rejected
text was drawn from the opponent, and whose reference model is the opponent. So each round is a `DPOTrainer` of trl with
pairs of its own.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_utils import denumpify_detensorize, get_last_checkpoint
from trl import DPOConfig, DPOTrainer


@dataclass
class SelfPlayConfig(DPOConfig):
    """
    Arguments of [`SelfPlayTrainer`]: those of `DPOConfig` for every round (`beta` is lambda of the paper), and:

    Args:
        num_rounds (`int`, defaults to 3): rounds to play.
        max_new_tokens (`int`, defaults to 256): longest text of the opponent, in bytes for an STLM.
        generation_batch_size (`int`, defaults to 16): texts that the opponent writes at once.
    """

    num_rounds: int = 3
    max_new_tokens: int = 256
    generation_batch_size: int = 16


class SelfPlayTrainer:
    """Rounds of self-play.

    Round k starts from the model of round k - 1, which is also its opponent. `output_dir/round-0` is the model to begin
    with; `output_dir/round-<k>` gets the pairs (`pairs.jsonl`), the checkpoints of `DPOTrainer` and the model after it;
    `output_dir/rounds.json` lists what `compute_round_metrics` returned for each.

    The paper trains on the pairs of the last two rounds together; here a round has its own alone. Several processes need
    the folder in common.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model, best one that was fine-tuned on the task.
        args ([`SelfPlayConfig`]).
        train_dataset (`datasets.Dataset` or `list[dict]`): texts `prompt` and `completion`, the real continuation.
        processing_class (`PreTrainedTokenizerBase`): the tokenizer.
        compute_round_metrics (`Callable[[PreTrainedModel], dict[str, float]]`, *optional*):
            Called with the model before the first round and after each one.

    Raises:
        ValueError: if the dataset is empty or a row lacks a text, or if the output folder holds rounds that are not resumed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SelfPlayConfig,
        train_dataset: Dataset | list[dict],
        processing_class: PreTrainedTokenizerBase,
        compute_round_metrics: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    ):
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"the model is a {type(model).__name__}, expected a PreTrainedModel: rounds save and load it. Merge "
                "adapters first"
            )
        self.rows = [dict(row) for row in train_dataset]
        if not self.rows:
            raise ValueError("the dataset needs texts `prompt` and `completion`, got no rows")
        for number, row in enumerate(self.rows, start=1):
            if not all(isinstance(row.get(name), str) for name in ("prompt", "completion")):
                found = {name: type(value).__name__ for name, value in sorted(row.items())}
                raise ValueError(f"row {number} of the dataset needs texts `prompt` and `completion`, got {found}")
        self.model, self.args, self.processing_class = model, args, processing_class
        self.compute_round_metrics = compute_round_metrics
        self.history: list[dict] = []

    def train(self, resume_from_checkpoint: bool = False) -> list[dict]:
        """Play the rounds; returns one dict of metrics for each, that of the model to begin with first."""
        path = Path(self.args.output_dir) / "rounds.json"
        has_rounds = path.is_file()
        PartialState().wait_for_everyone()  # before the main process writes the file
        if has_rounds:
            if not resume_from_checkpoint:
                raise ValueError(
                    f"{path.parent} holds rounds of an earlier self-play: resume them with resume_from_checkpoint=True, or "
                    "give another output_dir"
                )
            self.history = json.loads(path.read_text())
        else:
            self._finish(0)
        for index in range(len(self.history), self.args.num_rounds + 1):
            trainer = self.round_trainer(index)
            checkpoint = get_last_checkpoint(self.folder(index)) if resume_from_checkpoint else None
            trainer.train(resume_from_checkpoint=checkpoint)
            self.model = trainer.model
            self._finish(index)
        self.model = self.load(self.args.num_rounds)
        return self.history

    def folder(self, index: int) -> str:
        return str(Path(self.args.output_dir) / f"round-{index}")

    def load(self, index: int) -> PreTrainedModel:
        """The model after round `index`."""
        return type(self.model).from_pretrained(self.folder(index), dtype=self.model.dtype)

    def round_trainer(self, index: int) -> DPOTrainer:
        """The trainer of a round, with the pairs of the opponent, which are drawn unless they are there."""
        opponent = self.load(index - 1)
        path = Path(self.folder(index)) / "pairs.jsonl"
        if not path.is_file():
            self._draw_pairs(opponent, index, path)
        args = copy.copy(self.args)
        args.output_dir = self.folder(index)
        return DPOTrainer(
            model=self.load(index - 1),
            ref_model=opponent,
            args=args,
            train_dataset=Dataset.from_list([json.loads(line) for line in path.read_text().splitlines()]),
            processing_class=self.processing_class,
        )

    def _draw_pairs(self, opponent: PreTrainedModel, index: int, path: Path) -> None:
        """Write the real text and that of the opponent for every prompt. Processes share the prompts."""
        state = PartialState()
        set_seed(self.args.seed + index + 2**16 * state.process_index)
        with state.split_between_processes([row["prompt"] for row in self.rows]) as prompts:
            texts = continuations(
                opponent.to(self.args.device),
                self.processing_class,
                prompts,
                self.args.max_new_tokens,
                self.args.generation_batch_size,
            )
        texts = gather_object(texts)
        if state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            pairs = [
                {"prompt": row["prompt"], "chosen": row["completion"], "rejected": text}
                for row, text in zip(self.rows, texts, strict=True)
            ]
            write_whole(path, "".join(json.dumps(pair) + "\n" for pair in pairs))
        state.wait_for_everyone()

    def _finish(self, index: int) -> None:
        """Save the model after a round, and what it is worth."""
        self.model.config.use_cache = True  # Trainer turns it off, and would save it so
        model = self.model.eval()
        metrics = self.compute_round_metrics(model) if self.compute_round_metrics else {}
        self.history.append({"round": index, **denumpify_detensorize(metrics)})
        if PartialState().is_main_process:
            model.save_pretrained(self.folder(index))
            self.processing_class.save_pretrained(self.folder(index))
            write_whole(Path(self.args.output_dir) / "rounds.json", json.dumps(self.history, indent=1) + "\n")
        PartialState().wait_for_everyone()


def write_whole(path: Path, text: str) -> None:
    """Write a file that is all there or, if the process is stopped, as it was."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


@torch.no_grad()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int,
    do_sample: bool = True,
) -> list[str]:
    """What `model` writes after each of `prompts`: drawn from its distribution, or the greedy text. That of an STLM is
    well-formed UTF-8."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
    if model.config.model_type in ("stlm", "stlm_committee"):
        options["valid_utf8"] = True
    model, texts = model.eval(), [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # rows of one length need no padding
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = tokenizer([prompts[i] for i in rows], padding=True, padding_side="left", return_tensors="pt")
        inputs = inputs.to(model.device)
        ids = model.generate(**inputs, do_sample=do_sample, max_new_tokens=max_new_tokens, use_cache=True, **options)
        new = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, new):
            texts[i] = text
    return texts
