"""Attention over sequences that are cut over processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lme_parallel.context.blocks import Rules
from lme_parallel.context.collectives import gather
from lme_parallel.context.layout import Layout
from lme_parallel.context.passes import Call, attend_in_blocks
from lme_parallel.context.ring import Ring
from lme_parallel.tensor.collectives import Group


@dataclass(frozen=True, slots=True)
class ContextAttention:
    """Takes the place of the attention op of a mixer whose sequences are cut."""

    attend: Callable[..., Tensor]
    """The op, over tokens that are here."""
    layout: Layout
    group: Group
    ring: Ring | None
    """Where keys and values go around; `None` where they are collected."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend to all tokens of the sequences, as the op does where they are whole.

        Args:
            query: Of the tokens here, shape (B, C, N, D).
            key: Shape (B, C, K, D).
            value: Shape (B, C, K, D').
            causal: Has to be true.
            scale: Factor of the products; `None` for 1 / sqrt(D).
            window: Tokens that a token sees, itself among them; `None` for all before it.
            softcap: Bound on the scaled products' magnitude; `None` for none.
            cu_seqlens: Bounds of documents in the B * W * C tokens of the whole rows.
            mask: Has to be absent.
            sinks: A score for each head that has no value, shape (N,).

        Returns:
            Shape (B, C, N, D').

        Raises:
            ValueError: If attention is not causal, or has a mask, or keys are not those of the
                queries' tokens.
        """
        if not causal or mask is not None or key.shape[1] != query.shape[1]:
            raise ValueError(
                "`context_parallel_world_size` above 1 needs causal attention of a sequence to"
                " itself without an additive `mask`; use `context_parallel_world_size: 1`"
            )
        rules = Rules(
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=window,
            softcap=softcap,
        )
        if self.ring is None and cu_seqlens is None:
            return self._collected(query, key, value, rules, sinks)
        call = Call(self.layout, self.group, self.ring, rules)
        return attend_in_blocks(query, key, value, sinks, cu_seqlens, call)

    def _collected(
        self, query: Tensor, key: Tensor, value: Tensor, rules: Rules, sinks: Tensor | None
    ) -> Tensor:
        """Collect keys and values, and attend to those up to each piece of queries."""
        size = key.shape[-1]
        packed = torch.cat((key, value), dim=-1)
        packed = self.layout.join(gather(packed, self.group).unbind())
        outputs = []
        for piece, part in zip(
            self.layout.pieces(), query.chunk(self.layout.pieces_each, dim=1), strict=True
        ):
            length = part.shape[1]
            start, stop = piece * length, (piece + 1) * length
            first = 0 if rules.window is None else max(0, start - rules.window + 1)
            key, value = packed[:, first:stop].split([size, packed.shape[-1] - size], dim=-1)
            outputs.append(
                self.attend(
                    part,
                    key,
                    value,
                    causal=True,
                    scale=rules.scale,
                    window=rules.window,
                    softcap=rules.softcap,
                    cu_seqlens=None,
                    mask=None,
                    sinks=sinks,
                )
            )
        return torch.cat(outputs, dim=1)
