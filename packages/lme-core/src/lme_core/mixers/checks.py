"""Checks of sizes that mixers' configs have in common."""

from collections.abc import Mapping


def check_positive(sizes: Mapping[str, int | float | None]) -> None:
    """Refuse sizes that are not above zero.

    Args:
        sizes: By the setting's name; `None` is a setting that was left out.

    Raises:
        ValueError: If one is below 1, or for a fraction at most 0.
    """
    for name, size in sizes.items():
        if size is None:
            continue
        if isinstance(size, int) and size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}")
        if size <= 0:
            raise ValueError(f"`{name}` must be above 0, got {size}")


def common_heads(counts: Mapping[str, int]) -> int:
    """Return the largest number of heads, which every other must divide.

    Args:
        counts: By the setting's name.

    Raises:
        ValueError: If one is below 1 or does not divide the largest.
    """
    check_positive(counts)
    largest = max(counts, key=lambda name: counts[name])
    for name, count in counts.items():
        if counts[largest] % count:
            raise ValueError(
                f"`{name}` must divide the largest number of heads, `{largest}` "
                f"({counts[largest]}), got {count}"
            )
    return counts[largest]


def head_units(counts: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Say what a number of devices must divide, so that heads can be cut over them.

    Devices share the channels of heads that are fewer than they.

    Args:
        counts: Numbers of heads by the setting's name, each a divisor of the largest.
        sizes: Channels of such a head, by the same name.

    Returns:
        By what to call it, in the order of `counts`.
    """
    largest = max(counts.values())
    units = {}
    for name, count in counts.items():
        if count == largest:
            units[name] = count
        elif name in sizes:
            units[f"{name} * {sizes[name]}"] = count * sizes[name]
    return units
