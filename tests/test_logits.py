"""The stack's rule for logits, as a rollout engine calls it."""

from typing import Any

import pytest
import torch

from rlplugins import logits
from rlplugins.errors import ConfigurationError
from rlplugins.rollouts import Sampling
from rlplugins.stack import Stack
from rlplugins_hapo_token import HapoToken

STATISTICS = (-1.0, 0.5, 0.4, 0.3)


def handed_over(**engine: Any) -> dict[str, Any]:
    return logits.with_rule(engine, Stack(["hapo-token"]))


def test_each_request_gets_its_own_numbers() -> None:
    rule = logits.Rule(handed_over()["additional_config"][logits.KEY])
    given = 3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    other = tuple(2 * number for number in STATISTICS)
    numbers = [{"hapo_token": STATISTICS}, {}, {"hapo_token": other}]
    made = rule(given, logits.parts_of(numbers, "cpu"))
    process = HapoToken().process_logits
    assert torch.equal(made[1], given[1])  # of a request that was not drawn with `sampling_params`
    for row, statistics in ((0, STATISTICS), (2, other)):
        alone = process(given[row : row + 1], {"hapo_token": torch.tensor([statistics])})
        torch.testing.assert_close(made[row : row + 1], alone)
        assert not torch.equal(made[row], given[row])


def test_requests_with_the_same_names_are_one_call() -> None:
    (part,) = logits.parts_of([{"hapo_token": STATISTICS}, {"hapo_token": STATISTICS}], "cpu")
    assert part.rows.tolist() == [0, 1] and part.numbers["hapo_token"].shape == (2, 4)


def test_the_users_own_options_of_the_engine_stay() -> None:
    options = handed_over(logits_processors=["mine:Rule"], additional_config={"mine": 1}, seed=3)
    assert options["logits_processors"] == ["mine:Rule", logits.PROCESSOR]
    assert options["additional_config"]["mine"] == 1 and options["seed"] == 3


def test_an_engine_that_would_build_another_stack_is_refused() -> None:
    given = handed_over()["additional_config"][logits.KEY]
    with pytest.raises(ConfigurationError, match="on every node"):
        logits.Rule({**given, "fingerprint": "other"})
    given["specification"]["plugins"][0]["version"] = "9"
    with pytest.raises(ConfigurationError, match=r"hapo-token .* is installed here, the run uses 9"):
        logits.Rule(given)


def test_the_numbers_of_a_request_come_back_from_its_parameters() -> None:
    sampling = Sampling.of(2, 1.0, 5)
    assert logits.request_args(sampling, 0) == {} == logits.numbers_of({"extra_args": None})
    sampling.numbers["hapo_token"] = torch.tensor([STATISTICS, STATISTICS]) * torch.tensor([[1.0], [2.0]])
    assert logits.numbers_of(logits.request_args(sampling, 1))["hapo_token"] == pytest.approx(
        [2 * number for number in STATISTICS]
    )
