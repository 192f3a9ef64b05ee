"""A checkpoint put back into a model, an optimizer and everything else that has state."""

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lme_parallel.checkpoint.args import LoadArgs
from lme_parallel.checkpoint.documents import Json
from lme_parallel.checkpoint.errors import CheckpointError, CheckpointMismatchError
from lme_parallel.checkpoint.layout import STATE_NAME
from lme_parallel.checkpoint.optimizer_state import (
    groups_by_parameter,
    is_other_state,
    restore_learning_rates,
    restore_state,
    split_name,
    state_device,
)
from lme_parallel.checkpoint.reader import Checkpoint
from lme_parallel.shards import Region, Shard, whole

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """Something whose state is JSON."""

    def state_dict(self) -> Mapping[str, Any]:  # JSON
        """Return the state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        ...


class TrainState(Protocol):
    """Counters of a run."""

    step: int
    tokens: int


def load_tensors(
    checkpoint: Checkpoint,
    *,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimizer: Optimizer | None,
    shards: Mapping[str, Shard] | None = None,
    elsewhere: Collection[str] = (),
) -> None:
    """Read parameters, buffers and the optimizer's state, as far as they are here.

    Nothing is changed before names and shapes were found to fit.

    Args:
        checkpoint: Valid.
        parameters: Written in place.
        buffers: Written in place.
        optimizer: Its whole state is replaced; `None` leaves it out.
        shards: Parts of the parameters; `None`: they are whole.
        elsewhere: Names that the checkpoint has for other processes only: of other stages of a
            pipeline.

    Raises:
        CheckpointMismatchError: If names or shapes differ.
        CheckpointError: If the checkpoint is damaged; the model may then be half overwritten.
    """
    targets = {**parameters, **buffers}
    _check_names(checkpoint, targets, elsewhere)
    known = {} if shards is None else shards
    parts = {name: known.get(name) or whole(each.shape) for name, each in targets.items()}
    for name, part in parts.items():
        shape = checkpoint.layout(f"model/{name}").shape
        if shape != part.shape:
            raise CheckpointMismatchError(
                f"`{name}` has shape {shape} in {checkpoint.path}, but {part.shape} here"
            )
    wanted = [each for name in targets for each in _regions("model", name, targets, parts)]
    state: dict[str, Tensor] = {}
    if optimizer is not None:
        state, places = _allocate_state(checkpoint, parameters, parts, optimizer, elsewhere)
        wanted += [each for name in state for each in _regions("optimizer", name, state, places)]
    with torch.no_grad():
        checkpoint.read(wanted)
    if optimizer is not None:
        other = _other_state(checkpoint)
        restore_state(optimizer, parameters, state, other, elsewhere=elsewhere)


def load_learning_rates(
    checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> None:
    """Set the learning rates of the optimizer's groups to those saved."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    other = _other_state(checkpoint)
    if other is not None:
        restore_learning_rates(optimizer, names, other)


def load_stateful(
    saved: Mapping[str, Json], stateful: Mapping[str, Stateful], settings: LoadArgs, step: int
) -> None:
    """Give each object the state that was saved under its name, as far as settings ask for it.

    Names (up to a first dot) that settings speak about: `schedule` (`load_lr_scheduler`,
    `resume_learning_rate`), `loader` (`load_dataloader_state`), `random` (`load_rng_state`),
    `trackers` (`load_experiments_tracker_state`), `runtime` (`load_optimizer`).

    Args:
        saved: State by name.
        stateful: Objects by name.
        settings: What to take over.
        step: The run's step from here on.
    """
    wanted = {
        "loader": settings.load_dataloader_state,
        "random": settings.load_rng_state,
        "trackers": settings.load_experiments_tracker_state,
        "runtime": settings.load_optimizer,
    }
    for name, each in stateful.items():
        if name not in saved:
            logger.warning("the checkpoint has no state for `%s`, which starts fresh", name)
        elif name == "schedule" and not settings.load_lr_scheduler:
            _restart_schedule(each, saved[name], settings, step)
        elif wanted.get(name.partition(".")[0], True):
            _load_one(name, each, saved[name])


def _load_one(name: str, stateful: Stateful, saved: Json) -> None:
    try:
        stateful.load_state_dict(saved)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointMismatchError(
            f"the state of `{name}` cannot be taken over: {error}"
        ) from error


def _restart_schedule(schedule: Stateful, saved: Json, settings: LoadArgs, step: int) -> None:
    """Place a schedule of this run's file after `step` steps, or leave it at its start."""
    if not settings.resume_learning_rate:
        return
    if not settings.load_optimizer:
        # The rates were not taken over, so this run's own ones hold; only time has passed.
        for _ in range(step):
            schedule.step()  # type: ignore[attr-defined] # every schedule has it
        return
    # Part of the schedule's own interface where it has a base rate to replace.
    continue_from = getattr(schedule, "continue_from", None)
    if continue_from is None:
        raise CheckpointError(
            f"`resume_learning_rate: true` needs a schedule that can continue from a learning"
            f" rate, and {type(schedule).__name__} cannot; set `resume_learning_rate: false`"
        )
    continue_from(saved, step)


def _other_state(checkpoint: Checkpoint) -> Json:
    """Return what `other_state` saved, `None` if the run had no optimizer."""
    other = checkpoint.document(STATE_NAME).get("optimizer")
    if other is None or is_other_state(other):
        return other
    raise CheckpointError(f"{checkpoint.path / STATE_NAME} has no valid `optimizer`")


def _check_names(
    checkpoint: Checkpoint, targets: Mapping[str, Tensor], elsewhere: Collection[str]
) -> None:
    saved, known = set(checkpoint.names("model")), {*targets, *elsewhere}
    missing, unexpected = sorted(known - saved), sorted(saved - known)
    if missing or unexpected:
        parts = [
            f"{what} {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
            for what, names in (("it lacks", missing), ("it has besides", unexpected))
            if names
        ]
        raise CheckpointMismatchError(
            f"{checkpoint.path} is of another model: {'; '.join(parts)}; set `model_args` as it was"
            " saved, or choose another directory"
        )


def _regions(
    group: str, name: str, tensors: Mapping[str, Tensor], parts: Mapping[str, Shard]
) -> Iterator[tuple[str, Region | None, Tensor]]:
    """Yield what is read into a tensor: all of it at once, or box by box."""
    part, tensor = parts[name], tensors[name].detach()
    if part.is_whole and tensor.shape == part.shape:
        yield f"{group}/{name}", None, tensor
        return
    for region, view in part.views(tensor):
        yield f"{group}/{name}", region, view


def _allocate_state(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    parts: Mapping[str, Shard],
    optimizer: Optimizer,
    elsewhere: Collection[str],
) -> tuple[dict[str, Tensor], dict[str, Shard]]:
    """Make memory for the state of the parameters that are here, and say which part it holds."""
    groups = groups_by_parameter(optimizer)
    state, places = {}, {}
    for name in checkpoint.names("optimizer"):
        parameter, key = split_name(name)
        if parameter not in parameters and parameter in elsewhere:
            continue
        if parameter not in parameters:
            raise CheckpointMismatchError(
                f"{checkpoint.path} has optimizer state for `{parameter}`, which this model does"
                " not train"
            )
        layout = checkpoint.layout(f"optimizer/{name}")
        target, part = parameters[parameter], parts[parameter]
        device = state_device(target, groups.get(target), key)
        is_cut = layout.shape == part.shape
        shape = target.shape if is_cut else layout.shape
        state[name] = torch.empty(shape, dtype=layout.dtype, device=device)
        places[name] = part if is_cut else whole(layout.shape)
    return state, places
