"""Options of an attention call."""

from typing import NamedTuple


class AttentionOptions(NamedTuple):
    """What is said of a call besides its tensors; documented at `attention`."""

    causal: bool = True
    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    deterministic: bool = False

    def factor(self, D: int) -> float:
        """Factor of the scores for heads of size `D`."""
        return D**-0.5 if self.scale is None else self.scale
