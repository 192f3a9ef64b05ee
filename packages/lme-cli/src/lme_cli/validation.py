"""From a run file's values to its frozen sections, with errors that say where and what to do."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lme_cli.problems import Path, Problem, RunFileError, dotted
from lme_cli.run_file import RunFile
from lme_cli.schema import classes_at, fields, homes

ModelType = TypeVar("ModelType", bound=BaseModel)

# Names used elsewhere in the field for settings that have another name here.
_ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "max_steps": "num_training_steps",
    "train_steps": "num_training_steps",
    "warmup_steps": "num_warmup_steps",
    "grad_clip": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "clip_grad": "gradient_clipping",
    "save_steps": "save_interval",
    "eval_steps_interval": "eval_interval",
    "output_dir": "save_path",
    "seq_length": "sequence_length",
    "seq_len": "sequence_length",
    "max_seq_len": "sequence_length",
    "n_layer": "num_layers",
    "n_layers": "num_layers",
    "num_hidden_layers": "num_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "n_positions": "max_position_embeddings",
    "rms_norm_eps": "layer_norm_epsilon",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}

_TYPES = {
    "bool": "true or false",
    "dict": "a mapping",
    "dataclass": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "mapping": "a mapping",
    "model": "a mapping",
    "string": "a string",
    "tuple": "a list",
}


def validate(
    kind: type[ModelType], run_file: RunFile, *, described_by: type[BaseModel] | None = None
) -> ModelType:
    """Build the sections of a run file.

    Args:
        kind: The class of the whole file, `RunConfig` or `UnshardConfig`.
        run_file: What was read.
        described_by: The class whose settings are proposed in errors; `kind` if `None`.

    Raises:
        RunFileError: With one problem per wrong setting, each with its place in the file.
    """
    try:
        return kind.model_validate(run_file.values)
    except ValidationError as error:
        raise RunFileError(explain(error, described_by or kind, run_file)) from None


def explain(error: ValidationError, kind: type[BaseModel], run_file: RunFile) -> list[Problem]:
    """Turn pydantic's errors into problems of the run file, one per setting, in file order."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    for each in error.errors(include_url=False):
        by_path.setdefault(_locate(each, run_file.values), []).append(each)
    problems = [_problem(path, each, kind, run_file) for path, each in by_path.items()]
    # A misspelt setting is not also missing.
    meant = {(*each.path[:-1], each.suggestion) for each in problems if each.suggestion}
    return sorted((each for each in problems if each.path not in meant), key=_order)


def suggest(name: str, candidates: Iterable[str]) -> str | None:
    """Give the candidate that `name` was probably meant to be, or `None`."""
    known = {_plain(each): each for each in candidates}
    close = difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.6)
    return known[close[0]] if close else None


def _order(problem: Problem) -> tuple[int, int]:
    place = problem.place
    return (place.line, place.column) if place else (0, 0)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")


def _locate(error: ErrorDetails, values: object) -> Path:
    """Drop from pydantic's location what is not in the file: tags of unions, names of types."""
    path: Path = ()
    here: Any = values
    for index, part in enumerate(error["loc"]):
        if _has(here, part):
            here = here[part]
        elif not (error["type"] == "missing" and index + 1 == len(error["loc"])):
            continue
        path = (*path, part)
    return path


def _has(value: object, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _problem(
    path: Path, errors: Sequence[ErrorDetails], kind: type[BaseModel], run_file: RunFile
) -> Problem:
    error = errors[0]
    place = run_file.place(path)
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return _unknown(path, kind, run_file)
        case "missing" | "missing_keyword_only_argument" | "missing_argument":
            return Problem("is required and missing", path, run_file.place(path[:-1]))
        case "union_tag_not_found" | "union_tag_invalid":
            return _wrong_tag(path, error, kind, run_file)
        case "literal_error" | "enum":
            return _wrong_choice(path, errors, run_file)
        case "value_error" | "assertion_error":
            message = str(error["msg"]).removeprefix("Value error, ")
            return _from_section(path, message, run_file)
    wanted = list(dict.fromkeys(_wanted(each) for each in errors))
    return Problem(f"is {_show(error['input'])}, must be {' or '.join(wanted)}", path, place)


def _unknown(path: Path, kind: type[BaseModel], run_file: RunFile) -> Problem:
    name = str(path[-1])
    classes = classes_at(kind, path[:-1], run_file.values)
    known = list(dict.fromkeys(key for each in classes for key in fields(each)))
    message = "is not a setting" if path[:-1] else "is not a section"
    place = run_file.place(path)
    if (other := _ELSEWHERE.get(_plain(name))) in known:
        return Problem(message, path, place, f"the setting is called `{other}`", other)
    everywhere = homes(kind)
    meant = everywhere.get(name) or everywhere.get(_ELSEWHERE.get(name, ""))
    if meant:
        home = _nearest(meant, path[:-1])
        full = dotted((*home, name if name in everywhere else _ELSEWHERE[name]))
        return Problem(message, path, place, f"it belongs at `{full}`", full)
    if (close := suggest(name, known)) is not None:
        return Problem(message, path, place, f"did you mean `{close}`?", close)
    if (far := suggest(name, everywhere)) is not None:
        full = dotted((*_nearest(everywhere[far], path[:-1]), far))
        return Problem(message, path, place, f"did you mean `{full}`?", full)
    listed = ", ".join(f"`{each}`" for each in sorted(known))
    return Problem(message, path, place, f"known here: {listed}" if listed else None)


def _nearest(candidates: Sequence[Path], path: Path) -> Path:
    """Give the home that shares most with where the setting was written, list positions kept."""

    def shared(home: Path) -> int:
        pairs = zip(home, path, strict=False)
        return sum(1 for a, b in pairs if a == b or (isinstance(a, int) and isinstance(b, int)))

    best = max(candidates, key=lambda home: (shared(home), -len(home)))
    return tuple(
        path[index] if index < len(path) and isinstance(part, int) else part
        for index, part in enumerate(best)
    )


def _wrong_tag(
    path: Path, error: ErrorDetails, kind: type[BaseModel], run_file: RunFile
) -> Problem:
    context = error.get("ctx", {})
    value = error["input"]
    if not isinstance(value, dict):
        return Problem(f"is {_show(value)}, must be a mapping", path, run_file.place(path))
    classes = classes_at(kind, path, {})
    if error["type"] == "union_tag_not_found":
        name = str(context.get("discriminator", "")).strip("'()")
        return Problem("is required and missing", (*path, name), run_file.place(path))
    tag = str(context.get("tag"))
    name = next((key for key, each in value.items() if str(each) == tag), None)
    expected = [each.strip(" '") for each in str(context.get("expected_tags", "")).split(",")]
    full = (*path, name) if name is not None else path
    close = suggest(tag, expected)
    remedy = f"did you mean `{close}`?" if close else None
    choices = ", ".join(f"`{each}`" for each in expected) or f"one of {len(classes)} kinds"
    message = f"is `{tag}`, must be one of {choices}"
    return Problem(message, full, run_file.place(full), remedy, close)


def _wrong_choice(path: Path, errors: Sequence[ErrorDetails], run_file: RunFile) -> Problem:
    value = errors[0]["input"]
    expected = " or ".join(_wanted(each) for each in errors)
    choices = [each.strip(" '") for each in expected.replace(" or ", ", ").split(",")]
    close = suggest(value, choices) if isinstance(value, str) else None
    remedy = f"did you mean `{close}`?" if close else None
    message = f"is {_show(value)}, must be {expected}"
    return Problem(message, path, run_file.place(path), remedy, close)


def _from_section(path: Path, message: str, run_file: RunFile) -> Problem:
    """Place what a section says about itself at the setting it names first, if that is given."""
    for name in message.split("`")[1::2]:
        key = name.split(":")[0].split(".")[-1]
        if (*path, key) in run_file.places:
            return Problem(f"is wrong: {message}", path, run_file.place((*path, key)))
    return Problem(f"is wrong: {message}", path, run_file.place(path))


def _wanted(error: ErrorDetails) -> str:
    """Say in words what a setting must be."""
    kind = error["type"]
    context = error.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return str(context.get("expected", "another value"))
    if kind == "none_required":
        return "null"
    if kind in ("int_from_float", "int_parsing", "int_type"):
        return _TYPES["int"]
    if kind == "finite_number":
        return "a finite number"
    bounds = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<",
              "less_than_equal": "<="}  # fmt: skip
    if kind in bounds:
        limit = next(iter(context.values()), "")
        return f"{bounds[kind]} {limit}"
    prefix = kind.split("_")[0]
    if prefix in _TYPES and kind.endswith(("_type", "_parsing", "_exact_type")):
        return _TYPES[prefix]
    text = str(error["msg"]).removeprefix("Input should be ")
    return text[:1].lower() + text[1:]


def _show(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"`{value}`" if not isinstance(value, str) else f'"{value}"'
