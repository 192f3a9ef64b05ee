"""Differences between the run that saved a checkpoint and the run that wants to continue it."""

from collections.abc import Collection, Mapping

from lme_parallel.checkpoint.documents import Json

_ABSENT = "(absent)"


def differences(
    saved: Mapping[str, Json], current: Mapping[str, Json], *, ignore: Collection[str] = ()
) -> list[str]:
    """List where two resolved runs, or two architectures, differ.

    Args:
        saved: From the checkpoint.
        current: Of this run; tuples count as lists.
        ignore: Dotted paths that may differ, with all that is below them.

    Returns:
        Sentences `a.b: saved 1, now 2`, sorted by path; empty if equal.
    """
    found: list[tuple[str, str]] = []
    _compare("", saved, current, frozenset(ignore), found)
    return [f"{path}: {what}" for path, what in sorted(found)]


def _compare(
    path: str, saved: Json, current: Json, ignore: frozenset[str], found: list[tuple[str, str]]
) -> None:
    if path in ignore:
        return
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in {**saved, **current}:
            inner = f"{path}.{key}" if path else key
            _compare(inner, saved.get(key, _ABSENT), current.get(key, _ABSENT), ignore, found)
        return
    if isinstance(saved, (list, tuple)) and isinstance(current, (list, tuple)):
        if len(saved) == len(current):
            for index, (left, right) in enumerate(zip(saved, current, strict=True)):
                _compare(f"{path}[{index}]", left, right, ignore, found)
            return
        saved, current = list(saved), list(current)
    if saved != current or isinstance(saved, bool) != isinstance(current, bool):
        found.append((path, f"saved {saved!r}, now {current!r}"))
