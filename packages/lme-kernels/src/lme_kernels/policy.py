"""Which implementation a run uses for which op: the run file's `kernel_args`."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

from lme_kernels.aliases import ALIASES, BACKENDS, NAMES, Target
from lme_kernels.op import Backend, Function, Op


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelArgs:
    """Which fused kernels a run uses."""

    kernels: list[str] | None = None
    """Absent: the fastest proven implementation of every op. Empty: the torch references only. A
    list: its ops as named (`op`, `op@backend` or another system's spelling), all others the
    fastest proven; `op@torch` pins the reference."""

    def __post_init__(self) -> None:
        _resolve(self.kernels or ())


@dataclass(frozen=True, slots=True)
class Choice:
    """What a run says about one op."""

    backend: str | None = None
    """Backend to run; `None` takes the fastest one proven on the tensors' device."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments that the run fixes in every call of the op."""


@dataclass(frozen=True, slots=True)
class KernelPolicy:
    """Choice of an implementation for every op; without arguments all are automatic."""

    choices: Mapping[str, Choice] = field(default_factory=dict)
    """Choices by the op's name."""
    default: Choice = field(default_factory=Choice)
    """Choice for every op without one of its own."""

    @classmethod
    def from_args(cls, args: KernelArgs) -> "KernelPolicy":
        """Read a run file's section.

        Args:
            args: The section `kernel_args`.

        Returns:
            The policy it describes.

        Raises:
            ValueError: If two entries ask for different implementations of one op.
        """
        if args.kernels is None:
            return cls()
        if not args.kernels:
            return cls(default=Choice(Backend.TORCH))
        resolved = _resolve(args.kernels)
        for kernel, note in _notes(args.kernels):
            warnings.warn(f"`kernels: {kernel}` has no effect: {note}", stacklevel=2)
        return cls(choices=resolved)

    def choice(self, name: str) -> Choice:
        """What this policy says about the op called `name`."""
        return self.choices.get(name, self.default)

    def bind(self, op: Op) -> Function:
        """Fix the choice of `op`'s implementation and import what it needs.

        Which implementation runs is decided in the call, by its tensors' device.

        Args:
            op: The op to bind.

        Returns:
            The op's public function, with `backend` and options bound where this policy names
            them.

        Raises:
            UnsupportedBackendError: If this policy names a backend that `op` does not have.
        """
        op.load()
        choice = self.choice(op.name)
        op.check_backend(choice.backend)
        if choice.backend is None and not choice.options:
            return op.function
        return partial(op.function, backend=choice.backend, **choice.options)


def _resolve(kernels: list[str] | tuple[()]) -> dict[str, Choice]:
    choices: dict[str, Choice] = {}
    origins: dict[str, str] = {}
    for kernel in kernels:
        for name, choice in _parse(kernel):
            if name in choices and choices[name] != choice:
                raise ValueError(
                    f"`kernels` has both `{origins[name]}` and `{kernel}`, which ask for "
                    f"different implementations of `{name}`: keep one of them"
                )
            choices[name], origins[name] = choice, kernel
    return choices


def _parse(kernel: str) -> list[tuple[str, Choice]]:
    spelling, at, backend = kernel.partition("@")
    if at and backend not in BACKENDS:
        raise ValueError(
            f"`kernels` has `{kernel}`, and `{backend}` is no backend"
            f"{_hint(backend, BACKENDS)} Known: {', '.join(BACKENDS)}"
        )
    targets = ALIASES.get(spelling)
    if targets is None:
        if spelling not in NAMES:
            raise ValueError(_unknown(kernel, spelling))
        targets = (Target(spelling),)
    return [
        (target.op, Choice(backend or target.backend, dict(target.options)))
        for target in targets
        if target.op is not None
    ]


def _notes(kernels: list[str]) -> list[tuple[str, str]]:
    spellings = (kernel.partition("@")[0] for kernel in kernels)
    return [
        (spelling, target.note)
        for spelling in spellings
        for target in ALIASES.get(spelling, ())
        if target.note is not None
    ]


def _unknown(kernel: str, spelling: str) -> str:
    known = sorted({*NAMES, *ALIASES})
    return (
        f"`kernels` has `{kernel}`, which is no kernel{_hint(spelling, known)} "
        f"Known: {', '.join(known)}"
    )


def _hint(given: str, known: Sequence[str]) -> str:
    close = get_close_matches(given, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else "."
