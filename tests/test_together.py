"""Rows that stay together are packed as whole units, whatever their sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins.testing import make_rollouts
from rlplugins.together import packed, units_of

unit_numbers = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@settings(max_examples=25, deadline=None)
@given(units=unit_numbers, limit=st.integers(1, 12), seed=st.integers(0, 5))
def test_parts_hold_every_row_once_and_whole_units_up_to_the_limit(units: list[int], limit: int, seed: int) -> None:
    numbers = torch.tensor(units)
    costs = torch.randint(1, 4, (len(units),), generator=torch.Generator().manual_seed(seed))
    parts = packed(numbers, costs, limit)
    assert sorted(row for part in parts for row in part) == list(range(len(units)))
    owners = [{units[row] for row in part} for part in parts]
    assert sum(map(len, owners)) == len(set(units))
    for part, owner in zip(parts, owners, strict=True):
        assert int(costs[part].sum()) <= limit or len(owner) == 1


@pytest.mark.parametrize(("needed", "units"), [("group", [0, 0, 2, 3, 2, 5]), ("prompt", [0, 0, 0, 3, 3, 5])])
def test_units_are_the_groups_or_the_prompts(needed: str, units: list[int]) -> None:
    rollouts = make_rollouts([0.0] * 6, [0, 0, 0, 1, 1, 2])
    rollouts.prompt_rows = torch.tensor([4, 4, 4, 1, 1, -1])

    class Needing:
        def needs(self, kind: str, value: str) -> bool:
            return value == needed

    groups = torch.tensor([0, 0, 5, -1, 5, -1])
    assert units_of(Needing(), rollouts, groups).tolist() == units  # type: ignore[arg-type]
