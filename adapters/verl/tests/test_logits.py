"""The stack's rule for logits, as a rollout engine calls it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlplugins.errors import ConfigurationError, StackError
from rlplugins.stack import Stack, StackConfig
from rlplugins_hapo_token import HapoToken
from rlplugins_verl import logits, settings

STATISTICS = (-1.0, 0.5, 0.4, 0.3)


class Node(dict):
    """An open configuration."""

    __getattr__ = dict.__getitem__


def handed_over(**engine: Any) -> dict[str, Any]:
    rollout = Node(name="vllm", engine_kwargs={"vllm": engine})
    logits.hand_over(SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout)), Stack(["hapo-token"]))
    return rollout["engine_kwargs"]["vllm"]


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


def test_an_engine_that_cannot_call_the_rule_is_refused() -> None:
    config = {"algorithm": {"adv_estimator": "grpo"}, "actor_rollout_ref": {"rollout": {"n": 4, "name": "sglang"}}}
    with pytest.raises(StackError, match=r"(?s)cannot call process_logits.*off: \[hapo-token.process_logits\]"):
        settings.build_stack(config, StackConfig(plugins=["hapo-token"]), "sync")
