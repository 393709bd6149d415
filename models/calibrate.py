"""Calibrate: one temperature by which logits are divided, so that of pixels with probability p a share p are buildings.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599): the temperature of the least cross entropy on pixels that were
not trained on. It moves no pixel across another, so the order of probabilities, and the best IoU, stay as they were.
All comes from a histogram of logits, which adds up over any number of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 20.0
"""Logits beyond +- this are counted as this: a probability of 2e-9 is not told from 0."""
STEP = 0.02
BINS = round(2 * LIMIT / STEP) + 1
COLDEST, HOTTEST = 0.05, 20.0
"""Between these the temperature is looked for. On pixels that are all right, or all wrong, it would have no bound."""


@dataclass(frozen=True)
class LogitHistogram:
    """How often each logit, to the nearest 0.02 from -20 to 20, occurs among true and among other pixels.

    positive and negative are int64 tensors of 2001 entries, on the CPU.
    """

    positive: Tensor
    negative: Tensor

    @staticmethod
    def empty() -> LogitHistogram:
        """Nothing counted yet."""
        return LogitHistogram(torch.zeros(BINS, dtype=torch.int64), torch.zeros(BINS, dtype=torch.int64))

    def __add__(self, other: LogitHistogram) -> LogitHistogram:
        return LogitHistogram(self.positive + other.positive, self.negative + other.negative)


def logit_histogram(logits: Tensor, target: Tensor, valid: Tensor) -> LogitHistogram:
    """Count the logits of the valid pixels, apart for target 1 and 0. All three have one shape."""
    keep, true = valid.bool(), target.bool()
    return LogitHistogram(
        torch.bincount(_bins(logits[keep & true].double()).cpu(), minlength=BINS),
        torch.bincount(_bins(logits[keep & ~true].double()).cpu(), minlength=BINS),
    )


def fit_temperature(counts: LogitHistogram) -> float:
    """The temperature of the least mean cross entropy, from 0.05 to 20; 1 where nothing was counted.

    Cross entropy is convex in 1 / temperature, so its slope is 0 in one place, which is found by halving.
    """
    if not int(counts.positive.sum() + counts.negative.sum()):
        return 1.0
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _slope(counts, middle) > 0 else (middle, high)
    return 2 / (low + high)


@dataclass(frozen=True)
class ReliabilityBin:
    """Pixels of like probability: how many, their mean probability, and the share of them that are buildings."""

    pixels: int
    probability: float
    share: float


def reliability(counts: LogitHistogram, temperature: float = 1.0, bins: int = 15) -> tuple[ReliabilityBin, ...]:
    """The pixels in bins of equal width of their probability at a temperature; bins without pixels are left out."""
    prob = torch.sigmoid(_logits() / temperature)
    index = (prob * bins).long().clamp(max=bins - 1)
    pixels = torch.zeros(bins, dtype=torch.int64).index_add(0, index, counts.positive + counts.negative)
    true = torch.zeros(bins, dtype=torch.int64).index_add(0, index, counts.positive)
    summed = torch.zeros(bins, dtype=torch.float64).index_add(0, index, (counts.positive + counts.negative) * prob)
    rows = zip(pixels.tolist(), true.tolist(), summed.tolist(), strict=True)
    return tuple(ReliabilityBin(count, total / count, hits / count) for count, hits, total in rows if count)


def calibration_error(counts: LogitHistogram, temperature: float = 1.0, bins: int = 15) -> float:
    """Expected calibration error (Naeini et al. 2015) of the building probability; 0 where nothing was counted.

    The mean over pixels of how far the mean probability of their bin is from its share of buildings.
    """
    rows = reliability(counts, temperature, bins)
    off = sum(row.pixels * abs(row.probability - row.share) for row in rows)
    return off / max(sum(row.pixels for row in rows), 1)


def _bins(logits: Tensor) -> Tensor:
    return ((logits.clamp(-LIMIT, LIMIT) + LIMIT) / STEP).round().long()


def _logits() -> Tensor:
    return torch.linspace(-LIMIT, LIMIT, BINS, dtype=torch.float64)


def _slope(counts: LogitHistogram, scale: float) -> float:
    """Of the summed cross entropy along scale = 1 / temperature."""
    logits = _logits()
    prob = torch.sigmoid(logits * scale)
    return float((logits * (counts.negative * prob - counts.positive * (1 - prob))).sum())
