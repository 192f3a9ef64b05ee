"""An operation, where its code comes from, and which implementation a call takes."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from lme_kernels import device

# Set by `lme_kernels.inspection.count_calls` for the calls of one thread or task.
CALLS: ContextVar[Counter[str] | None] = ContextVar("lme_kernels_calls", default=None)

# Arguments and results differ from op to op.
Function = Callable[..., Any]


class Backend(StrEnum):
    """Where the code of an implementation comes from."""

    TORCH = "torch"
    TRITON = "triton"
    CUDA = "cuda"
    PALLAS = "pallas"
    NKI = "nki"


class UnsupportedBackendError(ValueError):
    """A backend was named that cannot serve the call; the message says why."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An implementation whose module has been imported."""

    backend: str
    function: Function
    why_not: Callable[..., str | None] | None
    """Takes the tensors of a call and says why it cannot serve them; `None` if it serves all."""
    automatic: bool
    """Whether automatic choice may take it."""
    suits: Callable[..., bool] | None
    """Takes the tensors of a call and says whether automatic choice takes it for them; `None` if
    it does whenever it can serve."""


@dataclass(frozen=True, eq=False)
class Op:
    """One operation with a torch definition and any number of faster implementations.

    The public function `lme_kernels.ops.<name>.<name>` validates its arguments and calls
    `choose(backend, *tensors)(...)`. Every implementation takes the arguments of `reference`.
    """

    name: str
    """Name of the folder, the public function, the test and the run file's entry."""
    reference: Function
    """The definition in plain torch; serves every device."""
    implementations: Mapping[str, str] = field(default_factory=dict)
    """Module of each backend, fastest first; it defines a function called `name`, and may define
    `why_not(*tensors) -> str | None`, which says why a call's tensors cannot be served, and
    `suits(*tensors) -> bool`, which says whether it is the fastest for them. Both take `options` by
    keyword too if the public function passes them to `choose`."""
    manual: frozenset[str] = frozenset()
    """Backends that run only when named: not yet proven, or slower than those after them."""
    traced: bool = False
    """Whether automatic choice under `torch.compile` takes the reference, because the compiler
    fuses it with its neighbours, which it cannot do with a kernel of ours."""
    _tables: dict[str, tuple[Loaded, ...]] = field(default_factory=dict, repr=False)

    @property
    def function(self) -> Function:
        """The public function, found by its name."""
        return vars(import_module(f"lme_kernels.ops.{self.name}"))[self.name]

    def check_backend(self, backend: str | None) -> None:
        """Check that this op has `backend`, on whatever device.

        Raises:
            UnsupportedBackendError: If it does not.
        """
        if backend is not None and backend != "torch" and backend not in self.implementations:
            raise UnsupportedBackendError(
                f"`{self.name}` has no implementation `{backend}`; it has {self._known()}"
            )

    def load(self, device_type: str | None = None) -> None:
        """Import what can run here, so that no call has to: an import cannot be traced.

        Args:
            device_type: Device to fill the table for; `None` fills those of the CPU and of the
                accelerator that is here.
        """
        for each in device.types_here() if device_type is None else (device_type,):
            if each not in self._tables:
                self._tables[each] = tuple(
                    self._load_one(backend, module, each)
                    for backend, module in self.implementations.items()
                    if device.why_unavailable(backend, each) is None
                )

    def choose(
        self, backend: str | None, *tensors: Tensor | None, options: object = None
    ) -> Function:
        """Pick the implementation that runs a call.

        Args:
            backend: The one to take; `None` takes the first automatic one that serves the call.
            tensors: Tensors of the call; the first is not `None` and decides the device.
            options: What else decides whether an implementation can serve, for ops where
                something does.

        Returns:
            A function with the arguments of `reference`.

        Raises:
            UnsupportedBackendError: If `backend` is named and cannot serve the call.
        """
        device_type = "cpu" if tensors[0] is None else tensors[0].device.type
        compiling = torch.compiler.is_compiling()
        if not compiling and device_type not in self._tables:
            self.load(device_type)
        chosen = self._choose(backend, device_type, compiling, tensors, options)
        if not compiling and (calls := CALLS.get()) is not None:
            calls[f"{self.name}@{'torch' if chosen is None else chosen.backend}"] += 1
        return self.reference if chosen is None else chosen.function

    def why_not(self, backend: str, *tensors: Tensor | None, options: object = None) -> str | None:
        """Say why `backend` cannot serve a call; `None` if it can.

        Args:
            backend: Name of a backend.
            tensors: Tensors of the call, as `choose` takes them.
            options: As `choose` takes them.

        Returns:
            The reason in words, or `None`.
        """
        if backend == "torch":
            return None
        if backend not in self.implementations:
            return f"there is no such implementation of `{self.name}`"
        device_type = "cpu" if tensors[0] is None else tensors[0].device.type
        reason = device.why_unavailable(backend, device_type)
        if reason is not None:
            return reason
        for loaded in self._tables.get(device_type, ()):
            if loaded.backend == backend:
                return _why_not(loaded, tensors, options)
        return f"`{self.name}` was not loaded for {device_type} before it was compiled"

    def _known(self) -> str:
        return ", ".join(f"`{each}`" for each in ("torch", *self.implementations))

    def _load_one(self, backend: str, module: str, device_type: str) -> Loaded:
        names = vars(import_module(module))
        # Triton on a CPU means its interpreter, which is for tests.
        interpreted = backend == "triton" and device_type == "cpu"
        automatic = backend not in self.manual and not interpreted
        return Loaded(
            str(backend), names[self.name], names.get("why_not"), automatic, names.get("suits")
        )

    def _choose(
        self,
        backend: str | None,
        device_type: str,
        compiling: bool,
        tensors: tuple[Tensor | None, ...],
        options: object,
    ) -> Loaded | None:
        if backend == "torch" or (backend is None and compiling and self.traced):
            return None
        for loaded in self._tables.get(device_type, ()):
            if backend is None:
                wanted = loaded.automatic and _suits(loaded, tensors, options)
            else:
                wanted = loaded.backend == backend
            if wanted and _why_not(loaded, tensors, options) is None:
                return loaded
        if backend is None:
            return None
        reason = self.why_not(backend, *tensors, options=options)
        raise UnsupportedBackendError(
            f"`{self.name}` cannot run on the backend `{backend}`: {reason}. It has {self._known()}; "
            f"`backend=None` takes the fastest that serves the call"
        )


def _why_not(loaded: Loaded, tensors: tuple[Tensor | None, ...], options: object) -> str | None:
    if loaded.why_not is None:
        return None
    if options is None:
        return loaded.why_not(*tensors)
    return loaded.why_not(*tensors, options=options)


def _suits(loaded: Loaded, tensors: tuple[Tensor | None, ...], options: object) -> bool:
    if loaded.suits is None:
        return True
    if options is None:
        return loaded.suits(*tensors)
    return loaded.suits(*tensors, options=options)
