"""The numbers of preference training, and which stacks may train on pairs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlplugins import Pairs, Plugin, Stack, hookimpl, needs
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.hookspecs import HOOKS
from rlplugins.pairs import SIDES
from rlplugins.testing import credit, make_rollouts, start
from rlplugins.testing.pairs import make_pairs, pair_loss_and_gradient
from rlplugins.trainer import Trainer

ON_PAIRS = frozenset(
    {"build_preferences", "preference_loss", "prepare_mini_batch", "forward", "auxiliary_loss", "reference_policy"}
)
few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**31)


def trainer(loss: Any = "dpo", **options: Any) -> Trainer:
    return Trainer(
        "any", binds=ON_PAIRS, provides=frozenset(needs.MEANINGS), defaults={"preference_loss": loss}, **options
    )


def random_case(seed: int, count: int = 6) -> tuple[Pairs, dict[str, Tensor], dict[str, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    pairs = make_pairs(*torch.randint(0, 6, (2, count), generator=source).tolist())
    made = [
        {side: torch.randn(pairs.chosen_mask.shape, generator=source, dtype=torch.float64) for side in SIDES}
        for _ in range(2)
    ]
    return pairs, made[0], made[1]


class Weigh(Plugin):
    """Weights of pairs and tokens."""

    name = "weigh"
    tokens: bool = False

    @hookimpl
    def build_preferences(self, pairs: Pairs) -> Pairs:
        pairs.weights = (torch.arange(len(pairs)) % 3)[:, None].float()
        if self.tokens:
            pairs.chosen_token_weights = 1 + pairs.chosen.float()
            pairs.rejected_token_weights = 1 + pairs.rejected.float()
        return pairs


class MeanMargin(Plugin):
    """An auxiliary loss with a sum over the mini-batch, and a term on the chosen responses."""

    name = "mean-margin"
    needs = (needs.column("level"),)

    @hookimpl
    def prepare_mini_batch(self, batch: Any) -> None:
        batch.share("levels", batch.sum(batch["level"].sum()))
        batch.add_column("half", batch["level"] / 2)

    @hookimpl
    def auxiliary_loss(self, chosen_log_probs: Tensor, chosen_token_weights: Tensor, batch: Any) -> Tensor:
        nll = -(chosen_log_probs * chosen_token_weights).sum(1)
        return 2 * (nll * batch["half"] * batch.weights[:, 0]).sum() / batch.shared["levels"]


# the mean


@few
@given(seed=seeds, tokens=st.booleans())
def test_the_loss_is_the_weighted_mean_over_pairs(seed: int, tokens: bool) -> None:
    pairs, policy, reference = random_case(seed)
    stack = start([Weigh(tokens=tokens)], trainer=trainer())
    loss, _ = pair_loss_and_gradient(stack, pairs, policy, reference)
    total = weights = 0.0
    for row in range(len(pairs)):
        ratios = []
        for side in SIDES:
            length = int(getattr(pairs, f"{side}_mask")[row].sum())
            counts = [1 + int(token) if tokens else 1 for token in getattr(pairs, side)[row][:length]]
            ratios.append(sum(n * float(policy[side][row, t] - reference[side][row, t]) for t, n in enumerate(counts)))
        total += (row % 3) * float(-logsigmoid(torch.tensor(0.1 * (ratios[0] - ratios[1]), dtype=torch.float64)))
        weights += row % 3
    assert float(loss) == pytest.approx(total / weights, rel=1e-6)


@few
@given(seed=seeds, loss=st.sampled_from(["dpo", "cdpo", "ipo", "simpo"]), parts=st.sampled_from([2, 3, 6]))
def test_micro_batches_change_nothing(seed: int, loss: str, parts: int) -> None:
    pairs, policy, reference = random_case(seed)
    pairs.columns["level"] = torch.arange(1.0, 7.0, dtype=torch.float64)
    stack = start([Weigh(tokens=True), MeanMargin()], trainer=trainer(loss))
    whole, gradient = pair_loss_and_gradient(stack, pairs, policy, reference)
    cut, parted = pair_loss_and_gradient(stack, pairs, policy, reference, micro_batches=parts)
    assert float(whole) == pytest.approx(float(cut), rel=1e-9)
    for side in SIDES:
        torch.testing.assert_close(gradient[side], parted[side])


@few
@given(seed=seeds, edge=st.integers(1, 5), broken=st.booleans())
def test_ranks_change_nothing(seed: int, edge: int, broken: bool) -> None:
    pairs, policy, reference = random_case(seed)
    pairs = make_pairs([4] * 6, [3] * 6, columns={"level": torch.arange(1.0, 7.0, dtype=torch.float64)})
    policy, reference = ({side: torch.randn(6, 4, dtype=torch.float64) for side in SIDES} for _ in range(2))
    if broken:
        reference["chosen"][0, 0] = torch.nan
    stack = start([Weigh(), MeanMargin()], trainer=trainer())
    whole, gradient = pair_loss_and_gradient(stack, pairs, policy, reference)
    columns = stack.pair_columns(stack.build_preferences(pairs)) | {
        f"{s}_ref_log_probs": v for s, v in reference.items()
    }
    rows = [torch.arange(edge), torch.arange(edge, 6)]
    leaves = {side: policy[side].clone().requires_grad_() for side in SIDES}
    ranks = Ranks(2)

    def rank(place: int) -> Tensor:
        mine = {name: column[rows[place]] for name, column in columns.items()}
        mini = stack.pair_mini_batch(mine, reduce=ranks.reducer(place))
        return mini.loss(*(leaves[side][rows[place]] for side in SIDES)).total

    total = sum(ranks.run(rank))
    assert float(total.detach()) == pytest.approx(float(whole), rel=1e-9)
    total.backward()
    for side in SIDES:
        torch.testing.assert_close(leaves[side].grad, gradient[side])


class Ranks:
    """Threads that add tensors."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: list[Any] = [None] * count
        self.barrier = threading.Barrier(count)

    def reducer(self, place: int) -> Any:
        def add(values: Tensor) -> Tensor:
            self.values[place] = values
            self.barrier.wait(20)
            total = sum(self.values)
            self.barrier.wait(20)
            return total

        return add

    def run(self, rank: Any) -> list[Any]:
        results: list[Any] = [None] * self.count

        def work(place: int) -> None:
            results[place] = rank(place)

        threads = [threading.Thread(target=work, args=(place,)) for place in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_pair_whose_reference_is_not_finite_is_as_if_absent(value: float) -> None:
    pairs = make_pairs([3, 3, 3], [2, 2, 2])
    policy, reference = ({side: torch.randn(3, 3) for side in SIDES} for _ in range(2))
    rest = torch.tensor([0, 2])
    stack = start([], trainer=trainer())
    alone, _ = pair_loss_and_gradient(
        stack, pairs.select(rest), *({side: values[side][rest] for side in SIDES} for values in (policy, reference))
    )
    reference["rejected"][1, 0] = value
    loss, gradient = pair_loss_and_gradient(stack, pairs, policy, reference)
    assert float(loss) == pytest.approx(float(alone), rel=1e-6)
    assert not gradient["chosen"][1].any()


def test_what_is_not_finite_under_the_policy_is_reported_and_left_out() -> None:
    pairs = make_pairs([2, 2], [2, 2])
    policy, reference = ({side: torch.randn(2, 2) for side in SIDES} for _ in range(2))
    stack = start([], trainer=trainer())
    mini = stack.pair_mini_batch(stack.pair_columns(pairs) | {f"{s}_ref_log_probs": v for s, v in reference.items()})
    policy["chosen"][1, 1] = -torch.inf
    part = mini.loss(policy["chosen"], policy["rejected"])
    assert part.broken.tolist() == [False, True]
    assert bool(part.total.isfinite())


def test_without_pairs_that_count_there_is_nothing_to_learn() -> None:
    pairs = make_pairs([2, 2], [2, 2], weights=torch.zeros(2, 1))
    stack = start([{"nll": {"coefficient": 1.0}}], trainer=trainer())
    columns = stack.pair_columns(pairs) | {f"{side}_ref_log_probs": torch.zeros(2, 2) for side in SIDES}
    mini = stack.pair_mini_batch(columns)
    assert mini.weightless
    assert float(mini.loss(torch.full((2, 2), -1.0), torch.full((2, 2), -1.0)).total) == 0


def test_the_likelihood_of_the_chosen_responses_is_a_mean_over_tokens_then_pairs() -> None:
    pairs = make_pairs([1, 3], [2, 2])
    policy = {side: -torch.rand(2, 3) for side in SIDES}
    stack = start([{"nll": {"coefficient": 0.5}}], trainer=trainer())
    plain, _ = pair_loss_and_gradient(start([], trainer=trainer()), pairs, policy, policy)
    loss, _ = pair_loss_and_gradient(stack, pairs, policy, policy)
    expected = -(policy["chosen"][0, 0] + policy["chosen"][1].mean()) / 2
    assert float(loss - plain) == pytest.approx(0.5 * float(expected), rel=1e-5)


def test_a_mix_of_losses_is_their_weighted_sum() -> None:
    pairs, policy, reference = random_case(8)
    found = [
        float(pair_loss_and_gradient(start([], trainer=trainer(), owners=owners), pairs, policy, reference)[0])
        for owners in (
            {"preference_loss": {"dpo": 0.25, "ipo": 0.75}},
            {"preference_loss": "dpo"},
            {"preference_loss": "ipo"},
        )
    ]
    assert found[0] == pytest.approx(0.25 * found[1] + 0.75 * found[2])


class HalfLoss(Plugin):
    """Halves whichever loss there is, as a method with weights that depend on the policy does."""

    name = "half-loss"

    @hookimpl(wrapper=True)
    def preference_loss(self, chosen_log_probs: Tensor) -> Any:
        loss = yield
        return loss * 0.5


def test_a_wrapper_reweighs_the_loss_of_another() -> None:
    pairs, policy, reference = random_case(9)
    plain, _ = pair_loss_and_gradient(start([], trainer=trainer()), pairs, policy, reference)
    half, _ = pair_loss_and_gradient(start([HalfLoss()], trainer=trainer()), pairs, policy, reference)
    assert float(half) == pytest.approx(float(plain) / 2)


# pairs


def test_swapping_twice_changes_nothing_and_once_the_sides() -> None:
    pairs = make_pairs([1, 4], [3, 2])
    rows = torch.tensor([True, False])
    once = pairs.swapped(rows)
    assert once.chosen_mask.sum(1).tolist() == [3, 4] and once.rejected_mask.sum(1).tolist() == [1, 2]
    assert torch.equal(once.swapped(rows).chosen, pairs.chosen)


class Peek(Plugin):
    """Reads a column without saying so."""

    name = "peek"

    @hookimpl
    def build_preferences(self, pairs: Pairs) -> Pairs:
        pairs["level"]
        return pairs


def test_a_column_that_was_not_declared_is_not_read() -> None:
    with pytest.raises(ConfigurationError, match=r'needs\.column\("level"\)'):
        start([Peek()]).build_preferences(make_pairs([1], [1], columns={"level": torch.ones(1)}))


class Returns(Plugin):
    """Returns what it is told."""

    name = "returns"
    what: Any = None

    @hookimpl
    def build_preferences(self, pairs: Pairs) -> Any:
        return self.what(pairs)


def with_weights(weights: Tensor) -> Any:
    def change(pairs: Pairs) -> Pairs:
        pairs.weights = weights
        return pairs

    return change


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        (lambda pairs: None, "returned NoneType, not Pairs"),
        (with_weights(torch.ones(2)), "returned shape"),
        (with_weights(torch.tensor([[1.0], [-1.0]])), "must be finite and >= 0"),
        (with_weights(torch.tensor([[1.0], [torch.nan]])), "must be finite and >= 0"),
    ],
)
def test_what_is_no_pairs_is_refused(what: Any, problem: str) -> None:
    with pytest.raises(HookError, match=f"returns.build_preferences: {problem}|{problem}"):
        start([Returns(what=what)]).build_preferences(make_pairs([1, 1], [1, 1]))


class SumsOnly(Plugin):
    """A loss that knows no weights of tokens."""

    name = "sums-only"

    @hookimpl
    def preference_loss(self, chosen_log_probs: Tensor, rejected_log_probs: Tensor) -> Tensor:
        return rejected_log_probs.sum(1) - chosen_log_probs.sum(1)


def test_weights_of_tokens_are_not_lost_under_a_loss_that_takes_none() -> None:
    stack = start([Weigh(tokens=True), SumsOnly()])
    with pytest.raises(HookError, match="takes no token weights, but build_preferences weighs tokens"):
        pair_loss_and_gradient(stack, *random_case(0)[:2])


class WrongShape(Plugin):
    """A loss per token."""

    name = "wrong-shape"

    @hookimpl
    def preference_loss(self, chosen_log_probs: Tensor) -> Tensor:
        return chosen_log_probs


def test_a_loss_of_another_shape_is_refused() -> None:
    with pytest.raises(HookError, match=r"wrong-shape.preference_loss: returned shape"):
        pair_loss_and_gradient(start([WrongShape()]), *random_case(0)[:2])


# which stacks are legal


@pytest.mark.parametrize(("loss", "needed"), [("dpo", True), ("ipo", True), ("cdpo", True), ("simpo", False)])
def test_only_a_loss_that_takes_the_reference_has_one(loss: str, needed: bool) -> None:
    assert Stack([], trainer=trainer(loss)).needs("column", "ref_log_probs") is needed


@pytest.mark.parametrize("other", ["grpo", "bapo", "bnpo", {"entropy_bonus": {"coefficient": 0.1}}])
def test_a_stack_trains_on_rewards_or_on_preferences(other: Any) -> None:
    with pytest.raises(StackError, match=r"trains on preferences here, but \w+ is for rewards"):
        Stack([SumsOnly(), other])


def test_a_trainer_that_draws_responses_refuses_a_loss_on_pairs() -> None:
    drawing = Trainer("any", binds=frozenset(HOOKS) - {"build_preferences", "preference_loss"})
    with pytest.raises(StackError, match="any trains on rewards here, but sums-only is for preferences"):
        Stack([SumsOnly()], trainer=drawing)
    with pytest.raises(StackError, match="nll is for preferences: nobody calls its auxiliary_loss"):
        Stack([{"nll": {"coefficient": 1.0}}], trainer=drawing)


def test_neither_kind_of_training_has_the_defaults_of_the_other() -> None:
    assert "preference_loss" not in Stack(["grpo"]).plan.owners
    on_pairs = Stack([SumsOnly()]).plan
    assert "policy_loss" not in on_pairs.owners and not on_pairs.live_hooks() & {"kl_penalty", "compute_advantages"}
    assert credit(["grpo"], make_rollouts([0.0, 1.0])).advantages.any()
