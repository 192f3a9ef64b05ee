"""Triton kernels run under Triton's interpreter where there is no GPU.

The variable is read when `@triton.jit` runs, so it is set before any test module is imported.
"""

import os
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def gpu_memory_is_given_back():
    """Several processes share a GPU: what one kept for its next allocation, another lacks."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True, scope="session")
def _interpreted_faster():
    """Let Triton's interpreter prepare its language once a launch and module.

    It does so anew for each call of a function by a kernel, a third of the time of our kernels, to
    find that all is prepared.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    modules_of, prepared = {}, set()

    def prepare_once(function):
        if function not in modules_of:
            values = list(function.__globals__.values())
            languages = (interpreter.tl, interpreter.tl.core)
            modules_of[function] = tuple(any(v is each for v in values) for each in languages)
        if modules_of[function] in prepared:
            return interpreter._LangPatchScope()
        prepared.add(modules_of[function])
        return prepare(function)

    def launch_prepared(self, *args, **kwargs):
        # What a launch prepares, it restores when it ends.
        prepared.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            prepared.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch_prepared)
        yield
