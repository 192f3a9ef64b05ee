"""Recurrences as modules: a projection of the input, then heads that each have their own matrix."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lme_kernels.op import Backend
from lme_kernels.ops.gru import gru
from lme_kernels.ops.lstm import lstm
from lme_kernels.ops.rnn import rnn


class _Recurrence(nn.Module):
    """Parameters: `input_projection`, rows of all gates; and one stack of matrices a gate."""

    gates: tuple[str, ...] = ()

    def __init__(
        self,
        input_size: int,
        num_heads: int,
        head_dim: int,
        *,
        bias: bool = True,
        gradient_clipping: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend | str | None = None,
    ) -> None:
        """Make the module.

        Args:
            input_size: Channels of the input.
            num_heads: Number of heads.
            head_dim: Channels of a head's state.
            bias: Whether the projection of the input has a bias.
            gradient_clipping: Bound on the gradient of each state; `None` for none.
            device: Where parameters are made.
            dtype: Their dtype.
            backend: Implementation to run; `None` takes the fastest one proven.
        """
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.gradient_clipping = gradient_clipping
        self.backend = backend
        rows = len(self.gates) * num_heads * head_dim
        self.input_projection = nn.Linear(input_size, rows, bias=bias, device=device, dtype=dtype)
        for gate in self.gates:
            matrices = torch.empty(num_heads, head_dim, head_dim, device=device, dtype=dtype)
            self.register_parameter(f"{gate}_weight", Parameter(matrices))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices: normal, of standard deviation head_dim^-0.5, so that states last."""
        self.input_projection.reset_parameters()
        for gate in self.gates:
            nn.init.normal_(self.get_parameter(f"{gate}_weight"), std=self.head_dim**-0.5)

    def _inputs(self, x: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Input and matrices of each gate."""
        projected = self.input_projection(x)
        heads = projected.unflatten(-1, (len(self.gates), self.num_heads, self.head_dim))
        return {
            gate: (each, self.get_parameter(f"{gate}_weight"))
            for gate, each in zip(self.gates, heads.unbind(-3), strict=True)
        }


class RNN(_Recurrence):
    """`rnn`: a state that is multiplied by a matrix and passed through tanh."""

    gates = ("state",)

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run over each sequence.

        Args:
            x: Inputs, shape (B, S, input_size), or (T, input_size) with `cu_seqlens`.
            initial_state: Shape (sequences, num_heads, head_dim); `None` for zeros.
            cu_seqlens: Starts of packed sequences and T at the end; `None` if not packed.
            max_seqlen: At least the longest packed sequence, in tokens.

        Returns:
            All states, shape (..., num_heads * head_dim), and the last of each sequence.
        """
        y, state = rnn(
            *self._inputs(x)["state"],
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            gradient_clipping=self.gradient_clipping,
            backend=self.backend,
        )
        return y.flatten(-2), state


class GRU(_Recurrence):
    """`gru`: a gated recurrent unit."""

    gates = ("state", "forget", "reset")

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run over each sequence; arguments and results as in `RNN`."""
        inputs = self._inputs(x)
        y, state = gru(
            *inputs["state"],
            *inputs["forget"],
            *inputs["reset"],
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            gradient_clipping=self.gradient_clipping,
            backend=self.backend,
        )
        return y.flatten(-2), state


class LSTM(_Recurrence):
    """`lstm`: a long short-term memory."""

    gates = ("state", "forget", "input", "output")

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        initial_cell: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run over each sequence.

        Args:
            x: Inputs, shape (B, S, input_size), or (T, input_size) with `cu_seqlens`.
            initial_state: Shape (sequences, num_heads, head_dim); `None` for zeros.
            initial_cell: The same of the cell.
            cu_seqlens: Starts of packed sequences and T at the end; `None` if not packed.
            max_seqlen: At least the longest packed sequence, in tokens.

        Returns:
            All states, shape (..., num_heads * head_dim), and the last state and cell of each
            sequence.
        """
        inputs = self._inputs(x)
        y, state, cell = lstm(
            *inputs["state"],
            *inputs["forget"],
            *inputs["input"],
            *inputs["output"],
            initial_state=initial_state,
            initial_cell=initial_cell,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            gradient_clipping=self.gradient_clipping,
            backend=self.backend,
        )
        return y.flatten(-2), state, cell
