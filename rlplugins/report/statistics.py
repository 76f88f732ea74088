"""Numbers of a study: estimates over seeds with 95 % confidence intervals, and learning curves.

Intervals are Student's t on the seeds, whatever their number. Of five seeds it covers the true mean in 95 % of
studies if their values are normal, and in 92 % if they are skewed (beta(8, 2), log-normal with sigma 0.5); the
bias-corrected accelerated bootstrap covers it in 82 to 83 %, and is still behind with thirty seeds. To compare
with the baseline is to take the same interval of the differences seed by seed, because a seed fixes prompts and
initial weights in both. Intervals are not corrected for how many of them are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

CONFIDENCE = 0.95
FINAL_PART = 0.1

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One metric of one run.

    Attributes:
        steps: (N,) the steps at which it was recorded, ascending.
        values: (N,) what was recorded.
    """

    steps: Array
    values: Array


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: the mean.
        half_width: half the width of its 95 % confidence interval; None from a single seed.
        count: the number of seeds.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Curve:
    """A metric over the steps: the mean over seeds and its confidence band.

    Attributes:
        steps: (N,) steps, ascending.
        mean: (N,) mean over the seeds that reached the step.
        half_width: (N,) half the width of the band; NaN where fewer than two seeds did.
    """

    steps: Array
    mean: Array
    half_width: Array


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed (one at least), with its interval.

    Args:
        values: one value per seed.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return Estimate(float(sample.mean()), None, len(sample))
    half_width = _half_width(sample.var(ddof=1, keepdims=True), np.array([len(sample)]))
    return Estimate(float(sample.mean()), float(half_width[0]), len(sample))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Estimate | None:
    """How much `values` exceed `baseline` on the seeds that both have; None without a common seed.

    Args:
        values: one value per seed.
        baseline: the same for the baseline.
    """
    common = [seed for seed in values if seed in baseline]
    return estimate([values[seed] - baseline[seed] for seed in common]) if common else None


def final_value(series: Series, run_steps: Array) -> float:
    """The mean over the last 10 % of a run's steps; the last value if none was recorded in them.

    Args:
        series: the metric.
        run_steps: (S,) every step that the run recorded, ascending.
    """
    first = run_steps[-max(1, round(FINAL_PART * len(run_steps)))]
    last = series.values[series.steps >= first]
    return float(last.mean() if len(last) else series.values[-1])


def area_under_curve(series: Series) -> float:
    """The area under the learning curve over the steps that it spans: the curve's mean height.

    Args:
        series: the metric.
    """
    widths = np.diff(series.steps)
    heights = (series.values[1:] + series.values[:-1]) / 2
    return float(heights @ widths / widths.sum() if len(widths) else series.values[-1])


def learning_curve(runs: Sequence[Series], points: int = 100) -> Curve:
    """The mean curve of several runs with its confidence band.

    Where the runs have more than `points` different steps, each is first averaged over as many equal spans.

    Args:
        runs: the same metric of each seed, one at least.
        points: the largest number of points of the curve.
    """
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    spans = np.arange(len(steps)) * min(points, len(steps)) // len(steps)
    table = np.stack([_means_per_span(run, spans[np.searchsorted(steps, run.steps)], spans[-1] + 1) for run in runs])
    mean, half_width = _mean_and_half_width(table)
    return Curve(np.bincount(spans, steps) / np.bincount(spans), mean, half_width)


def _means_per_span(run: Series, spans: NDArray[np.intp], count: int) -> Array:
    """(count,) the run's mean over each span; NaN where it has no value."""
    with np.errstate(invalid="ignore"):
        return np.bincount(spans, run.values, count) / np.bincount(spans, minlength=count)


def _mean_and_half_width(table: Array) -> tuple[Array, Array]:
    """(N,) means and half widths over the seeds of `table` (seeds, N); NaN is no value."""
    present = ~np.isnan(table)
    count = present.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, table, 0.0).sum(0) / count
        variance = np.where(present, (table - mean) ** 2, 0.0).sum(0) / (count - 1)
        return mean, np.where(count > 1, _half_width(variance, count), np.nan)


def _half_width(variance: Array, count: NDArray[np.int_]) -> Array:
    """Half the width of the interval for the mean of `count` values with this variance (n - 1 below)."""
    quantile: Array = stdtrit(count - 1, (1 + CONFIDENCE) / 2)
    return quantile * np.sqrt(variance / count)
