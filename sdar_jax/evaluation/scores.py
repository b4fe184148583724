"""From graded answers to scores: intervals, votes, pass@k."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    """One graded answer to a problem.

    Attributes:
        correct: whether it solves the problem.
        answer: what votes count; None if there is none.
        confidence: mean log-probability of its tokens, nats.
    """

    correct: bool
    answer: str | None
    confidence: float


def interval(correct: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """The mean of problems' scores and its 95% interval.

    One answer a problem: Wilson's (1927) interval. Several: the normal one of the problems' means, as answers to one
    problem are not independent.
    """
    means = np.array([np.mean(answers) for answers in correct])
    count, mean, z = len(means), float(means.mean()), 1.959964
    if all(len(answers) == 1 for answers in correct):
        middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count)
        half *= math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
        return mean, max(0.0, middle - half), min(1.0, middle + half)
    half = z * float(means.std(ddof=1)) / math.sqrt(count) if count > 1 else 1.0
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def pass_at(k: int, correct: Sequence[bool]) -> float:
    """The unbiased estimate that one of k answers is right (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    n, c = len(correct), sum(correct)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def vote(answers: Sequence[Answer], *, weighted: bool = False) -> bool:
    """Whether the answer that most give is right; of equals the first given wins, and no answer is no vote.

    Args:
        weighted: each counts as the geometric mean of its tokens' probabilities instead of once.
    """
    votes: dict[str, float] = defaultdict(float)
    right: dict[str, bool] = {}
    for each in answers:
        if each.answer is not None:
            votes[each.answer] += math.exp(each.confidence) if weighted else 1.0
            right.setdefault(each.answer, each.correct)
    return bool(votes) and right[max(votes, key=lambda answer: votes[answer])]
