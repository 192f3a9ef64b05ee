"""Low-precision copies of fp32 parameters, and the loss scale that fp16 gradients need."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter


class MasterWeights:
    """Keeps a model's parameters in fp32 while the model computes with a copy.

    The copy is made once a step. Buffers stay as they are. Parameters shared by several modules
    stay shared and have one master.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Take fp32 masters of the model's parameters and turn the model's own into copies.

        Args:
            model: Its floating point parameters become `dtype`, in place.
            dtype: torch.bfloat16 or torch.float16.
        """
        self._copies: list[Parameter] = []
        self._masters: dict[str, Parameter] = {}
        for name, copy in model.named_parameters():
            master = copy.detach().clone().float() if copy.is_floating_point() else copy.detach()
            self._masters[name] = Parameter(master, requires_grad=copy.requires_grad)
            if copy.is_floating_point():
                copy.data = copy.data.to(dtype)
            self._copies.append(copy)

    def named_parameters(self) -> Mapping[str, Parameter]:
        """Return the masters by the fully qualified names of their copies."""
        return self._masters

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Add the copies' gradients to the masters' in fp32, and clear the copies'."""
        masters: list[Tensor] = []
        gradients: list[Tensor] = []
        for master, copy in zip(self._masters.values(), self._copies, strict=True):
            if copy.grad is None:
                continue
            if master.grad is None:
                master.grad = copy.grad.to(master.dtype)
            else:
                masters.append(master.grad)
                gradients.append(copy.grad)
            copy.grad = None
        if masters:
            # Foreach ops have no public names.
            torch._foreach_add_(masters, gradients)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the masters into the model, rounded to its dtype."""
        # Foreach ops have no public names.
        torch._foreach_copy_(list(self._copies), list(self._masters.values()))  # pyright: ignore[reportPrivateImportUsage]


class LossScaler:
    """Multiplies the loss so that small fp16 gradients do not vanish, and adapts the factor.

    The factor halves after a step whose gradients overflowed (which is skipped) and doubles after
    2000 that did not. It lives on the device: adapting it does not wait for the step.

    Source: Micikevicius et al. 2018, section 3.2 (arXiv:1710.03740).
    """

    _GROWTH = 2.0
    _BACKOFF = 0.5
    _SMALLEST = 1.0

    def __init__(
        self,
        device: torch.device,
        *,
        initial_scale: float = 2.0**16,
        growth_interval: int = 2000,
    ) -> None:
        """Start at a scale.

        Args:
            device: Of the loss.
            initial_scale: First factor, at least 1.
            growth_interval: Steps without overflow before the factor doubles.
        """
        self._scale = torch.full((), initial_scale, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._growth_interval = growth_interval

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the factor."""
        return loss * self._scale

    def inverse(self) -> Tensor:
        """Return one over the factor, 0-d fp32 on the device."""
        return self._scale.reciprocal()

    def update(self, found_inf: Tensor) -> None:
        """Adapt the factor after a step.

        Args:
            found_inf: Whether the step's gradients were not finite, 0-d bool on the device.
        """
        good = torch.where(found_inf, 0, self._good_steps + 1)
        grow = good >= self._growth_interval
        change = torch.where(found_inf, self._BACKOFF, torch.where(grow, self._GROWTH, 1.0))
        scale = self._scale * change
        # A scale of inf would make every later step overflow.
        self._scale = torch.where(torch.isfinite(scale), scale, self._scale).clamp(
            min=self._SMALLEST
        )
        self._good_steps = torch.where(grow, 0, good)

    def state_dict(self) -> dict[str, Any]:
        """Return the factor and the steps since it changed, fit for JSON; waits for the device."""
        return {"scale": self._scale.item(), "good_steps": self._good_steps.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved factor.

        Args:
            state: From `state_dict`.
        """
        self._scale.fill_(float(state["scale"]))
        self._good_steps.fill_(int(state["good_steps"]))


def set_tf32(allowed: bool) -> None:
    """Let fp32 matrix products on NVIDIA GPUs use TF32, or not.

    Args:
        allowed: Whether inputs may be rounded to 10 mantissa bits.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
