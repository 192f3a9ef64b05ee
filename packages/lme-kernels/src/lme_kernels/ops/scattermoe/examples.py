"""Example calls of `scattermoe`."""

from collections.abc import Callable

import torch
from torch import Tensor

from lme_kernels.examples import Example


def examples(normal: Callable[..., Tensor]) -> list[Example]:
    """Make the calls; `normal(*shape)` draws standard normal numbers."""

    def call(T: int, k: int, E: int, H: int, U: int, width: int) -> tuple[Tensor, ...]:
        # The last expert has no token, unless it is the only one.
        indices = normal(T, max(E - 1, 1)).argsort(dim=-1)[:, :k]
        up, down = normal(E, U, H) / H**0.5, normal(E, H, width) / width**0.5
        return normal(T, H), normal(T, k), indices, up, down

    x, weights, indices, up, down = call(9, 2, 4, 24, 40, 20)
    apart = (normal(9, 48)[:, ::2], weights, indices.int(), up, down)
    biases = {"up_bias": normal(4, 40), "down_bias": normal(4, 24)}
    return [
        Example("gates and an expert without tokens", (x, weights, indices, up, down)),
        Example("past a tile", call(7, 3, 5, 72, 80, 40)),
        Example("halves", (x, weights, indices, up, down), {"layout": "concatenated"}),
        Example("biases", (x, weights, indices, up, down), biases),
        Example("not gated", call(9, 2, 3, 16, 16, 16), {"activation": "gelu_pytorch_tanh"}),
        Example("squares", call(9, 1, 3, 16, 16, 16), {"activation": "relu_squared"}),
        Example("erf gates", call(9, 2, 3, 16, 32, 16), {"activation": "geglu"}),
        Example("sigmoid gates", call(9, 2, 3, 16, 32, 16), {"activation": "glu"}),
        Example("rectified gates", call(9, 2, 3, 16, 32, 16), {"activation": "reglu"}),
        Example("rows apart", apart),
        Example("one expert", call(5, 1, 1, 16, 32, 16)),
        Example("empty", (normal(0, 24), normal(0, 2), torch.zeros(0, 2).long(), up, down)),
    ]
