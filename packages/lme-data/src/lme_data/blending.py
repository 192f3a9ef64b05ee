"""Which corpus each sample of a mixture comes from: always the one furthest behind its share."""

from collections.abc import Sequence

import numpy as np

# Steps of one lane at most, and samples below which lanes do not pay.
_LANE_STEPS = 512
_SMALL = 4096
_ROUNDS = 6
# Corpora beyond which one call over a table beats one call a corpus.
_MANY_CORPORA = 24


def greedy_choices(
    weights: Sequence[float],
    size: int,
    *,
    start: int = 0,
    counts: Sequence[int] | np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose a corpus for each of `size` samples.

    Sample n goes to the corpus with the largest `weight * max(n, 1) - count`, the first on ties,
    all in float64. The choices are made in many lanes at once: each lane begins a stretch from a
    guess of the counts there and runs a little ahead of it, by when it has fallen into step with
    the true sequence. Where the counts at the end of a stretch are not those at which the next
    began, the next is run again from them. By induction the result is the sequence that one loop
    over n would give.

    Args:
        weights: Shares, summing to 1.
        size: Samples to choose for.
        start: Number of the first sample.
        counts: Samples already taken of each corpus; they sum to `start`. `None` is none.

    Returns:
        Corpus of each sample, int16, shape (size,), and the counts after the last, int64.

    Source: the greedy rule of Megatron-LM's blended dataset.
    """
    shares = np.asarray(weights, np.float64)
    begin = np.zeros(len(shares)) if counts is None else np.asarray(counts, np.float64)
    if len(shares) == 1:
        return np.zeros(size, np.int16), begin.astype(np.int64) + size
    if size < _SMALL:
        choices, end = _loop(shares, start, begin, size)
        return choices, end.astype(np.int64)
    warm_up = 64 + 4 * len(shares)
    steps = max(_LANE_STEPS, 4 * warm_up)
    lanes = -(-size // steps)
    firsts = start + steps * np.arange(lanes, dtype=np.int64)
    begins = _guess(shares, np.maximum(firsts - warm_up, 0).astype(np.float64))
    _run(shares, np.maximum(firsts - warm_up, 0), begins, np.minimum(firsts, warm_up))
    begins[:, 0] = begin
    ends = begins.copy()
    choices = np.empty((lanes, steps), np.int16)
    _run_into(shares, firsts, ends, choices)
    _repair(shares, firsts, begins, ends, choices)
    flat = choices.reshape(-1)[:size]
    total = begin.astype(np.int64) + np.bincount(flat, minlength=len(shares))
    return np.ascontiguousarray(flat), total


def places_within(choices: np.ndarray, num_corpora: int) -> np.ndarray:
    """Number each sample among those of its corpus.

    Args:
        choices: Corpus of each sample, shape (samples,).
        num_corpora: Corpora there are.

    Returns:
        How many earlier samples chose the same corpus, int64, shape (samples,).
    """
    places = np.empty(len(choices), np.int64)
    for corpus in range(num_corpora):
        chosen = np.flatnonzero(choices == corpus)
        places[chosen] = np.arange(len(chosen))
    return places


def _guess(shares: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Counts near the true ones after `numbers` samples, shape (corpora, lanes).

    A corpus whose count is too low is chosen soon, one whose count is too high is not for a long
    time; so small shares are guessed low and large ones take the difference.
    """
    exact = shares[:, None] * numbers
    guess = np.floor(exact)
    is_small = shares < 0.5 * shares.mean()
    guess[is_small] = np.maximum(guess[is_small] - 1, 0)
    large = np.flatnonzero(~is_small)
    missing = numbers - guess.sum(axis=0)
    # Whole rounds over the large ones first, then those with the largest remainder.
    rounds, rest = np.divmod(missing, len(large))
    guess[large] += rounds
    order = np.argsort(guess[large] - exact[large], axis=0, kind="stable")
    ranks = np.argsort(order, axis=0, kind="stable")
    guess[large] += ranks < rest
    return np.maximum(guess, 0)


def _step(
    shares: np.ndarray, numbers: np.ndarray, counts: np.ndarray, scratch: list[np.ndarray]
) -> np.ndarray:
    """Choose once in every lane; `counts` (corpora, lanes) is updated."""
    scaled = np.maximum(numbers, 1.0)
    if len(shares) > _MANY_CORPORA:
        errors = shares[:, None] * scaled
        errors -= counts
        choice = errors.argmax(axis=0).astype(np.int16)
        counts[choice, np.arange(len(choice))] += 1
        return choice
    best, error, choice = scratch
    np.multiply(scaled, shares[0], out=best)
    best -= counts[0]
    choice[:] = 0
    for corpus in range(1, len(shares)):
        np.multiply(scaled, shares[corpus], out=error)
        error -= counts[corpus]
        choice[error > best] = corpus
        np.maximum(best, error, out=best)
    counts[choice, np.arange(len(choice))] += 1
    return choice


def _scratch(lanes: int) -> list[np.ndarray]:
    return [np.empty(lanes), np.empty(lanes), np.empty(lanes, np.int16)]


def _run(shares: np.ndarray, firsts: np.ndarray, counts: np.ndarray, steps: np.ndarray) -> None:
    """Advance each lane by its own number of steps; lanes with fewer steps start later."""
    longest = int(steps.max())
    full = np.flatnonzero(steps == longest)
    numbers = firsts[full].astype(np.float64)
    part, scratch = counts[:, full], _scratch(len(full))
    for _ in range(longest):
        _step(shares, numbers, part, scratch)
        numbers += 1
    counts[:, full] = part


def _run_into(
    shares: np.ndarray, firsts: np.ndarray, counts: np.ndarray, choices: np.ndarray
) -> None:
    numbers, scratch = firsts.astype(np.float64), _scratch(len(firsts))
    by_step = np.empty(choices.shape[::-1], choices.dtype)
    for step in range(len(by_step)):
        by_step[step] = _step(shares, numbers, counts, scratch)
        numbers += 1
    choices[:] = by_step.T


def _repair(
    shares: np.ndarray,
    firsts: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
    choices: np.ndarray,
) -> None:
    """Run lanes again until each begins where the one before it ends."""
    for _ in range(_ROUNDS):
        wrong = 1 + np.flatnonzero((begins[:, 1:] != ends[:, :-1]).any(axis=0))
        if not len(wrong):
            return
        begins[:, wrong] = ends[:, wrong - 1]
        counts, part = begins[:, wrong], np.empty((len(wrong), choices.shape[1]), choices.dtype)
        _run_into(shares, firsts[wrong], counts, part)
        ends[:, wrong], choices[wrong] = counts, part
    for lane in range(1, len(firsts)):
        if (begins[:, lane] != ends[:, lane - 1]).any():
            begins[:, lane] = ends[:, lane - 1]
            found, end = _loop(shares, int(firsts[lane]), begins[:, lane], choices.shape[1])
            choices[lane], ends[:, lane] = found, end


def _loop(
    shares: np.ndarray, start: int, counts: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose one after another, in plain Python floats; fast for few samples."""
    weights, taken = shares.tolist(), counts.tolist()
    corpora, choices = range(len(weights)), []
    for number in range(start, start + size):
        scale = float(max(number, 1))
        best, choice = weights[0] * scale - taken[0], 0
        for corpus in corpora:
            error = weights[corpus] * scale - taken[corpus]
            if error > best:
                best, choice = error, corpus
        taken[choice] += 1.0
        choices.append(choice)
    return np.array(choices, np.int16), np.array(taken)
