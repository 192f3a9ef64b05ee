"""A config being translated: every field is typed when read, and none may be overlooked."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from lme_convert.errors import ConversionError, UnsupportedModelError
from lme_convert.layout import blocks

logger = logging.getLogger(__name__)

# Above any model, and far below what would exhaust memory before the weights are looked at.
_MAX_INTEGER = 2**31 - 1


class Settings:
    """Fields of one config (or of one block in it), and which of them were read.

    Args:
        values: The fields.
        where: Whose they are, for messages: `llama` or `sequence_mixer_blocks[0]`.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._read: set[str] = set()
        self.where = where

    def value(self, name: str, default: Any = None) -> Any:  # a JSON value
        """Read a field as it is."""
        self._read.add(name)
        return self._values.get(name, default)

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Read an integer of at least `minimum`; absent or null means `default`.

        Raises:
            ConversionError: If there is none, or it is not such an integer.
        """
        value = self.optional_integer(name, minimum=minimum)
        value = default if value is None else value
        if value is None:
            raise ConversionError(f"`{name}` is missing in the config of {self.where}")
        return value

    def optional_integer(self, name: str, *, minimum: int = 1) -> int | None:
        """Read an integer of at least `minimum`; absent or null is `None`."""
        value = self.value(name)
        if value is None:
            return None
        if type(value) is not int or not minimum <= value <= _MAX_INTEGER:
            self._refuse(name, value, f"an integer from {minimum} to {_MAX_INTEGER}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Read a finite number; absent or null means `default`.

        Raises:
            ConversionError: If there is none, or it is not such a number.
        """
        value = self.optional_number(name)
        value = default if value is None else value
        if value is None:
            raise ConversionError(f"`{name}` is missing in the config of {self.where}")
        return value

    def optional_number(self, name: str) -> float | None:
        """Read a finite number; absent or null is `None`."""
        value = self.value(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value):
            self._refuse(name, value, "a finite number")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        """Read true or false; absent or null means `default`."""
        value = self.value(name)
        if value is None:
            return default
        if type(value) is not bool:
            self._refuse(name, value, "true or false")
        return value

    def string(self, name: str, default: str | None = None) -> str:
        """Read a text; absent or null means `default`."""
        value = self.value(name)
        value = default if value is None else value
        if not isinstance(value, str):
            self._refuse(name, value, "a text")
        return value

    def token_ids(self, name: str, default: int | None = None) -> int | list[int] | None:
        """Read a token id, a list of them, or null; negative ids, which name no token, are null."""
        value = self._values.get(name, default)
        self._read.add(name)
        if value is None or (type(value) is int and value < 0):
            return None
        ids = value if isinstance(value, list) else [value]
        if not ids or any(type(each) is not int or not 0 <= each <= _MAX_INTEGER for each in ids):
            self._refuse(name, value, "a token id, a list of token ids, or null")
        return value

    def expect(self, name: str, allowed: Iterable[Any], default: Any = None) -> None:
        """Refuse the variant unless a field has one of a few values.

        Args:
            name: The field.
            allowed: JSON values.
            default: What an absent field means.

        Raises:
            UnsupportedModelError: Naming the field, its value and the values allowed.
        """
        allowed = list(allowed)
        value = self._values.get(name, default)
        self._read.add(name)
        if value not in allowed:
            options = " or ".join(repr(each) for each in allowed)
            raise UnsupportedModelError(
                f"`{name}` is {value!r} in the config of {self.where}; only {options} can be "
                "converted exactly"
            )

    def layers(self, name: str, num_layers: int) -> list[int]:
        """Read a list of indices of layers; absent or null is none.

        Raises:
            ConversionError: If it is not such a list.
        """
        value = self.value(name)
        value = [] if value is None else value
        fits = isinstance(value, list) and all(
            type(layer) is int and 0 <= layer < num_layers for layer in value
        )
        if not fits:
            self._refuse(name, value, f"a list of layers from 0 to {num_layers - 1}")
        return value

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Read `sequence_mixer_blocks` or `mlp_blocks` of ours: one entry a layer."""
        self._read.update((name, "num_layers"))
        return blocks(self._values, name)

    def drop(self, names: Iterable[str]) -> None:
        """Leave fields behind that say nothing about the numbers."""
        self._read.update(names)

    def rest(self) -> dict[str, Any]:
        """Fields not read so far."""
        return {name: value for name, value in self._values.items() if name not in self._read}

    def refuse_rest(self) -> None:
        """Refuse the variant if a field that was not read is set to anything but nothing.

        Raises:
            UnsupportedModelError: Naming the field.
        """
        for name, value in self.rest().items():
            if value is not None and value is not False and value != 0 and value != []:
                raise UnsupportedModelError(
                    f"`{name}` is {value!r} in {self.where}, which the other side has no place for"
                )

    def warn_of_rest(self) -> None:
        """Say which fields were not read, because the other side ignores them too."""
        if unknown := sorted(self.rest()):
            logger.warning(
                "config fields left behind: family=%s fields=%s", self.where, ",".join(unknown)
            )

    def _refuse(self, name: str, value: object, allowed: str) -> NoReturn:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise ConversionError(f"`{name}` of {self.where} must be {allowed}, got {shown}")
