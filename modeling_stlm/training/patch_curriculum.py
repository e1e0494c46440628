# SPDX-License-Identifier: Apache-2.0
"""Short patches first, long ones later, for `patching="learned"` (ATDC, arXiv:2605.30080)."""

from transformers import TrainerCallback


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
        router = model.base_model.router
        if router is None:
            raise ValueError(f"patching={model.config.patching!r} has no router: this is for patching='learned'")
        progress = min(1.0, state.global_step / self.steps)
        router.patch_bytes = self.first_bytes + progress * (model.config.patch_bytes - self.first_bytes)
