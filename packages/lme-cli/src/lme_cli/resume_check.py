"""Whether a run that is stopped and resumed is the run that was never stopped, bit for bit."""

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lme_cli.compose import Composed, compose
from lme_cli.errors import CommandError
from lme_cli.loading import Loaded, check_run, load_run
from lme_cli.planning import make_plan
from lme_cli.quickstart import load_default, prepare
from lme_core.training.trainer import StepReport, TrainState
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.checkpoint.unshard import open_checkpoint

# Of a step's record: what two equal runs need not share.
_OF_THE_CLOCK = ("tokens_per_second", "tflops_per_device", "mfu", "peak_memory_bytes", "cost_usd")
# Of `state.json`: where and how long, not what.
_OF_THE_PLACE = ("mesh", "throughput", "trackers")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was compared."""

    name: str
    """Such as `parameters`."""
    count: int
    """How many values of it there are."""
    difference: str | None
    """The first that differs, and how; `None`: all are the same bits."""


def verify_resume(
    loaded: Loaded,
    *,
    steps: int,
    cuts: Sequence[int],
    break_it: Callable[[Composed], None] | None = None,
) -> list[Finding]:
    """Train once straight and once with cuts, from nothing, and compare the ends.

    Nothing is written to the run's own directory. Each part of the cut run is built anew and
    restored from the checkpoint of the part before, as the command line does it.

    Args:
        loaded: A checked run.
        steps: Optimizer steps to train.
        cuts: After which steps the second run is stopped, ascending.
        break_it: Called with each resumed part before it trains; for tests.

    Returns:
        What was compared, in this order: losses, data position, random states, other state,
        parameters, optimizer state. The first with a difference is the first thing that went wrong.

    Raises:
        CommandError: If the cuts do not lie within the steps.
    """
    cuts = sorted(set(cuts))
    if not cuts or cuts[0] < 1 or cuts[-1] >= steps:
        raise CommandError(
            f"`--cut` must name steps from 1 to {steps - 1} (`--steps` is {steps}), got"
            f" {', '.join(map(str, cuts)) or 'none'}"
        )
    with tempfile.TemporaryDirectory(prefix="lme-verify-resume-") as folder:
        straight, cut = Path(folder) / "straight", Path(folder) / "cut"
        _train(_short(loaded, straight, steps), until=steps, break_it=None)
        for number, end in enumerate([*cuts, steps]):
            part = _short(loaded, cut, steps)
            _train(part, until=end, break_it=break_it if number else None)
        return _compare(straight, cut)


def _short(loaded: Loaded, save_path: Path, steps: int) -> Loaded:
    """The same run, of so many steps, elsewhere; it evaluates and logs to files only."""
    run = loaded.run
    changed = run.model_copy(
        update={
            "save_args": dataclasses.replace(
                run.save_args,
                save_path=str(save_path),
                save_interval=steps,
                keep_last=None,
                keep_every=None,
            ),
            "load_args": None,
            "training_parameters": dataclasses.replace(
                run.training_parameters, num_training_steps=steps, stop_after_seconds=None
            ),
            "logging_args": dataclasses.replace(
                run.logging_args, log_interval=1, torch_profiler_trace_path=None
            ),
        }
    )
    return dataclasses.replace(loaded, run=changed)


def load_for_check(path: Path | None, settings: Sequence[str]) -> Loaded:
    """Read and check a run file; make the data of the embedded default.

    Args:
        path: The run file; `None` for the embedded default.
        settings: Each of the form `section.key=value`.
    """
    if path is not None:
        return load_run(path, settings)
    loaded = check_run(load_default(settings))
    config = loaded.run.model_args.pretrained_config
    if config is not None:
        data = Path(loaded.run.save_args.save_path) / "data"
        prepare(data, vocab_size=config.vocab_size, say=print)
    return loaded


class _StopAt:
    """Ends a part of the run after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def __call__(self, state: TrainState, report: StepReport) -> None:
        if state.step == self._step and not report.is_last:
            state.stop_reason = "it is cut here"


def _train(loaded: Loaded, *, until: int, break_it: Callable[[Composed], None] | None) -> None:
    plan = make_plan(loaded.run)
    if plan.launch.world_size > 1:
        raise CommandError("`lme verify-resume` runs in one process; start it without a launcher")
    composed = compose(plan, loaded.run_file, first_hooks=[_StopAt(until)])
    if break_it is not None:
        break_it(composed)
    try:
        composed.trainer.fit(composed.state)
    finally:
        composed.trackers.finish()


def _compare(straight: Path, cut: Path) -> list[Finding]:
    first, second = open_checkpoint(straight), open_checkpoint(cut)
    states = [each.document("state.json") for each in (first, second)]
    loader, random, rest = ([_parts(each)[part] for each in states] for part in range(3))
    return [
        _compare_json("losses and rates", _records(straight), _records(cut)),
        _compare_json("data position", *loader),
        _compare_json("random states", *random),
        _compare_json("schedule and counters", *rest),
        _compare_arrays("parameters", first, second, "model"),
        _compare_arrays("optimizer state", first, second, "optimizer"),
    ]


def _parts(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Split the saved state into what places the data, what places random numbers, and the rest."""
    flat = dict(_leaves(state))
    flat = {name: each for name, each in flat.items() if not any(p in name for p in _OF_THE_PLACE)}
    loader = {name: each for name, each in flat.items() if "loader" in name}
    random = {name: each for name, each in flat.items() if "random" in name or "seed" in name}
    taken = {**loader, **random}
    return loader, random, {name: each for name, each in flat.items() if name not in taken}


def _records(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        where = f"step {record['step']} {record['context']} {record['group'] or ''}".strip()
        for name, value in record.items():
            if not name.endswith("_seconds") and name not in _OF_THE_CLOCK:
                found[f"{where} {name}"] = value
    return found


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _leaves(each, f"{name}[{number}]")
    else:
        yield name, value


def _compare_json(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Finding:
    for key in [*first, *(key for key in second if key not in first)]:
        one, other = first.get(key, "absent"), second.get(key, "absent")
        # Of equal numbers the text is equal too, and -0.0 is told from 0.0.
        if json.dumps(one) != json.dumps(other):
            return Finding(name, len(first), f"{key}: straight {one}, resumed {other}")
    return Finding(name, len(first), None)


def _compare_arrays(name: str, first: Checkpoint, second: Checkpoint, group: str) -> Finding:
    names = first.names(group)
    if names != second.names(group):
        odd = sorted(set(names) ^ set(second.names(group)))[0]
        return Finding(name, len(names), f"{odd}: in one of the two only")
    for each in names:
        one, other = (_read(checkpoint, f"{group}/{each}") for checkpoint in (first, second))
        if one.dtype != other.dtype or one.shape != other.shape:
            return Finding(name, len(names), f"{each}: another dtype or shape")
        if not torch.equal(_bits(one), _bits(other)):
            differing = int((_bits(one) != _bits(other)).sum())
            largest = float((one.double() - other.double()).abs().max())
            return Finding(
                name,
                len(names),
                f"{each}: {differing:,} bytes differ, values by up to {largest:.3g}",
            )
    return Finding(name, len(names), None)


def _read(checkpoint: Checkpoint, path: str) -> torch.Tensor:
    layout = checkpoint.layout(path)
    target = torch.empty(layout.shape, dtype=layout.dtype)
    checkpoint.read([(path, None, target)])
    return target


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
