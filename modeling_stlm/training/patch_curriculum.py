# SPDX-License-Identifier: Apache-2.0
"""Short patches first, long ones later, for `patching="learned"` (ATDC, arXiv:2605.30080)."""

from torch import nn
from transformers import PreTrainedConfig, TrainerCallback


class PatchLengthCurriculum(TrainerCallback):
    """Lets the length that the router is trained for grow linearly from `first_bytes` to `config.patch_bytes`.

    Args:
        steps (`int`): optimizer steps until it is reached.
        first_bytes (`float`, defaults to 2): average bytes in a patch to begin with, more than 1.

    Raises:
        ValueError: if these make no sense or, when training begins, if the model has no router.
    """

    def __init__(self, steps: int, first_bytes: float = 2.0):
        if steps < 1 or first_bytes <= 1:
            raise ValueError(f"steps={steps} must be at least 1 and first_bytes={first_bytes} more than 1")
        self.steps, self.first_bytes = steps, first_bytes

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        progress = min(1.0, state.global_step / self.steps)
        last_bytes = config_of(model).patch_bytes
        for router in routers_of(model):
            router.patch_bytes = self.first_bytes + progress * (last_bytes - self.first_bytes)


def routers_of(model: nn.Module) -> list[nn.Module]:
    """Routers inside the model, whatever wraps it (peft, DDP, `torch.compile`). peft may keep copies of one."""
    routers = [m for m in model.modules() if "patch_bytes" in vars(m) and hasattr(m, "ratio_loss")]
    if not routers:
        raise ValueError(f"patching={config_of(model).patching!r} has no router: this is for patching='learned'")
    return routers


def config_of(model: nn.Module) -> PreTrainedConfig:
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "patch_bytes"):
            return module.config
    raise ValueError(f"{type(model).__name__} has no patches: this is for STLM with patching='learned'")
