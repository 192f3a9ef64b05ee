import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lme_parallel.checkpoint.layout import checkpoint_steps
from lme_parallel.checkpoint.reader import newest_valid
from lme_parallel.checkpoint.retention import prune, remove, steps_to_remove
from lme_parallel.checkpoint.snapshot import Snapshot, collect_tensors
from lme_parallel.checkpoint.writer import write_checkpoint


def write(run, step):
    tensors = collect_tensors({"a": torch.nn.Parameter(torch.ones(2))}, {}, None)
    write_checkpoint(run, Snapshot(step, tensors, {}), lambda name: None)


@given(
    st.dictionaries(st.integers(0, 100), st.booleans(), max_size=20),
    st.integers(1, 5),
    st.none() | st.integers(1, 10),
)
def test_the_newest_valid_ones_and_the_multiples_stay(steps, keep_last, keep_every):
    removed = steps_to_remove(
        list(steps), steps.__getitem__, keep_last=keep_last, keep_every=keep_every
    )
    kept = set(steps) - set(removed)
    valid = sorted(step for step, is_valid in steps.items() if is_valid)
    assert set(valid[-keep_last:]) <= kept
    if keep_every is not None:
        assert {step for step in valid if step % keep_every == 0} <= kept
    elif valid:
        assert kept == set(valid[-keep_last:])
    # While nothing is valid, nothing goes.
    assert valid or not removed


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (None, None, [10, 20, 30, 40, 50]),
        (1, None, [50]),
        (2, None, [40, 50]),
        (1, 20, [20, 40, 50]),
        (9, None, [10, 20, 30, 40, 50]),
    ],
)
def test_pruning_leaves_the_chosen_ones(keep_last, keep_every, expected, fast_path):
    for step in range(10, 60, 10):
        write(fast_path, step)
    prune(fast_path, 50, keep_last=keep_last, keep_every=keep_every, point=lambda name: None)
    assert checkpoint_steps(fast_path) == expected


def test_a_torn_checkpoint_does_not_count_and_goes(fast_path):
    for step in (10, 20, 30):
        write(fast_path, step)
    (fast_path / "global_step20/COMMIT").unlink()
    prune(fast_path, 30, keep_last=2, keep_every=None, point=lambda name: None)
    assert checkpoint_steps(fast_path) == [10, 30]


def test_newer_ones_and_other_files_are_not_touched(fast_path):
    for step in (10, 20, 99):
        write(fast_path, step)
    for name in ("global_step5.old", "notes", "global_step007"):
        (fast_path / name).mkdir()
    prune(fast_path, 20, keep_last=1, keep_every=None, point=lambda name: None)
    assert checkpoint_steps(fast_path) == [20, 99]
    assert (fast_path / "notes").is_dir()
    assert (fast_path / "global_step5.old").is_dir()
    assert (fast_path / "global_step007").is_dir()


def test_commit_goes_first(fast_path):
    write(fast_path, 1)
    seen = []

    def point(name):
        seen.append(name)
        if name.startswith("remove "):
            # Whatever is left at this point is no checkpoint any more.
            assert newest_valid(fast_path) is None

    remove(fast_path / "global_step1", point)
    assert any(name.startswith("remove ") for name in seen)
    assert checkpoint_steps(fast_path) == []


def test_a_link_is_removed_and_not_followed(fast_path):
    (fast_path / "precious").mkdir()
    (fast_path / "precious/file").write_text("kept")
    (fast_path / "global_step1").symlink_to(fast_path / "precious")
    remove(fast_path / "global_step1", lambda name: None)
    assert (fast_path / "precious/file").read_text() == "kept"
    assert checkpoint_steps(fast_path) == []
