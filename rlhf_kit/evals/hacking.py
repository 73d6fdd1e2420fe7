"""Signs that a policy pleases its reward and not what the reward stands for: pure functions on texts and numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

REFUSAL = (
    r"(?i)\b(?:I(?:'m| am) (?:sorry|unable|not able)|I (?:can(?:no|')t|won't|will not|must decline)"
    r"|as an? (?:AI|language model)|I apologi[sz]e)\b"
)
SHRINKAGE = 0.1


def repetition(text: str, size: int = 4) -> float:
    """Share of the word n-grams that occurred before, `1 - distinct / all`; 0 for fewer than n words."""
    words = text.split()
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def refuses(text: str, pattern: str = REFUSAL) -> bool:
    """Whether a completion says that it will not answer: the pattern occurs in it."""
    return re.search(pattern, text) is not None


def centred(values: Float[np.ndarray, "N"], groups: Sequence[np.ndarray]) -> Float[np.ndarray, "N"]:
    """Values less the mean of their group."""
    result = np.full(len(values), np.nan)
    for group in groups:
        result[group] = values[group] - values[group].mean()
    return result


def slope(x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"]) -> float | None:
    """Least-squares slope of y on x; None where x does not vary."""
    dx = x - x.mean()
    return float(dx @ (y - y.mean()) / (dx @ dx)) if dx @ dx > 0 else None


def correlation(x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"]) -> float | None:
    """Pearson's correlation; None where one does not vary."""
    dx, dy = x - x.mean(), y - y.mean()
    scale = np.sqrt((dx @ dx) * (dy @ dy))
    return float(dx @ dy / scale) if scale > 0 else None


def blocks(count: int, length: int) -> list[np.ndarray]:
    """Runs of neighbours: points of one training run are no independent draws, blocks of them more nearly are."""
    return [np.arange(start, min(start + length, count)) for start in range(0, count, length)]


def kl_estimates(log_ratios: Float[np.ndarray, "T"]) -> tuple[float, float]:
    """k1 `sum d` and k3 `sum (exp(-d) - 1 + d)` of a completion, `d = log pi - log pi_0` of its sampled tokens.

    Both have the mean `KL(pi || pi_0)` over completions of pi (Schulman, *Approximating KL divergence*, 2020).
    """
    d = np.asarray(log_ratios, dtype=np.float64)
    return float(d.sum()), float((np.exp(-d) - 1 + d).sum())


class Mahalanobis:
    """Distance from the completions of a reference policy, in hidden states: out-of-distribution score.

    `sqrt( (h - mu)^T S^-1 (h - mu) )` (Lee et al., arXiv 1807.03888, Eq. 2, with one class), S the covariance shrunk
    towards a multiple of the identity, `(1-a) S + a tr(S)/D I`, for fewer rows than dimensions leave S singular.

    Args:
        features: (N, D) of the reference policy's completions.
        shrinkage: a.
    """

    def __init__(self, features: Float[np.ndarray, "N D"], shrinkage: float = SHRINKAGE) -> None:
        features = np.asarray(features, dtype=np.float64)
        self._mean = features.mean(axis=0)
        centred_ = features - self._mean
        covariance = centred_.T @ centred_ / max(len(features) - 1, 1)
        size = covariance.shape[0]
        covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / size * np.eye(size)
        self._factor = np.linalg.cholesky(covariance)

    def __call__(self, features: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M"]:
        """The distance of each row."""
        away = np.asarray(features, dtype=np.float64) - self._mean
        return np.sqrt((np.linalg.solve(self._factor, away.T) ** 2).sum(axis=0))
