"""Find tiles in shared memory that a compiled kernel overwrites while tensor cores read them.

Triton loads tiles of the next iterations of a loop ahead, and may leave products unfinished until
the next iteration. It gives a tile that products alone read a buffer more for that; one that
something else reads too may get a single buffer, which is a race. What is read here is the compiled
kernel's intermediate code for Hopper (`ttgir`).
"""

import re
from dataclasses import dataclass, field

ALLOCATED = re.compile(r"(%[\w#]+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
STORED = re.compile(r"(%[\w#]+) = ttg\.local_alloc %")
PART = re.compile(r"(%[\w#]+) = ttg\.memdesc_\w+ (%[\w#]+)")
COPIED = re.compile(r"async_copy_global_to_local %[\w#]+, (%[\w#]+)")
PRODUCT = re.compile(r"warp_group_dot (%[\w#]+), (%[\w#]+),")
WAITED = re.compile(r"warp_group_dot_wait .*pendings = (\d+)")


@dataclass
class Event:
    """Something that a loop does with tiles, in order."""

    kind: str
    """`write`, `read` by a product, or `wait` for products."""
    tiles: frozenset[str] = frozenset()
    pending: int = 0
    """How many products may go on after a `wait`, the newest; they end in order."""


@dataclass
class Reader:
    """Reads code line by line."""

    buffers: dict[str, int] = field(default_factory=dict)
    """Buffers of each tile."""
    ahead: dict[str, int] = field(default_factory=dict)
    """Loads of each tile before the loop that goes on with them."""
    part_of: dict[str, str] = field(default_factory=dict)
    """The tile of each view."""
    regions: list[list[Event] | None] = field(default_factory=list)
    """What happens in each loop that is open; `None` for other regions."""
    found: list[str] = field(default_factory=list)

    def read(self, line: str) -> None:
        """Take in a line."""
        if line.lstrip().startswith("}") and not line.rstrip().endswith("{"):
            ended = self.regions.pop() if self.regions else None
            if ended is not None:
                self.found += _overwritten(ended, self.buffers, self.ahead)
        elif match := ALLOCATED.search(line):
            self.buffers[match[1]] = int(match[2])
        elif match := PART.search(line):
            self.part_of[match[1]] = self._tile(match[2])
        else:
            self._read_event(line)
        if re.search(r"\{\s*(loc\(.*\))?$", line) and not line.lstrip().startswith("}"):
            self.regions.append([] if "scf.for" in line or "scf.while" in line else None)

    def _tile(self, name: str) -> str:
        return self.part_of.get(name, name)

    def _read_event(self, line: str) -> None:
        if match := STORED.search(line):
            self.buffers[match[1]] = 1
            self._add(Event("write", frozenset({match[1]})))
        elif match := COPIED.search(line):
            self._add(Event("write", frozenset({self._tile(match[1])})))
        elif match := PRODUCT.search(line):
            self._add(Event("read", frozenset(map(self._tile, match.groups()))))
            if "isAsync = true" not in line:
                self._add(Event("wait"))
        elif match := WAITED.search(line):
            self._add(Event("wait", pending=int(match[1])))

    def _add(self, event: Event) -> None:
        loops = [each for each in self.regions if each is not None]
        if loops:
            loops[-1].append(event)
        elif event.kind == "write":
            for each in event.tiles:
                self.ahead[each] = self.ahead.get(each, 0) + 1


def races(ttgir: str) -> list[str]:
    """List the tiles that are overwritten in a loop with a product of theirs in flight.

    Args:
        ttgir: Intermediate code of a kernel.
    """
    reader = Reader()
    for line in ttgir.splitlines():
        reader.read(line)
    return reader.found


def _overwritten(events: list[Event], buffers: dict[str, int], ahead: dict[str, int]) -> list[str]:
    """Follow some iterations of a loop."""
    in_flight: list[dict[str, int]] = []
    found: list[str] = []
    for iteration in range(2 + 2 * max(buffers.values(), default=1)):
        for event in events:
            if event.kind == "wait":
                in_flight = in_flight[-event.pending :] if event.pending else []
            elif event.kind == "read":
                in_flight.append({each: iteration % buffers.get(each, 1) for each in event.tiles})
            else:
                (tile,) = event.tiles
                buffer = (iteration + ahead.get(tile, 0)) % buffers.get(tile, 1)
                if tile not in found and any(each.get(tile) == buffer for each in in_flight):
                    found.append(tile)
    return found
