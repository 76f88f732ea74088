"""What the claim scripts share: seeds, intervals, and the line for docs/claims.md.

A script measures one number per seed for a reference and for variants, on the same seeds, and calls `report`. With
`--smoke` it does so in seconds, to show that it runs, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Claim:
    """One published claim and its measurement at CPU size.

    Attributes:
        plugin: the plugin's name.
        found: what the paper found, in a sentence.
        measured: what the script measures, in a sentence with the unit.
        expected: whether the variants should lie above or below the reference.
        note: what else came out and belongs beside the numbers.
    """

    plugin: str
    found: str
    measured: str
    expected: Literal["above", "below"]
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came out for one variant: means with half widths of 95 % intervals over seeds (Student's t, paired)."""

    variant: str
    mean: float
    half_width: float
    difference: float
    difference_half_width: float
    verdict: str


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half width of its 95 % interval."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def outcomes(values: Mapping[str, np.ndarray], expected: str) -> list[Outcome]:
    """Every variant compared with the first, seed by seed."""
    reference = next(iter(values.values()))
    found = []
    for position, (variant, numbers) in enumerate(values.items()):
        difference, width = interval(numbers - reference)
        right = difference > 0 if expected == "above" else difference < 0
        verdict = "reference" if position == 0 else _verdict(right, abs(difference) > width)
        found.append(Outcome(variant, *interval(numbers), difference, width, verdict))
    return found


def _verdict(right: bool, clear: bool) -> str:
    if not clear:
        return "no clear difference"
    return "came out" if right else "came out the other way"


def report(claim: Claim, measure: Callable[[int, bool], Mapping[str, float]], seeds: int = 10) -> list[Outcome]:
    """Measure on every seed, print a table, and keep the numbers for docs/claims.md.

    Args:
        claim: what is measured.
        measure: a seed and whether this is a smoke run -> one number per variant, the reference first.
        seeds: how many.
    """
    parser = argparse.ArgumentParser(description=claim.found)
    parser.add_argument("--smoke", action="store_true", help="two seeds, as small as possible; writes nothing")
    parser.add_argument("--seeds", type=int, default=seeds)
    options = parser.parse_args()
    rows = [measure(seed, options.smoke) for seed in range(2 if options.smoke else options.seeds)]
    values = {variant: np.array([row[variant] for row in rows]) for variant in rows[0]}
    found = outcomes(values, claim.expected)
    print(f"{claim.plugin}: {claim.measured} ({len(rows)} seeds, 95 % intervals)")
    for outcome in found:
        print(
            f"  {outcome.variant:28} {outcome.mean:10.4g} ± {outcome.half_width:.2g}   "
            f"difference {outcome.difference:+.4g} ± {outcome.difference_half_width:.2g}   {outcome.verdict}"
        )
    if not options.smoke:
        RESULTS.mkdir(exist_ok=True)
        kept = {
            **asdict(claim),
            "seeds": len(rows),
            "script": Path(sys.argv[0]).name,
            "outcomes": [asdict(o) for o in found],
        }
        (RESULTS / f"{claim.plugin}.json").write_text(json.dumps(kept, indent=1) + "\n")
    return found
