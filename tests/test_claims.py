"""The claim scripts run (a smoke of seconds each), and their statistics are right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

CLAIMS = Path(__file__).resolve().parent.parent / "examples" / "claims"
SCRIPTS = sorted(path for path in CLAIMS.glob("*.py") if path.name != "claims.py")

_specification = importlib.util.spec_from_file_location("claims", CLAIMS / "claims.py")
assert _specification is not None and _specification.loader is not None
claims = importlib.util.module_from_spec(_specification)
sys.modules["claims"] = claims
_specification.loader.exec_module(claims)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_runs(script: Path) -> None:
    kept = {path: path.read_bytes() for path in (CLAIMS / "results").glob("*.json")}
    done = subprocess.run(
        [sys.executable, str(script), "--smoke"],
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "difference" in done.stdout
    assert kept == {path: path.read_bytes() for path in (CLAIMS / "results").glob("*.json")}, "a smoke writes nothing"


def test_differences_are_paired_by_seed() -> None:
    reference, variant = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.6, 2.5, 3.5, 4.6])
    first, second = claims.outcomes({"a": reference, "b": variant}, "above")
    assert first.verdict == "reference" and second.verdict == "came out"
    low, high = stats.t.interval(0.95, 3, loc=np.mean(variant - reference), scale=stats.sem(variant - reference))
    assert second.difference == pytest.approx((low + high) / 2)
    assert second.difference_half_width == pytest.approx((high - low) / 2)


def test_a_difference_within_its_interval_is_no_result() -> None:
    values = {"a": np.array([0.0, 0.0, 0.0]), "b": np.array([1.0, -1.0, 0.5])}
    assert claims.outcomes(values, "above")[1].verdict == "no clear difference"


def test_the_other_way_is_said() -> None:
    values = {"a": np.zeros(4), "b": np.array([-1.0, -1.1, -0.9, -1.0])}
    assert claims.outcomes(values, "above")[1].verdict == "came out the other way"
