"""Whether probabilities are what they say: Brier score, expected calibration error and its table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Binning = Literal["mass", "width"]


@dataclass(frozen=True)
class Bin:
    """Rows whose probabilities lie together.

    Attributes:
        low, high: the least and the greatest probability in it.
        count: rows.
        confidence: mean probability.
        accuracy: share of them that are right.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def brier(probabilities: Float[np.ndarray, "N"], labels: Float[np.ndarray, "N"]) -> float:
    """`mean (p - y)^2` (Brier, 1950): 0 is best, a coin has 1/4."""
    return float(np.mean((np.asarray(probabilities) - np.asarray(labels)) ** 2))


def log_loss(probabilities: Float[np.ndarray, "N"], labels: Float[np.ndarray, "N"]) -> float:
    """`-mean( y log p + (1-y) log(1-p) )`, with p kept 1e-12 from 0 and 1."""
    p = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-12, 1 - 1e-12)
    y = np.asarray(labels, dtype=np.float64)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def bin_places(probabilities: Float[np.ndarray, "N"], count: int, binning: Binning) -> Int[np.ndarray, "N"]:
    """The bin of each row, from 0.

    `width`: the k-th bin holds the probabilities in [k/M, (k+1)/M), the last also 1. `mass`: rows in order of their
    probability are cut into M parts whose sizes differ by one at most; equal probabilities go to the bin in which the
    first of them lies, so that the order of the rows says nothing.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if binning == "width":
        return np.minimum((p * count).astype(int), count - 1)
    levels, first = np.unique(np.sort(p), return_index=True)
    of_level = first * min(count, len(p)) // len(p)
    return of_level[np.searchsorted(levels, p)]


def reliability(
    probabilities: Float[np.ndarray, "N"], labels: Float[np.ndarray, "N"], count: int, binning: Binning
) -> list[Bin]:
    """The bins that hold a row, in order."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    places = bin_places(p, count, binning)
    bins = []
    for place in np.unique(places):
        inside = places == place
        own = p[inside]
        bins.append(Bin(own.min(), own.max(), int(inside.sum()), float(own.mean()), float(y[inside].mean())))
    return bins


def calibration_error(
    probabilities: Float[np.ndarray, "N"], labels: Float[np.ndarray, "N"], count: int, binning: Binning
) -> float:
    """ECE, `sum_b n_b/N |accuracy_b - confidence_b|` (Naeini et al., 2015; Guo et al., arXiv 1706.04599, Eq. 3)."""
    bins = reliability(probabilities, labels, count, binning)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / sum(b.count for b in bins)
