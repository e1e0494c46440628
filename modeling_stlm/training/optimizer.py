# SPDX-License-Identifier: Apache-2.0
"""NorMuon for matrices, AdamW for everything else (embeddings and the head over their ids, norms, convolutions, vectors)."""

import collections
import functools

import torch
from torch import nn


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW, except for parameter groups with `use_muon=True`.

    Muon (Keller Jordan, 2024) orthogonalises the momentum of a matrix; NorMuon (arXiv:2510.05491) then normalises the
    update of each neuron by a running second moment. `torch.optim.Muon`, which has none, iterates in bfloat16, which a CPU
    without bfloat16 arithmetic emulates: 0.55 s per step for the matrices of `stlm-3m` on one core against 0.14 s in
    float32, where a whole training step of 8 kB takes 1.2 s. So the iteration runs in float32 there.
    """

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["use_muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["use_muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict) -> None:
        alike = collections.defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                alike[parameter.shape, parameter.device, parameter.dtype].append(parameter)
        for ((rows, columns), _, dtype), parameters in alike.items():
            buffers = [self._momentum_buffer(parameter) for parameter in parameters]
            gradients = [parameter.grad for parameter in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            updates = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
            updates = self._normalize_neurons(parameters, orthogonalize(updates), group["betas"][1]).to(dtype).unbind()
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _normalize_neurons(self, parameters: list[torch.Tensor], updates: torch.Tensor, beta: float) -> torch.Tensor:
        """`updates (N, rows, columns)`, each row divided by the root of a running mean of its squares; the norm of each matrix
        stays. In wide matrices it is the columns: orthogonal rows have nearly the same norm already.

        The paper always takes rows, has no Nesterov momentum, and scales updates to a root mean square of 0.2.
        """
        updates = updates.float()
        squares = updates.square().mean(2 if updates.shape[1] >= updates.shape[2] else 1, keepdim=True)
        moments = [self._neuron_moment(parameter, squares.shape[1:]) for parameter in parameters]
        torch._foreach_lerp_(moments, list(squares.to(moments[0].dtype).unbind()), 1 - beta)
        normalized = updates * torch.stack(moments).float().clamp(min=1e-12).rsqrt()
        before, after = (states.norm(dim=(1, 2), keepdim=True) for states in (updates, normalized))
        return normalized * (before / after.clamp(min=1e-7))

    def _momentum_buffer(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] = torch.tensor(0.0)  # unused; AdamW looks for it when a state is loaded
        return state["momentum_buffer"]

    def _neuron_moment(self, parameter: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        state = self.state[parameter]
        if "neuron_moment" not in state:  # a first step, or a state of Muon
            state["neuron_moment"] = parameter.new_zeros(shape)
        return state["neuron_moment"]


@functools.cache
def has_bfloat16(device_type: str) -> bool:
    """Whether the device is known to have instructions for bfloat16: CUDA says so, and CPUs with AVX-512 BF16 or AMX do."""
    if device_type != "cpu":
        return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrix of each of `matrices (N, rows, columns)`, roughly: singular values end between 0.5 and
    1.5 (Newton-Schulz, quintic). Matrices of one shape go together: a GPU has little to do with each of them."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if has_bfloat16(matrices.device.type) else matrices.float()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonRecipe:
    """Optimizer factory for `Trainer(optimizer_cls_and_kwargs=(MuonRecipe, {...}))`.

    Every two-dimensional parameter goes to NorMuon, those of classification heads (`score`, `qa_outputs`) included, except
    for embeddings and the head over their ids (`get_output_embeddings`). Keywords:
        muon_lr (`float`): learning rate of the matrices; adamw_lr (`float`): of all others.
        weight_decay (`float`): of the matrices; the others have none.
    """

    def __call__(
        self, model: nn.Module, muon_lr: float = 0.02, adamw_lr: float = 3e-3, weight_decay: float = 0.0
    ) -> MuonWithAdamW:
        embeddings = {
            id(parameter)
            for module in (*(m for m in model.modules() if isinstance(m, nn.Embedding)), model.get_output_embeddings())
            if module is not None
            for parameter in module.parameters()
        }
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [p for p in trainable if p.ndim == 2 and id(p) not in embeddings]
        others = [p for p in trainable if p.ndim != 2 or id(p) in embeddings]
        optimizer = MuonWithAdamW(
            [
                {"params": matrices, "use_muon": True, "lr": muon_lr, "momentum": 0.95, "weight_decay": weight_decay},
                {"params": others, "use_muon": False, "lr": adamw_lr, "momentum": 0.0, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            eps=1e-10,
            fused=True,  # one pass over large tables instead of a dozen
        )
        optimizer._step_supports_amp_scaling = False  # Muon wants gradients that a scaler has unscaled
        return optimizer
