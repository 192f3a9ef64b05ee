"""Whether a checkpoint that is there may be continued by the run that wants to."""

from collections.abc import Mapping
from typing import Any

from lme_cli.errors import CommandError
from lme_parallel.checkpoint.compare import differences
from lme_parallel.checkpoint.reader import Checkpoint

# Inside one dataset's `class_args`: what changes speed or evaluation, never the training order.
# Files and weights are the loader's to compare, which knows what its order depends on.
_FREE_IN_DATASETS = (
    "eval_steps",
    "num_workers",
    "data_cache_path",
    "node_uses_local_storage",
    "data_path",
    "train_data_path",
    "val_data_path",
    "test_data_path",
    "val_weighted_split_paths",
)
_COMPARED_OF_MODEL = ("reset_attention_mask", "reset_position_ids")


def check_continues(
    checkpoint: Checkpoint, resolved: Mapping[str, Any], architecture: Mapping[str, Any]
) -> None:
    """Refuse to continue a checkpoint with another architecture, data order or seed.

    Args:
        checkpoint: The one in `save_path`.
        resolved: Every setting of the present run, as in `run.resolved.json`.
        architecture: Of the present run, as in `config.json`.

    Raises:
        CommandError: With every difference and the two remedies.
    """
    saved = checkpoint.document("run.resolved.json")
    found = differences(checkpoint.document("config.json"), architecture)
    found += differences(_order(saved), _order(resolved), ignore=_ignored(resolved, saved))
    if found:
        listed = "\n".join(f"  {each}" for each in found)
        raise CommandError(
            f"`save_args.save_path` holds step {checkpoint.step} of another run, so this one "
            f"cannot continue it:\n{listed}\n"
            "Either set these as they were saved and the run continues, or choose another "
            "`save_args.save_path` and a new run starts (from this checkpoint's weights, if "
            "`load_args.load_path` names it)."
        )


def _order(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings that decide which tokens come when."""
    model = resolved.get("model_args") or {}
    return {
        "random_args": resolved.get("random_args"),
        "model_args": {name: model.get(name) for name in _COMPARED_OF_MODEL},
        "tokenizer_args": {
            "additional_special_tokens": (resolved.get("tokenizer_args") or {}).get(
                "additional_special_tokens"
            )
        },
        "datasets": resolved.get("datasets"),
    }


def _ignored(*runs: Mapping[str, Any]) -> set[str]:
    count = max(len(run.get("datasets") or []) for run in runs)
    inner = [f"class_args.{name}" for name in _FREE_IN_DATASETS]
    if all(_is_stable(run) for run in runs):
        inner.append("data_sampling_ratio")
    return {f"datasets[{index}].{name}" for index in range(count) for name in inner}


def _is_stable(run: Mapping[str, Any]) -> bool:
    datasets = run.get("datasets") or []
    return all((each.get("class_args") or {}).get("order") == "stable" for each in datasets)
