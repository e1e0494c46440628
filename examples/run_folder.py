# SPDX-License-Identifier: Apache-2.0
"""The folder of a training: checkpoints to go on from, and what is left in the end."""

import argparse
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from inputs import files_of
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import GenerationConfig, ProgressCallback, Trainer, TrainerCallback, TrainerState, set_seed
from transformers.trainer_callback import ExportableState

from modeling_stlm.training.model_card import describe_base


def launch_state() -> PartialState:
    """The processes that train: this one, or those of `accelerate launch`. Devices are chosen as `TrainingArguments` does."""
    return PartialState(cpu=not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def per_device(batch_size: int) -> int:
    """Rows of a step for each device, which `Trainer` wants: all devices together take steps of `batch_size` rows."""
    state = launch_state()
    devices = state.num_processes
    if state.distributed_type == DistributedType.NO and state.device.type == "cuda":
        devices = torch.cuda.device_count()  # `Trainer` gives each of them so many rows
    if batch_size % devices:
        raise SystemExit(f"--batch_size {batch_size}: expected a multiple of {devices}, the number of devices")
    return batch_size // devices


def last_checkpoint(output: Path) -> str | None:
    """The newest complete checkpoint: its trainer state is written last, and is whole."""
    for path in sorted(output.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return str(path)
    return None


def check_same(record: Path, settings: dict) -> None:
    """Raise where what `record` keeps was made with other settings."""
    if not record.is_file():
        raise SystemExit(f"{record.parent} does not say what it was made with: use another folder")
    made_with = json.loads(record.read_text())
    names = sorted(made_with.keys() | settings.keys())
    if other := {name: made_with.get(name) for name in names if made_with.get(name) != settings.get(name)}:
        shown = dict(list(other.items())[:5])
        more = f" and {len(other) - 5:,} more" if len(other) > 5 else ""
        raise SystemExit(f"{record} was made with {shown}{more}: use another folder")


def begin(record: Path, settings: dict, goes_on: bool) -> None:
    """Write to `record` what a job is made with; one that goes on with what is there must be made with the same."""
    if goes_on:
        check_same(record, settings)
        return
    if not launch_state().is_main_process:
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    written = record.with_suffix(".part")
    written.write_text(json.dumps(settings, indent=1) + "\n")
    written.replace(record)  # whole, wherever the program is stopped


def names_and_sizes(patterns: Iterable[str | Path]) -> str:
    """Files for a record: no folders of this machine, and other files do not pass for these."""
    files = map(Path, files_of(patterns))
    return ", ".join(f"{file.name} ({file.stat().st_size:,} bytes)" for file in files)


def is_spent(
    trainer: Trainer, checkpoint: str | None, max_minutes: float | None = None, splits: Iterable[str] = ()
) -> bool:
    """Whether `checkpoint` has spent the budget, of minutes or steps; `Trainer.train` would add a step.

    Then `trainer` gets its weights and state, and the program ends if the results are there already, with scores of all `splits`.
    """
    if checkpoint is None:
        return False
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    if max_minutes is None:
        spent = state.global_step >= trainer.args.max_steps
    else:
        saved = state.stateful_callbacks.get("TimeBudget", {"attributes": {"elapsed_seconds": 0.0}})
        spent = saved["attributes"]["elapsed_seconds"] >= 60 * max_minutes
    if not spent:
        return False
    launch_state().print(
        f"the budget is spent after {state.global_step} steps: nothing is trained; with a larger one the run goes on"
    )
    results = Path(trainer.args.output_dir) / "results.json"
    found = json.loads(results.read_text()) if results.is_file() else {"steps": None}
    scores = {**found.get("bits_per_byte", {}), **found.get("scores", {})}
    if found["steps"] == state.global_step and all(any(name.startswith(split) for name in scores) for split in splits):
        raise SystemExit(0)
    if (adapter := Path(checkpoint) / "adapter_model.safetensors").is_file():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(trainer.model, load_file(adapter))
    else:
        weights = load_file(Path(checkpoint) / "model.safetensors")
        trainer.model.load_state_dict(weights, strict=False)  # a tied head is not in the file
    trainer.state = state
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState) and (saved := state.stateful_callbacks.get(type(callback).__name__)):
            vars(callback).update(saved["attributes"])
    return True


class ResumeLine(TrainerCallback):
    """Prints where a resumed run goes on; stands after the `TimeBudget`, which reads the time from the checkpoint.

    Args:
        progress (`Callable[[TrainerState], str]`): how far the run is, such as `"3.0 of 60 min"`.
    """

    def __init__(self, progress: Callable[[TrainerState], str]):
        self.progress = progress

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            print(f"{self.progress(state)}: goes on from {checkpoint}", flush=True)


class ProgressLines(ResumeLine):
    """Prints a line for every log, too: how far the run is, then its loss or its score."""

    def on_log(self, args, state, control, logs, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            print(
                f"{self.progress(state)}: loss {logs['loss']:.4f}, learning rate {logs['learning_rate']:.2e}",
                flush=True,
            )
        elif "eval_bits_per_byte" in logs:
            print(f"{self.progress(state)}: validation {logs['eval_bits_per_byte']:.4f} bits per byte", flush=True)


def commit() -> str:
    """Of the code that runs; empty where there is no git, or no repository."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


COMMIT = commit()  # now: a training may take longer than a commit lasts


def run_info(device: torch.device) -> dict[str, str]:
    """Script, commit, device and versions, for `results.json`; `inputs.another_job` compares the script."""
    return {
        "script": Path(sys.argv[0]).name,
        "commit": COMMIT,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def is_finite(model: torch.nn.Module) -> bool:
    return all(parameter.isfinite().all() for parameter in model.parameters())


class EndOnDivergence(TrainerCallback):
    """Ends the program at the first log, checkpoint or score that is not finite, before anything is saved.

    Add it to the `Trainer` last: after those that ask for a checkpoint, and those that close a progress bar.

    Args:
        remedy (`str`): what to lower.
    """

    def __init__(self, remedy: str = "the learning rate"):
        self.remedy = remedy

    def _end(self, state, what: str) -> None:
        raise SystemExit(
            f"step {state.global_step}: the training diverged, {what} not finite and not saved. Lower {self.remedy}"
        )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if (control.should_log or control.should_save) and not is_finite(model):
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not all(math.isfinite(score) for name, score in metrics.items() if name.endswith(("_loss", "_per_byte"))):
            self._end(state, "its scores are")

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if not is_finite(model):
            self._end(state, "its weights are")


@contextmanager
def saved_at_the_end(trainer: Trainer) -> Iterator[None]:
    """Around a training without checkpoints: one that diverges ends the program, and Ctrl-C says that nothing is saved."""
    trainer.add_callback(EndOnDivergence())
    try:
        yield
    except KeyboardInterrupt:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()  # or it would write over the line
        print("interrupted: nothing of this training is saved", file=sys.stderr)
        raise


def train_runs(trainer: Trainer, runs: int) -> None:
    """Train `runs` times from the same start, which differ in the order of the rows, and keep the mean of the weights.

    It costs no more to use than one (model soups, arXiv:2203.05482).
    """
    model = trainer.model
    start = {name: value.clone() for name, value in model.state_dict().items()}
    total = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in start.items()}
    with saved_at_the_end(trainer):
        for run in range(runs):
            set_seed(trainer.args.seed + run)
            model.load_state_dict(start)
            trainer.optimizer = None  # `Trainer.train` would go on with that of the run before
            trainer.train()
            for name, value in model.state_dict().items():
                total[name] += value / runs
    model.load_state_dict(total)


def write_results(folder: Path, checkpoint: str, **results) -> None:
    """`results.json` of what was fine-tuned from `checkpoint`; `modeling_stlm/training/model_card.py` says what it may hold."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {"base_model": describe_base(checkpoint)} | results | run_info(device)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def write_label_results(
    trainer: Trainer, args: argparse.Namespace, files: dict[str, str], own: tuple[str, ...] = (), **results
) -> None:
    """[`write_results`] of `classify.py` and `ner.py`: their arguments are `--epochs`, what `inputs.add_label_training` adds, and
    `own`."""
    names = ("adversarial_epsilon", *own, "learning_rate", "batch_size", "max_bytes", "bf16", "seed")
    arguments = files | {"runs": args.runs, "epochs": f"{args.epochs:g}"}
    arguments |= {name: getattr(args, name) for name in names}
    results |= {"steps": args.runs * trainer.state.global_step, "arguments": arguments}
    write_results(args.output, args.checkpoint, **results)


def plot(history: list[dict], path: Path) -> None:
    """Bits per byte while training and on validation."""
    curves = {"training": [(log["step"], log["loss"] / math.log(2)) for log in history if "loss" in log]}
    scores = ("eval_bits_per_byte", "validation_bits_per_byte")  # while training and at the end
    curves["validation"] = [(log["step"], log[score]) for log in history for score in scores if score in log]
    figure = Figure()
    axes = figure.subplots(subplot_kw={"xlabel": "step", "ylabel": "bits per byte"})
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points), marker="." if name == "validation" else None, label=name)
    axes.legend()
    figure.savefig(path)


def is_folder(value) -> bool:
    return isinstance(value, (str, Path)) and Path(value).is_dir()


def save(trainer: Trainer, results: dict, args: argparse.Namespace) -> None:
    """Checkpoint, history, curve and results, readable by the group; the generation config sets no length."""
    tokenizer, history = trainer.processing_class, trainer.state.log_history
    trainer.model.config.use_cache = True  # Trainer turns it off
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    trainer.model.generation_config = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95, **special)
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return
    # Results are published: names of files, no folders of this machine.
    names = {
        split: " ".join(Path(file).name for file in getattr(args, split)) for split in ("train", "validation", "test")
    }
    folders = {name: Path(value).resolve().name for name, value in vars(args).items() if is_folder(value)}
    arguments = vars(args) | folders | names | {"output": args.output.name}
    results["arguments"] = {name: str(value) for name, value in arguments.items()}
    for name, value in {"history": history, "results": results}.items():
        (args.output / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    plot(history, args.output / "loss.png")
    (args.output / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner reads
    scores = ", ".join(f"{split} {score:.4f}" for split, score in results["bits_per_byte"].items())
    print(f"\nbits per byte: {scores}\ncurve: {args.output / 'loss.png'}")
    print(f"next: python examples/generate.py --checkpoint {args.output}")
