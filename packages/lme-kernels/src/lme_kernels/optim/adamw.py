"""AdamW whose update is one launch for all parameters of a dtype."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lme_kernels.op import Backend, Op
from lme_kernels.optim import reference
from lme_kernels.optim.batch import AdamWBatch, AdamWSettings
from lme_kernels.optim.local import local
from lme_kernels.optim.tables import ALIGNMENT
from lme_kernels.precision import compute_dtype

ADAMW = Op(
    name="adamw",
    reference=reference.adamw,
    implementations={Backend.TRITON: "lme_kernels.optim._triton_adamw"},
    # Proven, but not yet measured beside the fused update of torch.
    manual=frozenset({Backend.TRITON}),
)

# Entries of a parameter's state that are means.
_MEANS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, as `torch.optim.AdamW` computes it.

    State has torch's names (`step`, `exp_avg`, `exp_avg_sq`), so that checkpoints of either load
    into the other. Means are at least float32 whatever the parameter's dtype. Nothing waits for
    the device: `step` counts there, and `lr` may be a 0-d tensor there, which a captured CUDA graph
    reads anew in each replay. Like torch's fused optimizers it reads the attributes `found_inf`
    (no update if not zero) and `grad_scale` (gradients are divided by it) if a scaler sets them.

    Source: Loshchilov and Hutter 2019, algorithm 2 (arXiv:1711.05101).
    """

    # Said to `torch.amp.GradScaler`: this optimizer takes the two below.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    # A copy or one read from a file chooses automatically.
    _backend: str | None = None

    def __init__(
        self,
        params: Iterable[Any],  # tensors, pairs of name and tensor, or groups: as torch takes them
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        backend: Backend | str | None = None,
    ) -> None:
        """Make an optimizer.

        Args:
            params: What to update: tensors, named tensors, or groups with settings of their own.
            lr: Learning rate, at least 0.
            betas: Decay of the means of gradients and of their squares, each from 0 to below 1.
            eps: Added to the root of the second mean.
            weight_decay: Share of a parameter, times `lr`, that a step takes away.
            maximize: Whether to climb.
            stochastic_rounding: Whether bfloat16 parameters are rounded up or down at random, so
                that small updates count on average. The bits are a function of `seed`, the step,
                the number of the parameter and the element (of a shard: in the shard).
            seed: Seed of that, from 0 to 2^63 - 1.
            backend: Implementation to run; `None` takes the fastest one proven for the device.

        Raises:
            ValueError: If a setting is out of its range.
        """
        ADAMW.check_backend(backend)
        _check(lr, betas, eps, weight_decay, seed)
        self._backend = backend
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            # What torch says of an optimizer that keeps `step` on the device and takes `found_inf`.
            "fused": True,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state that `torch.optim.AdamW` may have written."""
        super().__setstate__(state)
        for group in self.param_groups:
            if group.get("amsgrad"):
                raise ValueError("`amsgrad` is not supported; use `torch.optim.AdamW`")
            group["fused"] = True
            group.setdefault("maximize", False)
            group.setdefault("stochastic_rounding", self.defaults["stochastic_rounding"])
            group.setdefault("seed", self.defaults["seed"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state, with its means in full: torch would round them to the parameter's dtype.

        Args:
            state_dict: As `state_dict` gives it, of this class or of `torch.optim.AdamW`.
        """
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [each for group in self.param_groups for each in group["params"]]
        for key, parameter in zip(saved, own, strict=True):
            for name in _MEANS:
                value = state_dict["state"].get(key, {}).get(name)
                if value is not None:
                    dtype = compute_dtype(parameter.dtype)
                    self.state[parameter][name] = value.to(parameter.device, dtype, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; torch's own method loads its compiler first, which takes seconds."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # what the closure returns
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the loss again; `None` for none.

        Returns:
            What the closure returns.

        Raises:
            ValueError: If a gradient is sparse.
            UnsupportedBackendError: If `backend` was named and cannot serve a parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            for batch in self._batches(group, first):
                tensors = (batch.parameters[0], batch.grads[0], batch.exp_avgs[0])
                settings = AdamWSettings(
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    maximize=group["maximize"],
                    stochastic_rounding=group["stochastic_rounding"],
                    seed=group["seed"],
                    grad_scale=self.grad_scale,
                    found_inf=self.found_inf,
                )
                ADAMW.choose(self._backend, *tensors)(batch, settings)
            first += len(group["params"])
        return loss

    def _batches(self, group: dict[str, Any], first: int) -> list[AdamWBatch]:
        """Sort a group's parameters by what one launch takes."""
        batches: dict[tuple[object, ...], AdamWBatch] = {}
        for index, parameter in enumerate(group["params"], start=first):
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise ValueError("`AdamW` takes no sparse gradients; use `torch.optim.SparseAdam`")
            state = self._state_of(parameter)
            value, grad = local(parameter), local(parameter.grad)
            # One tensor at an odd address would cost all others their vector loads.
            is_aligned = (value.data_ptr() | grad.data_ptr()) % ALIGNMENT == 0
            kind = (value.device, value.dtype, grad.dtype, value.is_contiguous(), is_aligned)
            batch = batches.setdefault(kind, AdamWBatch())
            batch.parameters.append(value)
            batch.grads.append(grad)
            batch.exp_avgs.append(local(state["exp_avg"]))
            batch.exp_avg_sqs.append(local(state["exp_avg_sq"]))
            batch.steps.append(state["step"])
            batch.indices.append(index)
        return list(batches.values())

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in _MEANS:
                state[name] = torch.zeros_like(
                    parameter.detach(), dtype=compute_dtype(parameter.dtype)
                )
        return state


def _check(
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int,
) -> None:
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"`lr` must be at least 0, got {lr}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"`betas` must be from 0 to below 1, got {betas}")
    if not eps >= 0:
        raise ValueError(f"`eps` must be at least 0, got {eps}")
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay` must be at least 0, got {weight_decay}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be from 0 to 2^63 - 1, got {seed}")
