"""Registration of kernel launches with `torch.library`, once: what compiled code calls."""

from functools import wraps

import torch

from lme_kernels.op import Function

LIBRARY = torch.library.Library("lme_kernels", "FRAGMENT")


def define(schema: str, fake: Function) -> Function:
    """Make a function that launches kernels callable from compiled code.

    Eager calls run the function itself: a custom op costs some 60 microseconds more. Traced calls
    go through `torch.ops.lme_kernels.<name>`, of which the compiler knows shapes and dtypes. The
    function must not change its arguments, nor return one or a view of one, and it gets no
    gradient: differentiate it by an `autograd.Function` that calls it.

    Args:
        schema: Name, arguments and results as `torch.library` writes them, without the namespace:
            `"rmsnorm_forward(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)"`. A result
            cannot be absent: return an empty tensor and drop it in the caller.
        fake: Takes the arguments and returns empty tensors of the results' shapes and dtypes.

    Returns:
        A decorator.
    """
    name = schema[: schema.index("(")]

    def decorate(function: Function) -> Function:
        def launch(*args: object) -> object:
            first = args[0]
            # Triton launches on the current device, whatever device its arguments are on.
            if (
                isinstance(first, torch.Tensor)
                and first.is_cuda
                and first.get_device() != torch.cuda.current_device()
            ):
                with torch.cuda.device(first.device):
                    return function(*args)
            return function(*args)

        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lme_kernels::{name}", fake, lib=LIBRARY)
        overload = getattr(torch.ops.lme_kernels, name).default

        @wraps(function)
        def call(*args: object) -> object:
            if torch.compiler.is_compiling():
                return overload(*args)
            return launch(*args)

        return call

    return decorate
