"""Saves a run and finds its way back to where it was."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lme_parallel.checkpoint.args import LoadArgs, SaveArgs
from lme_parallel.checkpoint.arrays import Point
from lme_parallel.checkpoint.crew import Crew
from lme_parallel.checkpoint.documents import Json, encode
from lme_parallel.checkpoint.errors import CheckpointError, CheckpointMismatchError
from lme_parallel.checkpoint.layout import STATE_NAME, checkpoint_directory
from lme_parallel.checkpoint.optimizer_state import merge_other_states, other_state
from lme_parallel.checkpoint.priority import go_behind_training
from lme_parallel.checkpoint.reader import Checkpoint, has_committed, valid_checkpoints
from lme_parallel.checkpoint.restorer import (
    Stateful,
    TrainState,
    load_learning_rates,
    load_stateful,
    load_tensors,
)
from lme_parallel.checkpoint.retention import prune
from lme_parallel.checkpoint.sharing import share_out
from lme_parallel.checkpoint.snapshot import HostBuffer, Snapshot, buffer_bytes, local_tensors
from lme_parallel.checkpoint.writer import write_checkpoint, write_pointer
from lme_parallel.shards import Shard
from lme_parallel.topology import Topology

logger = logging.getLogger(__name__)


def resume_point(save_args: SaveArgs, load_args: LoadArgs | None) -> Checkpoint | None:
    """Open the checkpoint that a run would start from, before anything of the run is built.

    A committed checkpoint in `save_path` wins over `load_args`, so that the same command starts a
    run and continues it.

    Args:
        save_args: The `save_args` section.
        load_args: The `load_args` section, if the run file has one.

    Returns:
        The checkpoint; `None` for a fresh start.

    Raises:
        CheckpointError: If there are checkpoints to start from, but none is valid.
    """
    found = next(valid_checkpoints(Path(save_args.save_path)), None)
    if found is not None:
        if load_args is not None:
            logger.info("`load_args` left aside: `save_path` holds step %d", found.step)
        return found
    return None if load_args is None else next(_candidates(load_args))


class Checkpointer:
    """Saves and restores parameters, buffers, an optimizer and JSON state.

    Args:
        args: The `save_args` section.
        parameters: What is trained, by fully qualified name.
        buffers: Saved with the model, by fully qualified name.
        optimizer: Of those parameters; `None` for none.
        stateful: Objects with JSON state by name; `load_stateful` says which names `load_args`
            speaks about.
        documents: JSON written beside the arrays, by file name: `config.json`,
            `run.resolved.json`.
        topology: The layout. With several processes all call each method at the same time.
        shards: Which part of each parameter is here; `None`: all of each.
        after_restore: Called when parameters were restored: `runtime.finish_step`, which renews
            copies made from them.
        point: Called before each numbered step of a write; tests stop the process there.
    """

    def __init__(
        self,
        args: SaveArgs,
        *,
        parameters: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        optimizer: Optimizer | None,
        stateful: Mapping[str, Stateful],
        documents: Mapping[str, Mapping[str, Json]],
        topology: Topology,
        shards: Mapping[str, Shard] | None = None,
        after_restore: Callable[[], None] | None = None,
        point: Point | None = None,
    ) -> None:
        self._args = args
        self._run = Path(args.save_path).absolute()
        self._parameters = parameters
        self._buffers = buffers
        self._optimizer = optimizer
        self._stateful = stateful
        self._documents = {name: encode(each, name) for name, each in documents.items()}
        self._topology = topology
        self._shards = shards
        self._crew = Crew.of(topology.world_size)
        here = {*parameters, *buffers}
        self._elsewhere = {name for each in self._crew.gather(sorted(here)) for name in each} - here
        self._after_restore = after_restore
        self._point = _ignore if point is None else point
        self._saved: set[int] = set()
        self._damaged: set[int] = set()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._buffer = self._reserve() if args.async_checkpointing else None

    @property
    def buffer_bytes(self) -> int:
        """Host memory held for asynchronous saves."""
        return 0 if self._buffer is None else self._buffer.size

    def save(self, state: TrainState) -> None:
        """Save the run as it is now; once per step, a second call for it does nothing.

        With `async_checkpointing` this returns when everything was copied to the host; a save
        under way is waited for first.

        Args:
            state: The run's counters.

        Raises:
            CheckpointError: If this save, or the one before it in the background, failed.
        """
        self.wait()
        step = state.step
        if step in self._saved:
            return
        with self._crew.together():
            if self._crew.is_first:
                self._check_free(step)
        started = time.monotonic()
        snapshot = self._snapshot(state)
        if self._buffer is None:
            self._write(snapshot, started)
            return
        copies = self._buffer.copy(snapshot.tensors)
        snapshot = replace(snapshot, tensors=copies)
        logger.info("checkpoint copied: step=%d seconds=%.3f", step, time.monotonic() - started)
        # Not a daemon: the interpreter waits for it, so that a finished run is a saved one.
        self._thread = threading.Thread(
            target=self._write_in_background, args=(snapshot, started), name=f"save step {step}"
        )
        self._thread.start()

    def check(self) -> None:
        """Raise if a save in the background failed since the last call; never waits.

        Raises:
            CheckpointError: What went wrong.
        """
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until a save in the background is committed.

        Raises:
            CheckpointError: If it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if isinstance(failure, CheckpointError):
            raise failure
        if failure is not None:
            raise CheckpointError(f"saving in the background failed: {failure!r}") from failure

    def restore(self, state: TrainState, load_args: LoadArgs | None = None) -> int | None:
        """Put the run back to its newest valid checkpoint, or start it from another run's.

        A committed checkpoint in `save_path` wins over `load_args` and is taken over whole.

        Args:
            state: Its `step` and `tokens` are set.
            load_args: The `load_args` section, if the run file has one.

        Returns:
            Step of the checkpoint; `None` for a fresh start, where nothing was changed.

        Raises:
            CheckpointMismatchError: If the checkpoint is of another model.
            CheckpointError: If there are checkpoints to start from, but none is valid.
        """
        self.wait()
        if self._has_committed():
            if load_args is not None:
                logger.info("`load_args` left aside: `save_path` holds checkpoints of this run")
            own = LoadArgs(load_path=self._args.save_path)
            step = self._restore_first(own, state, is_own=True)
            self._saved.add(step)
            return step
        return None if load_args is None else self._restore_first(load_args, state, is_own=False)

    def rewind(self, state: TrainState, keep: Collection[str]) -> int:
        """Go back to the newest valid checkpoint of this run, in the middle of it.

        A save under way is waited for first, so that it is the one to go back to.

        Args:
            state: Its `step` and `tokens` are set.
            keep: Names in `stateful` of what stays as it is.

        Returns:
            Step of the checkpoint.

        Raises:
            CheckpointError: If no checkpoint of this run is valid, or the save under way failed.
        """
        self.wait()
        own = LoadArgs(load_path=self._args.save_path)
        step = self._restore_first(own, state, is_own=True, keep=keep)
        self._saved.add(step)
        return step

    def _restore_first(
        self, settings: LoadArgs, state: TrainState, *, is_own: bool, keep: Collection[str] = ()
    ) -> int:
        failure: CheckpointError | None = None
        for checkpoint in self._agreed(_candidates(settings)):
            try:
                # All take the same one: what one cannot read, none uses.
                with self._crew.together():
                    saved = self._load(checkpoint, settings, is_own=is_own)
                with self._crew.together():
                    self._take_over(saved, settings, state, keep)
            except CheckpointMismatchError:
                raise
            except CheckpointError as error:
                logger.warning("checkpoint skipped: path=%s: %s", checkpoint.path, error)
                failure = failure or error
                if is_own:
                    self._damaged.add(checkpoint.step)
                    self._saved.discard(checkpoint.step)
                continue
            logger.info("checkpoint restored: path=%s", checkpoint.path)
            return checkpoint.step
        reason = failure or "each is damaged for some process"
        raise CheckpointError(
            f"no checkpoint in {settings.load_path} could be read: {reason}"
        ) from failure

    def _has_committed(self) -> bool:
        found = self._crew.gather(has_committed(self._run))
        if len(set(found)) > 1:
            blind = ", ".join(str(rank) for rank, each in enumerate(found) if not each)
            raise CheckpointError(
                f"rank {blind} sees no checkpoint in `save_args.save_path` {self._run}, but others"
                " do; it must be a directory that all processes share"
            )
        return found[0]

    def _agreed(self, candidates: Iterator[Checkpoint]) -> Iterator[Checkpoint]:
        """Yield what every process finds valid, newest first; an error of one is one of all."""
        found: Checkpoint | None = None
        oldest = -1
        while True:
            with self._crew.together():
                if found is None or found.step > oldest:
                    found = next(candidates, None)
            steps = self._crew.gather(None if found is None else found.step)
            if found is None or None in steps:
                return
            oldest = min(steps)
            if max(steps) == oldest:
                yield found
                found = None

    def _load(self, checkpoint: Checkpoint, settings: LoadArgs, *, is_own: bool) -> dict[str, Json]:
        """Read what are tensors or belong to them, and return the rest."""
        saved = _checked_state(checkpoint)
        optimizer = self._optimizer if settings.load_optimizer else None
        if optimizer is not None and not saved["has_optimizer"]:
            if not is_own:
                raise CheckpointMismatchError(
                    f"{checkpoint.path} has no optimizer state; set `load_args.load_optimizer:"
                    " false` and `load_args.load_lr_scheduler: false`"
                )
            logger.warning("the checkpoint has no optimizer state, which starts fresh")
            optimizer = None
        load_tensors(
            checkpoint,
            parameters=self._parameters,
            buffers=self._buffers,
            optimizer=optimizer,
            shards=self._shards,
            elsewhere=self._elsewhere,
        )
        if settings.load_lr_scheduler and self._optimizer is not None:
            load_learning_rates(checkpoint, self._parameters, self._optimizer)
        return saved

    def _take_over(
        self,
        saved: dict[str, Json],
        settings: LoadArgs,
        state: TrainState,
        keep: Collection[str],
    ) -> None:
        """Set counters and what has JSON state, once every process has read its tensors."""
        started = settings.load_starting_iteration
        state.step, state.tokens = (saved["step"], saved["tokens"]) if started else (0, 0)
        stateful = {name: each for name, each in self._stateful.items() if name not in keep}
        load_stateful(saved["stateful"], stateful, settings, state.step)
        if self._after_restore is not None:
            self._after_restore()

    def _snapshot(self, state: TrainState) -> Snapshot:
        optimizer = self._optimizer if self._args.save_optimizer else None
        local = local_tensors(self._parameters, self._buffers, optimizer, self._shards)
        tensors, layouts = share_out(local, self._crew)
        names: dict[Tensor, str] = {each: name for name, each in self._parameters.items()}
        other = None if self._optimizer is None else other_state(self._optimizer, names)
        content = {
            "step": state.step,
            "tokens": state.tokens,
            "mesh": self._topology.describe(),
            "has_optimizer": optimizer is not None,
            "optimizer": other if self._crew.size == 1 else self._merged(other),
            "stateful": {name: each.state_dict() for name, each in self._stateful.items()},
        }
        documents = {**self._documents, STATE_NAME: encode(content, STATE_NAME)}
        return Snapshot(state.step, tensors, documents, layouts)

    def _merged(self, other: Json) -> Json:
        return merge_other_states(self._crew.gather(other))

    def _write(self, snapshot: Snapshot, started: float) -> None:
        write_checkpoint(self._run, snapshot, self._point, self._crew)
        self._saved.add(snapshot.step)
        with self._crew.together():
            if self._crew.is_first:
                self._point_and_prune(snapshot.step)
        seconds = time.monotonic() - started
        logger.info("checkpoint saved: step=%d seconds=%.3f", snapshot.step, seconds)

    def _point_and_prune(self, step: int) -> None:
        try:
            write_pointer(self._run, step, self._point)
            prune(
                self._run,
                step,
                keep_last=self._args.keep_last,
                keep_every=self._args.keep_every,
                point=self._point,
            )
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} was saved, but the pointer or an old checkpoint in"
                f" {self._run} could not be changed: {error.strerror}"
            ) from error

    def _write_in_background(self, snapshot: Snapshot, started: float) -> None:
        try:
            go_behind_training()
            self._write(snapshot, started)
        except BaseException as error:  # surfaces in `wait`
            self._failure = error

    def _reserve(self) -> HostBuffer:
        """Allocate for what there is, or will be: two moments and a counter a parameter."""
        optimizer = self._optimizer if self._args.save_optimizer else None
        tensors = local_tensors(self._parameters, self._buffers, optimizer, self._shards)
        size = buffer_bytes([each.tensor for each in tensors])
        if optimizer is not None and not optimizer.state:
            moments = [each.tensor for each in tensors if each.path.startswith("model/")]
            size += 2 * buffer_bytes(moments) + 64 * len(moments)
        devices = {each.tensor.device.type for each in tensors}
        return HostBuffer(size, pinned="cuda" in devices and torch.cuda.is_available())

    def _check_free(self, step: int) -> None:
        """Refuse to replace a valid checkpoint that this object knows nothing about."""
        directory = checkpoint_directory(self._run, step)
        if step in self._damaged:
            return
        try:
            Checkpoint(directory)
        except CheckpointError:
            return
        raise CheckpointError(
            f"{directory} is a valid checkpoint that this run neither saved nor restored; choose"
            " another `save_args.save_path`, or restore before training"
        )


def _candidates(settings: LoadArgs) -> Iterator[Checkpoint]:
    run = Path(settings.load_path)
    if settings.iteration is not None:
        yield Checkpoint(checkpoint_directory(run, settings.iteration))
        return
    found = False
    for checkpoint in valid_checkpoints(run):
        found = True
        yield checkpoint
    if not found:
        raise CheckpointError(
            f"`load_path` {settings.load_path} holds no committed checkpoint; name the directory"
            " that holds `global_step*`"
        )


def _checked_state(checkpoint: Checkpoint) -> dict[str, Json]:
    content = checkpoint.document(STATE_NAME)
    expected = {
        "step": int,
        "tokens": int,
        "mesh": dict,
        "has_optimizer": bool,
        "optimizer": (dict, type(None)),
        "stateful": dict,
    }
    for name, kind in expected.items():
        if name not in content or not isinstance(content[name], kind):
            raise CheckpointError(f"{checkpoint.path / STATE_NAME} has no valid `{name}`")
    if content["step"] != checkpoint.step:
        raise CheckpointError(f"{checkpoint.path / STATE_NAME} is of step {content['step']}")
    return content


def _ignore(name: str) -> None:
    """Do nothing before a step."""
