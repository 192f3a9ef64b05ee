"""Every section and every setting of the run file is documented, and kinds have their tests."""

import dataclasses
import inspect
import types
import typing
from pathlib import Path

import pytest

from lme_cli.config import RunConfig
from lme_core.mixers import MixerConfig
from lme_core.mlps import MLPConfig
from lme_data.dataset import DatasetArgs

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {
    "random_args", "tokenizer_args", "model_args", "tuning_args", "optimizer_args",
    "lr_scheduler_args", "datasets", "save_args", "load_args", "training_parameters",
    "logging_args", "mixed_precision_args", "distributed_args", "kernel_args", "teacher_args",
}  # fmt: skip


def dataclasses_in(annotation, found):
    """Every dataclass reachable from a type annotation."""
    is_class = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    if is_class and annotation not in found:
        found[annotation] = None
        hints = typing.get_type_hints(annotation, include_extras=True)
        for field in dataclasses.fields(annotation):
            dataclasses_in(hints[field.name], found)
    for part in typing.get_args(annotation):
        if not isinstance(part, str | int | float | bool | types.NoneType):
            dataclasses_in(part, found)
    return found


CLASSES = list(
    dataclasses_in(tuple[*(field.annotation for field in RunConfig.model_fields.values())], {})
)


def test_the_run_file_has_the_fifteen_sections():
    assert set(RunConfig.model_fields) == SECTIONS


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_has_a_docstring(cls):
    assert inspect.getdoc(cls)
    documented = _attribute_docstrings(cls)
    for base in cls.__mro__[1:]:
        if dataclasses.is_dataclass(base):
            documented |= _attribute_docstrings(base)
    missing = [each.name for each in dataclasses.fields(cls) if each.name not in documented]
    assert missing == []


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_section_is_frozen(cls):
    assert cls.__dataclass_params__.frozen


def _attribute_docstrings(cls):
    import ast
    import textwrap

    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    pairs = zip(tree.body, tree.body[1:], strict=False)
    return {
        before.target.id
        for before, after in pairs
        if isinstance(before, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


@pytest.mark.parametrize("union", [MixerConfig, MLPConfig, DatasetArgs], ids=str)
def test_every_kind_is_named_by_a_test_of_its_package(union):
    for cls in dataclasses_in(union, {}):
        tags = [
            tag
            for hint in typing.get_type_hints(cls).values()
            if typing.get_origin(hint) is typing.Literal
            for tag in typing.get_args(hint)
        ]
        package = cls.__module__.split(".")[0].replace("_", "-")
        tests = (ROOT / "packages" / package / "tests").rglob("test_*.py")
        text = "\n".join(path.read_text() for path in tests)
        assert cls.__name__ in text or any(f'"{tag}"' in text for tag in tags), cls
