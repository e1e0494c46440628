# SPDX-License-Identifier: Apache-2.0
"""Two processes started by `accelerate launch` train like one. If one waits for the other for ever, a timeout fails."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file

from modeling_stlm import STLMForCausalLM

from .tiny import SHARING, TEXT, ids_of, tiny_config


pytestmark = pytest.mark.timeout(900)
EXAMPLES = Path(__file__).parents[1] / "examples"

SCRIPT = """
import json, sys, torch
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig
from modeling_stlm import STLMForCausalLM
from modeling_stlm.training import optimizer
from modeling_stlm.training.adversarial import AdversarialTrainer
settings = json.loads(sys.argv[1])
optimizer.has_bfloat16 = lambda device: False  # as where there are no instructions for it: weights are compared to 1e-5
sharding = {"distributed_config": DistributedConfig(fsdp_size=2)} if settings["sharded_by_transformers"] else {}
model = STLMForCausalLM.from_pretrained(settings["model"], **sharding)
# One row of two completes no patch: its rank would leave the trunk out, and the other would wait for it.
rows = [list(b"a word and another w"), list(b"x" * 20), list(b"1 2 3 4 5 6 7 8 9 0 "), list(b"y" * 20)] * 3
data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
args = TrainingArguments(output_dir=settings["out"], max_steps=3, learning_rate=0.1, optim="sgd", logging_steps=1,
                         save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
                         train_sampling_strategy="sequential", **settings["arguments"])
recipe = {"optimizer_cls_and_kwargs": (optimizer.MuonRecipe, {})} if settings["muon"] else {}
trainer = AdversarialTrainer(model=model, args=args, train_dataset=data, epsilon=settings["epsilon"], **recipe)
trainer.train()
trainer.save_model(settings["out"] + "/saved")
names = {type(module).__name__ for module in model.modules()}
sharded = sorted(name.removeprefix("FSDP") for name in names if name.startswith("FSDP"))
local = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters()) / model.num_parameters()
if trainer.is_world_process_zero():
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    result = {"losses": losses, "processes": args.world_size, "sharded": sharded, "held": local}
    json.dump(result, open(settings["out"] + "/result.json", "w"))
"""


def run(script: Path, processes: int, settings: dict | None = None, *arguments) -> str:
    """What `script` prints, with `settings` as JSON or with arguments."""
    # Without `--multi_gpu`, accelerate launches a single process on a CPU, whatever `--num_processes` says.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    launcher += "--num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0".split()
    arguments = map(str, arguments) if settings is None else [json.dumps(settings)]
    finished = subprocess.run(
        [*(launcher if processes > 1 else [sys.executable]), str(script), *arguments],
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def launch(
    model: Path,
    out: Path,
    processes: int,
    sharded_by_transformers: bool = False,
    muon: bool = False,
    epsilon: float = 0.0,
    **options,
) -> dict:
    """Three steps with four rows each, in one process or divided among several."""
    out.mkdir()
    (out / "train.py").write_text(SCRIPT)
    settings = {
        "model": str(model),
        "out": str(out),
        "sharded_by_transformers": sharded_by_transformers,
        "muon": muon,
        "epsilon": epsilon,
        "arguments": {"per_device_train_batch_size": 4 // processes, **options},
    }
    run(out / "train.py", processes, settings)
    result = json.loads((out / "result.json").read_text())
    assert result["processes"] == processes and len(result["losses"]) == 3
    return result


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model whose patches have up to 64 bytes: rows of one letter complete none."""
    torch.manual_seed(0)
    model = STLMForCausalLM(tiny_config(max_patch_bytes=64, **SHARING["cycle"]))
    with torch.no_grad():  # no projection of zero: all weights have gradients from the first step on
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    folder = tmp_path_factory.mktemp("distributed") / "start"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(start) -> tuple[Path, dict]:
    """Training in one process."""
    out = start.parent / "alone"
    return out, launch(start, out, 1)


def assert_same_checkpoint(saved: Path, expected: Path) -> None:
    state, reference = load_file(saved / "model.safetensors"), load_file(expected / "model.safetensors")
    # Gathered shards share no memory, so the library also writes the tied head, for its own models too.
    head = state.pop("lm_head.weight", state["model.embed_tokens.weight"])
    assert torch.equal(head, state["model.embed_tokens.weight"]) and state.keys() == reference.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, reference[name], atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
    model, other = (STLMForCausalLM.from_pretrained(folder).eval() for folder in (saved, expected))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([ids_of(TEXT)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, other(ids).logits, atol=1e-4, rtol=1e-4)


CLOCKS = """
import json, sys, torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.time_budget import TimeBudget
settings = json.loads(sys.argv[1])
class Skewed(TimeBudget):
    def _now(self):
        return super()._now() * (5 if args.process_index else 1)
class Record(TrainerCallback):
    rates = []
    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
data = [{"input_ids": list(b"a word and another w"), "labels": list(b"a word and another w")}] * 64
args = TrainingArguments(output_dir=settings["out"], max_steps=10**6, learning_rate=0.01, lr_scheduler_type="constant",
                         save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, ddp_timeout=60)
budget = Skewed(minutes=2 / 60)
model = STLMForCausalLM.from_pretrained(settings["model"])
Trainer(model=model, args=args, train_dataset=data, callbacks=[budget, Record()]).train()
total = float(sum(p.detach().double().abs().sum() for p in model.parameters()))
result = {"rates": Record.rates, "elapsed": budget.elapsed_seconds, "weights": total}
json.dump(result, open(f"{settings['out']}/{args.process_index}.json", "w"))
"""


def test_one_clock_decides_for_two_processes(tmp_path, start):
    (tmp_path / "train.py").write_text(CLOCKS)
    run(tmp_path / "train.py", 2, {"model": str(start), "out": str(tmp_path)})
    main, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert main == other
    assert 2 <= main["elapsed"] < 4 and len(main["rates"]) > 5
    assert main["rates"][-1] < 0.3 * max(main["rates"])


LAYERS = ["STLMByteLayer", "STLMTrunkAttentionBlock", "STLMTrunkFeedForwardBlock"]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_train_like_one(tmp_path, start, alone, sharded, checkpointing):
    folder, expected = alone
    result = launch(
        start, tmp_path / "two", 2, sharded_by_transformers=sharded, activation_checkpointing=checkpointing
    )
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert expected["losses"][-1] < expected["losses"][0]
    if sharded:
        assert set(LAYERS) <= set(result["sharded"])
        assert result["held"] < 0.6
    else:
        assert result["sharded"] == [] and result["held"] == 1
    assert_same_checkpoint(tmp_path / "two" / "saved", folder / "saved")


@pytest.mark.slow
def test_two_processes_orthogonalize_whole_matrices(tmp_path, start):
    # Muon needs all of a matrix, of which each process of FSDP2 holds a half.
    expected = launch(start, tmp_path / "one", 1, muon=True)
    for name in ("ddp", "fsdp2"):
        result = launch(start, tmp_path / name, 2, sharded_by_transformers=name == "fsdp2", muon=True)
        assert (result["held"] < 0.6) == (name == "fsdp2")
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert_same_checkpoint(tmp_path / name / "saved", tmp_path / "one" / "saved")


@pytest.mark.slow
def test_embeddings_are_perturbed_in_two_processes_as_in_one(tmp_path, start, alone):
    expected = launch(start, tmp_path / "one", 1, epsilon=2.0)
    assert expected["losses"][0] > alone[1]["losses"][0] + 1e-3
    for name in ("ddp", "fsdp2"):
        parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        result = launch(start, tmp_path / name, 2, sharded_by_transformers=name == "fsdp2", epsilon=2.0, **parts)
        assert (result["held"] < 0.6) == (name == "fsdp2")
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
        assert_same_checkpoint(tmp_path / name / "saved", tmp_path / "one" / "saved")


@pytest.mark.slow
def test_accelerate_shards_nothing_on_a_cpu(tmp_path, start, alone):
    # accelerate 1.15 looks at its FSDP plugin on accelerators alone, so `TrainingArguments(fsdp=True)` trains as DDP
    # here, without a word. When it shards, this fails, and the test above should take this way too.
    _, expected = alone
    result = launch(start, tmp_path / "two", 2, fsdp=True, fsdp_config={"version": 2, "reshard_after_forward": True})
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert result["sharded"] == [] and result["held"] == 1


def test_accelerate_would_shard_layer_by_layer():
    model = STLMForCausalLM(tiny_config(**SHARING["cycle"]))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    wrapped = [type(module).__name__ for module in model.modules() if wraps(module)]
    assert {name: wrapped.count(name) for name in wrapped} == dict(zip(LAYERS, (3, 2, 2)))


def test_the_example_divides_each_step_among_processes(tmp_path):
    text = (EXAMPLES / "data" / "shakespeare.txt").read_bytes()
    (tmp_path / "train.txt").write_bytes(text[:20_000])
    (tmp_path / "validation.txt").write_bytes(text[20_000:24_000])
    files = ("--train", tmp_path / "train.txt", "--validation", tmp_path / "validation.txt")
    sizes = ("--batch_size", 4, "--block_bytes", 128, "--max_bytes", 2048, "--eval_steps", 2, "--no-bf16")
    results, printed = {}, {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        printed[processes] = run(EXAMPLES / "pretrain.py", processes, None, *files, *sizes, "--output", output)
        results[processes] = json.loads((output / "results.json").read_text())
    assert results[1]["steps"] == results[2]["steps"] == 4
    assert results[1]["bytes_seen"] == results[2]["bytes_seen"] == 2048
    losses = [json.loads((tmp_path / str(n) / "history.json").read_text())[0]["loss"] for n in (1, 2)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert results[2]["bits_per_byte"] == pytest.approx(results[1]["bits_per_byte"], rel=1e-4)
    assert len(printed[2].splitlines()) == len(printed[1].splitlines())  # nothing is told twice
    assert json.loads((tmp_path / "2" / "begun.json").read_text())["batch_size"] == "4"


def test_rows_that_devices_cannot_share_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    run_folder = importlib.import_module("run_folder")

    def state(launched: str, processes: int, device: str = "cuda") -> None:
        found = SimpleNamespace(num_processes=processes, device=torch.device(device), distributed_type=launched)
        monkeypatch.setattr(run_folder, "launch_state", lambda: found)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    state("NO", 1)
    assert run_folder.per_device(8) == 1  # `Trainer` takes all GPUs
    state("NO", 1, "cpu")
    assert run_folder.per_device(8) == 8
    state("MULTI_GPU", 1)
    assert run_folder.per_device(8) == 8  # launched on one of eight
    state("MULTI_GPU", 2)
    assert run_folder.per_device(4) == 2
    with pytest.raises(SystemExit, match="--batch_size 3: expected a multiple of 2, the number of devices"):
        run_folder.per_device(3)
