"""Matrix products that overlap the exchanges before and after them, where a device can."""

import logging
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed import ProcessGroup

from lme_parallel.args import DistributedArgs

logger = logging.getLogger(__name__)


def check_asynchronous(args: DistributedArgs, device: torch.device) -> None:
    """Refuse `use_async_tensor_parallel` where nothing can overlap.

    Raises:
        ValueError: If the device is no CUDA device, naming the setting.
    """
    if args.use_async_tensor_parallel and device.type != "cuda":
        raise ValueError(
            "`use_async_tensor_parallel: true` needs CUDA devices that see each other's memory,"
            f" got {device.type}; use false"
        )


def overlap_products(
    modules: Iterable[nn.Module], group: ProcessGroup, *, compile_each: bool, backend: str
) -> None:
    """Let the compiler cut products next to an exchange into pieces that run beside it.

    Source: torch's symmetric memory (Wang et al. 2024, "Introducing Async Tensor Parallelism in
    PyTorch"); the compiler recognises the exchanges that `collectives` makes.

    Args:
        modules: Those between exchanges, in place.
        group: The processes.
        compile_each: Whether they still have to be compiled.
        backend: Name of the compiler.
    """
    import torch._inductor.config as inductor  # noqa: PLC0415 (slow to load)
    from torch.distributed._symmetric_memory import (  # noqa: PLC0415 (CUDA only)
        enable_symm_mem_for_group,
    )

    # The setting is the compiler's own and has no other way in.
    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(group.group_name)
    if compile_each:
        for module in modules:
            module.compile(backend=backend)
    logger.info("products overlap exchanges: group=%s", group.group_name)
