"""What may be wrong with a run file, and where it stands."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Path = tuple[str | int, ...]
"""Keys and list positions from the top of a run file to one value."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key or value was written."""

    file: str
    """The file as the user named it, or `--set`."""
    line: int = 0
    """Counted from 1; 0 where lines mean nothing (`--set`)."""
    column: int = 0
    """Counted from 1; 0 where columns mean nothing."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in one sentence, with what to do about it."""

    message: str
    """The sentence; names values and what is allowed."""
    path: Path = ()
    """The setting it is about; empty for the file as a whole."""
    place: Place | None = None
    """Where that setting stands; `None` where it stands nowhere."""
    remedy: str | None = None
    """What to do, e.g. the spelling that was probably meant."""
    suggestion: str | None = None
    """The one name proposed in `remedy`, for programs that read it."""

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        name = f"`{dotted(self.path)}` " if self.path else ""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{where}{name}{self.message}{remedy}"


class RunFileError(ValueError):
    """A run file that cannot be used; `problems` lists every reason found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        super().__init__("\n".join(str(each) for each in self.problems))


def dotted(path: Path) -> str:
    """Write a path as the user would for `--set`, e.g. `datasets.0.class_args.split`."""
    return ".".join(str(each) for each in path)
