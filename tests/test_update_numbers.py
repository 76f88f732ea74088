"""The numbers of the update, sentence by sentence of the design; every formula against a plain loop."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Metrics, Plugin, Rollouts, Stack, hookimpl, needs
from rlplugins.defaults import EntropyBonus
from rlplugins.errors import HookError
from rlplugins.testing import loss_and_gradient, make_rollouts, start
from rlplugins.trainer import Trainer
from rlplugins.update import MiniBatch

LOSSES = ("ppo_clip", "gspo", "cispo", "reinforce")
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum")
KLS = ("none", "k1", "k2", "k3")
LENGTHS = [3, 1, 0, 5, 2, 4, 5, 1]
FAST = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


class Weighing(Plugin):
    """Weights from columns of the data."""

    name = "weighing"
    needs = (needs.column("w"), needs.column("u"))
    samples: bool = True
    tokens: bool = True

    @hookimpl(when=lambda self: self.samples)
    def select_samples(self, rollouts: Rollouts) -> Tensor:
        return rollouts["w"]

    @hookimpl(when=lambda self: self.tokens)
    def select_tokens(self, rollouts: Rollouts) -> Tensor:
        return rollouts["u"]


class Given(Plugin):
    """Advantages from a column of the data."""

    name = "given"
    needs = (needs.column("a"),)

    @hookimpl
    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        return rollouts["a"]


def random_batch(seed: int, lengths: Sequence[int] = LENGTHS, per_token: bool = True) -> tuple[Rollouts, Tensor]:
    """Rollouts with random advantages, weights of which some are 0, old and reference log-probs; and log-probs."""
    source = torch.Generator().manual_seed(seed)
    rows, width = len(lengths), max([*lengths, 2])

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=source)

    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    w, u = draw(rows, 1) * 3, draw(rows, width) * 2
    w[draw(rows, 1) < 0.25] = 0
    u[draw(rows, width) < 0.25] = 0
    a = torch.randn(rows, width if per_token else 1, generator=source) * (mask if per_token else 1)
    rollouts = make_rollouts(
        torch.zeros(rows), mask=mask, columns={"w": w, "u": u, "a": a},
        old_log_probs=-draw(rows, width) * mask, ref_log_probs=-draw(rows, width) * mask,
    )  # fmt: skip
    log_probs = (-torch.rand(rows, width, generator=source, dtype=torch.float64) * mask).detach()
    return rollouts, log_probs


def stack_of(loss: str = "ppo_clip", reduction: Any = "token_mean", kl: str = "none", **weighing: bool) -> Stack:
    owners: dict[str, Any] = {"policy_loss": loss, "reduce_loss": reduction}
    owners["kl_penalty"] = {kl: {"coefficient": 0.7}} if kl != "none" else kl
    return start([Given(), Weighing(**weighing)], owners=owners)


def cut_loss(
    stack: Stack, rollouts: Rollouts, log_probs: Tensor, cuts: Sequence[Sequence[int]], entropy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and gradient through micro-batches of these rows."""
    credit = stack.credit(rollouts)
    leaf = log_probs.detach().clone().requires_grad_()
    mini = stack.mini_batch(stack.update_columns(rollouts, credit), kinds=rollouts.kinds)
    total = torch.zeros((), dtype=log_probs.dtype)
    for rows in map(torch.tensor, cuts):
        part = mini.loss(leaf[rows], rows, entropy=entropy[rows] if entropy is not None else None)
        assert part.total.dtype == log_probs.dtype
        part.total.backward()
        total = total + part.total.detach()
    return total, leaf.grad


# an independent implementation


def by_hand(
    rollouts: Rollouts, log_probs: Tensor, loss: str, reduction: str, kl: str, constant: float = 1.0,
    weights: Tensor | None = None, token_weights: Tensor | None = None,
) -> float:  # fmt: skip
    """The design's formulas with loops and Python floats."""
    old, ref, a = rollouts.old_log_probs.double(), rollouts.ref_log_probs.double(), rollouts.columns["a"].double()
    w = rollouts.columns["w"] if weights is None else weights
    u = rollouts.columns["u"] if token_weights is None else token_weights

    def token_loss(i: int, t: int) -> tuple[float, float]:
        advantage = float(a[i, t] if a.shape[1] > 1 else a[i, 0])
        difference = float(log_probs[i, t] - old[i, t])
        ratio = math.exp(min(max(difference, -20), 20))
        if loss == "gspo":
            own = [s for s in range(log_probs.shape[1]) if rollouts.mask[i, s]]
            ratio = math.exp(sum(float(log_probs[i, s] - old[i, s]) for s in own) / len(own))
        clipped = min(max(ratio, 0.8), 1.2)
        policy = {
            "ppo_clip": max(-advantage * ratio, -advantage * clipped),
            "gspo": max(-advantage * ratio, -advantage * clipped),
            "cispo": -clipped * advantage * float(log_probs[i, t]),
            "reinforce": -advantage * float(log_probs[i, t]),
        }[loss]
        d = float(ref[i, t] - log_probs[i, t])
        penalty = {"none": 0.0, "k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[kl]
        return policy, 0.7 * penalty

    total = 0.0
    for part in (0, 1):
        above = below = 0.0
        for i in range(len(rollouts)):
            own = [t for t in range(log_probs.shape[1]) if rollouts.mask[i, t]]
            x = {t: token_loss(i, t)[part] for t in own}
            wi, ui = float(w[i, 0]), {t: float(u[i, t]) for t in own}
            inner = sum(ui[t] * x[t] for t in own)
            size = sum(ui.values())
            if reduction == "token_mean":
                above, below = above + wi * inner, below + wi * size
            elif reduction == "sequence_mean":
                above, below = above + wi * (inner / size if size else 0.0), below + wi
            else:
                above, below = above + wi * inner, below + wi * constant
        total += above / below if below else 0.0
    return total


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_what_the_formulas_say(loss: str, reduction: str, kl: str) -> None:
    rollouts, log_probs = random_batch(3)
    result, _ = cut_loss(stack_of(loss, reduction, kl), rollouts, log_probs, [range(8)])
    assert float(result) == pytest.approx(by_hand(rollouts, log_probs, loss, reduction, kl), rel=1e-6)


def test_sequence_sum_divides_by_its_constant() -> None:
    rollouts, log_probs = random_batch(4)
    stack = stack_of(reduction={"sequence_sum": {"constant": 8.0}})
    result, _ = cut_loss(stack, rollouts, log_probs, [range(8)])
    wanted = by_hand(rollouts, log_probs, "ppo_clip", "sequence_sum", "none", constant=8.0)
    assert float(result) == pytest.approx(wanted, rel=1e-6)


# however it is cut


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@FAST
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_how_rows_are_cut_into_micro_batches_never_changes_loss_or_gradient(
    loss: str, reduction: str, kl: str, data: st.DataObject, seed: int
) -> None:
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=8, max_size=8))
    rollouts, log_probs = random_batch(seed, lengths, per_token=data.draw(st.booleans()))
    stack = stack_of(loss, reduction, kl, samples=data.draw(st.booleans()), tokens=data.draw(st.booleans()))
    order = data.draw(st.permutations(range(8)))
    places = sorted(data.draw(st.sets(st.integers(1, 7), max_size=4)))
    random_cut = [order[a:b] for a, b in zip([0, *places], [*places, 8], strict=True)]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        whole, gradient = cut_loss(stack, rollouts, log_probs.to(dtype), [range(8)])
        for cut in ([range(4), range(4, 8)], [[row] for row in range(8)], random_cut):
            loss_of_parts, gradient_of_parts = cut_loss(stack, rollouts, log_probs.to(dtype), cut)
            scale = 1 + float(whole.abs())
            torch.testing.assert_close(loss_of_parts, whole, atol=tolerance * scale, rtol=tolerance)
            torch.testing.assert_close(gradient_of_parts, gradient, atol=tolerance * scale, rtol=tolerance)
        assert bool(gradient[~rollouts.mask].eq(0).all())


class Reducer:
    """A reduction over ranks that run in threads: waits for all, adds, gives each the sum."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks, timeout=20)
        self._parts: list[Tensor] = []
        self._lock = threading.Lock()
        self.calls = 0

    def __call__(self, values: Tensor) -> Tensor:
        with self._lock:
            self._parts.append(values)
        self._barrier.wait()
        total = torch.stack(self._parts).sum(0)
        if self._barrier.wait() == 0:
            self._parts.clear()
            self.calls += 1
        self._barrier.wait()
        return total


def on_ranks(ranks: int, work: Callable[[int, Reducer], Any]) -> list[Any]:
    results: list[Any] = [None] * ranks
    reducer = Reducer(ranks)

    def run(rank: int) -> None:
        results[rank] = work(rank, reducer)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def rank_loss(stack: Stack, columns: dict[str, Any], log_probs: Tensor, share: Tensor, reducer: Reducer) -> Any:
    """Loss and gradient of one rank's rows, in two micro-batches."""
    mine = {name: column[share] for name, column in columns.items()}
    mini = stack.mini_batch(mine, {}, reduce=reducer, metrics=Metrics())
    leaf = log_probs[share].clone().requires_grad_()
    total = torch.zeros((), dtype=log_probs.dtype)
    for rows in torch.arange(len(share)).chunk(2):
        part = mini.loss(leaf[rows], rows).total
        part.backward()
        total = total + part.detach()
    return total, leaf.grad, mini.weightless


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_how_rows_are_cut_into_ranks_never_changes_loss_or_gradient(reduction: str, ranks: int) -> None:
    rollouts, log_probs = random_batch(7)
    stack = stack_of("ppo_clip", reduction, "k3")
    whole, gradient = cut_loss(stack, rollouts, log_probs, [range(8)])
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    shares = torch.arange(8)[torch.tensor([5, 2, 0, 7, 1, 3, 6, 4])].tensor_split(ranks)
    results = on_ranks(ranks, lambda rank, reducer: rank_loss(stack, columns, log_probs, shares[rank], reducer))
    torch.testing.assert_close(sum(result[0] for result in results), whole, atol=1e-12, rtol=1e-10)
    for share, (_, part, _) in zip(shares, results, strict=True):
        torch.testing.assert_close(part, gradient[share], atol=1e-12, rtol=1e-10)


def test_sums_of_prepare_mini_batch_run_over_all_ranks() -> None:
    class Total(Plugin):
        name = "total"

        @hookimpl
        def prepare_mini_batch(self, batch: Any) -> None:
            batch.share("rows", batch.sum(torch.tensor(float(len(batch)))))
            batch.add_column("place", batch["mask"].sum(1, keepdim=True).float())

        @hookimpl
        def auxiliary_loss(self, log_probs: Tensor, batch: Any) -> Tensor:
            return (log_probs.sum(1, keepdim=True) * batch["place"]).sum() / batch.shared["rows"]

    rollouts, log_probs = random_batch(8)
    stack = start([Total(), Given()])
    whole, gradient = cut_loss(stack, rollouts, log_probs, [range(8)])
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    shares = torch.arange(8).tensor_split(3)
    results = on_ranks(3, lambda rank, reducer: rank_loss(stack, columns, log_probs, shares[rank], reducer))
    torch.testing.assert_close(sum(result[0] for result in results), whole)
    torch.testing.assert_close(torch.cat([result[1] for result in results]), gradient)
    single, _ = cut_loss(stack, rollouts, log_probs, [[row] for row in range(8)])
    torch.testing.assert_close(single, whole)


def test_only_prepare_mini_batch_communicates_shares_and_adds_columns() -> None:
    class Late(Plugin):
        name = "late"
        act: str = "sum"

        @hookimpl
        def auxiliary_loss(self, log_probs: Tensor, batch: Any) -> Tensor:
            if self.act == "sum":
                batch.sum(log_probs)
            elif self.act == "share":
                batch.share("x", 1)
            else:
                batch.add_column("x", log_probs)
            return log_probs.sum()

    rollouts, log_probs = random_batch(8)
    for act in ("sum", "share", "column"):
        with pytest.raises(RuntimeError, match="only prepare_mini_batch"):
            cut_loss(start([Late(act=act), Given()]), rollouts, log_probs, [range(8)])


def test_prepare_mini_batch_sees_the_current_log_probs_without_gradient() -> None:
    seen: list[Tensor] = []

    class Sees(Plugin):
        name = "sees"
        needs = (needs.MINI_BATCH_LOG_PROBS,)

        @hookimpl
        def prepare_mini_batch(self, batch: Any) -> None:
            seen.extend([batch.log_probs, batch.ratio, batch.loss_weights])

    rollouts, log_probs = random_batch(9)
    stack = start([Sees(), Given(), Weighing()])
    assert stack.needs_mini_batch_log_probs and not start([]).needs_mini_batch_log_probs
    loss_and_gradient(stack, rollouts, log_probs)
    assert torch.equal(seen[0], log_probs) and not seen[0].requires_grad
    torch.testing.assert_close(seen[1], (log_probs - rollouts.old_log_probs).exp())
    torch.testing.assert_close(seen[2], rollouts.columns["w"] * rollouts.columns["u"] * rollouts.mask)


# weights


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weight_zero_is_as_if_the_row_were_absent(reduction: str) -> None:
    rollouts, log_probs = random_batch(10)
    rollouts.columns["w"][:] = torch.tensor([0, 1, 2, 0, 3, 1, 0, 1.0])[:, None]
    stack = stack_of("ppo_clip", reduction, "k2")
    whole, gradient = cut_loss(stack, rollouts, log_probs, [range(8)])
    kept = torch.tensor([1, 2, 4, 5, 7])
    rest, gradient_of_rest = cut_loss(stack, rollouts.select(kept), log_probs[kept], [range(5)])
    torch.testing.assert_close(rest, whole)
    torch.testing.assert_close(gradient_of_rest, gradient[kept])
    assert gradient[[0, 3, 6]].count_nonzero() == 0


def test_token_weight_zero_is_as_if_the_token_were_absent() -> None:
    rollouts, log_probs = random_batch(11, [4, 4])
    rollouts.columns["w"][:] = 1.0
    rollouts.columns["u"][:] = torch.tensor([[1, 2, 0, 0], [1, 1, 3, 0.0]])
    for reduction in REDUCTIONS:
        whole, _ = cut_loss(stack_of(reduction=reduction), rollouts, log_probs, [range(2)])
        shorter = rollouts.select(torch.arange(2))
        shorter.mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
        shorter.columns["a"] = rollouts.columns["a"] * shorter.mask
        cut, _ = cut_loss(stack_of(reduction=reduction), shorter, log_probs * shorter.mask, [range(2)])
        torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_ratios_of_sample_weights_matter(reduction: str) -> None:
    rollouts, log_probs = random_batch(12)
    once, gradient = cut_loss(stack_of(reduction=reduction), rollouts, log_probs, [range(8)])
    rollouts.columns["w"] *= 4
    again, same = cut_loss(stack_of(reduction=reduction), rollouts, log_probs, [range(8)])
    torch.testing.assert_close(again, once)
    torch.testing.assert_close(same, gradient)


def test_weight_two_is_as_if_the_row_were_there_twice() -> None:
    rollouts, log_probs = random_batch(13)
    rollouts.columns["w"][:] = 1.0
    rollouts.columns["w"][3] = 2.0
    rows = torch.tensor([*range(8), 3])
    twice = rollouts.select(rows)
    twice.columns["w"] = torch.ones(9, 1)
    for reduction in REDUCTIONS:
        weighted, _ = cut_loss(stack_of(reduction=reduction), rollouts, log_probs, [range(8)])
        repeated, _ = cut_loss(stack_of(reduction=reduction), twice, log_probs[rows], [range(9)])
        torch.testing.assert_close(repeated, weighted)


def test_a_factor_on_the_advantages_does_not_enter_the_lower_sum() -> None:
    rollouts, log_probs = random_batch(14)
    once, _ = cut_loss(stack_of(samples=False, tokens=False), rollouts, log_probs, [range(8)])
    rollouts.columns["a"] *= 3
    again, _ = cut_loss(stack_of(samples=False, tokens=False), rollouts, log_probs, [range(8)])
    torch.testing.assert_close(again, 3 * once)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_over_zero_is_zero_and_there_is_no_optimiser_step(reduction: str) -> None:
    rollouts, log_probs = random_batch(15)
    rollouts.columns["w"][:] = 0.0
    stack = stack_of("ppo_clip", reduction, "k3")
    loss, gradient = cut_loss(stack, rollouts, log_probs, [range(3), range(3, 8)])
    assert float(loss) == 0 and gradient.count_nonzero() == 0
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    assert stack.mini_batch(columns).weightless


def test_no_tokens_count_as_no_weight() -> None:
    rollouts, log_probs = random_batch(16, [0, 0])
    stack = stack_of()
    assert stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts))).weightless
    assert float(cut_loss(stack, rollouts, log_probs, [range(2)])[0]) == 0


def test_a_mini_batch_is_weightless_on_all_ranks_or_on_none() -> None:
    rollouts, log_probs = random_batch(17)
    rollouts.columns["w"][:4] = 0.0
    rollouts.columns["w"][4:] = 1.0
    stack = stack_of()
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    shares = torch.arange(8).tensor_split(2)
    results = on_ranks(2, lambda rank, reducer: rank_loss(stack, columns, log_probs, shares[rank], reducer))
    assert [result[2] for result in results] == [False, False]


def test_an_auxiliary_loss_makes_a_step_of_a_mini_batch_without_weight() -> None:
    rollouts, _ = random_batch(18)
    rollouts.columns["w"][:] = 0.0
    trainer = Trainer("t", provides=frozenset({"current_entropy"}), extras=(EntropyBonus(coefficient=0.1),))
    stack = start([Given(), Weighing()], trainer=trainer)
    assert not stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts))).weightless


def test_a_row_without_tokens_counts_below_in_sequence_mean() -> None:
    rollouts, log_probs = random_batch(19, [2, 0])
    both, _ = cut_loss(
        stack_of(reduction="sequence_mean", samples=False, tokens=False), rollouts, log_probs, [range(2)]
    )
    one, _ = cut_loss(
        stack_of(reduction="sequence_mean", samples=False, tokens=False), rollouts.select(torch.tensor([0])),
        log_probs[:1], [range(1)],
    )  # fmt: skip
    torch.testing.assert_close(both, one / 2)


# losses per response


class PerResponse(Plugin):
    name = "per_response"

    @hookimpl
    def policy_loss(self, log_probs: Tensor) -> Tensor:
        return log_probs.sum(1, keepdim=True)


class PerResponseOfAdvantages(Plugin):
    name = "per_response_a"

    @hookimpl
    def policy_loss(self, log_probs: Tensor, advantages: Tensor) -> Tensor:
        return log_probs.sum(1, keepdim=True) * advantages[:, :1]


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "own"])
def test_a_loss_per_response_is_the_weighted_mean_whichever_reduction_is_chosen(reduction: str) -> None:
    class Own(Plugin):
        name = "own"

        @hookimpl
        def reduce_loss(self, loss: Tensor) -> Tensor:
            raise AssertionError("a loss per response is not reduced over tokens")

    rollouts, log_probs = random_batch(20)
    plugins = [PerResponse(), Weighing(tokens=False), *([Own()] if reduction == "own" else [])]
    stack = start(plugins, owners={} if reduction == "own" else {"reduce_loss": reduction})
    w = rollouts.columns["w"].double()
    wanted = (w * log_probs.sum(1, keepdim=True)).sum() / w.sum()
    for cut in ([range(8)], [range(3), range(3, 8)]):
        loss, gradient = cut_loss(stack, rollouts, log_probs, cut)
        torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient, (w / w.sum()).expand_as(log_probs), rtol=1e-10, atol=1e-10)


def test_a_loss_per_response_refuses_what_is_per_token() -> None:
    rollouts, log_probs = random_batch(21)
    with pytest.raises(HookError, match=r"per_response\.policy_loss: .*weights of their own"):
        cut_loss(start([PerResponse(), Weighing()]), rollouts, log_probs, [range(8)])
    with pytest.raises(HookError, match="advantages are per token"):
        cut_loss(start([PerResponseOfAdvantages(), Given()]), rollouts, log_probs, [range(8)])
    stack = start([PerResponse()])
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    mini = stack.mini_batch(columns | {"correction": torch.ones_like(log_probs)})
    with pytest.raises(HookError, match="corrects stale rollouts token by token"):
        mini.loss(log_probs)


def test_a_kl_penalty_per_response_is_refused_like_a_loss() -> None:
    class PerResponseKl(Plugin):
        name = "kl"

        @hookimpl
        def kl_penalty(self, log_probs: Tensor) -> Tensor:
            return log_probs.mean(1, keepdim=True)

    rollouts, log_probs = random_batch(21)
    with pytest.raises(HookError, match=r"kl\.kl_penalty"):
        cut_loss(start([PerResponseKl(), Weighing()]), rollouts, log_probs, [range(8)])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_token_per_response_is_a_loss_per_token(loss: str, reduction: str) -> None:
    """With T = 1 a loss per token and a loss per response have the same shape: token weights still count."""
    source = torch.Generator().manual_seed(22)
    rows = 5
    columns = {name: torch.rand(rows, 1, generator=source) for name in ("w", "u", "a")}
    rollouts = make_rollouts(
        torch.zeros(rows), lengths=[1, 1, 0, 1, 1], tokens=1, columns=columns,
        ref_log_probs=torch.zeros(rows, 1),
    )  # fmt: skip
    log_probs = -torch.rand(rows, 1, generator=source, dtype=torch.float64) * rollouts.mask
    result, gradient = cut_loss(stack_of(loss, reduction), rollouts, log_probs, [range(2), range(2, 5)])
    assert float(result) == pytest.approx(by_hand(rollouts, log_probs, loss, reduction, "none"), rel=1e-6)
    assert gradient.shape == (rows, 1)


# c, kinds, ratio, entropy, precision


def test_the_correction_multiplies_the_policy_loss_only() -> None:
    rollouts, log_probs = random_batch(23)
    c = torch.rand(log_probs.shape, generator=torch.Generator().manual_seed(5))
    flat = stack_of("reinforce", "token_mean", "k2", samples=False, tokens=False)
    mini = flat.mini_batch(flat.update_columns(rollouts, flat.credit(rollouts)) | {"correction": c})
    plain = flat.mini_batch(flat.update_columns(rollouts, flat.credit(rollouts)))
    part, whole = mini.loss(log_probs), plain.loss(log_probs)
    torch.testing.assert_close(part.kl, whole.kl)
    tokens = rollouts.mask.sum()
    torch.testing.assert_close(part.policy, (-rollouts.columns["a"] * log_probs * c * rollouts.mask).sum() / tokens)
    torch.testing.assert_close(part.total, part.policy + part.kl + part.auxiliary)


def test_the_correction_is_after_the_clip() -> None:
    rollouts, _ = random_batch(24, [1])
    rollouts.columns["a"][:] = 1.0
    far = rollouts.old_log_probs.double() + 2.0
    stack = stack_of(samples=False, tokens=False)
    columns = stack.update_columns(rollouts, stack.credit(rollouts)) | {"correction": torch.full((1, 2), 3.0)}
    assert float(stack.mini_batch(columns).loss(far * rollouts.mask).policy) == pytest.approx(-1.2 * 3)


def test_the_correction_is_one_on_rows_of_other_kinds_and_under_a_plugin_that_corrects_itself() -> None:
    class Corrects(Plugin):
        name = "corrects"
        corrects_staleness = True

    class Expert(Plugin):
        name = "expert"
        kinds = frozenset({"expert"})
        owner: bool = False

        @hookimpl(kind="expert", when=lambda self: self.owner)
        def policy_loss(self, log_probs: Tensor) -> Tensor:
            return -log_probs.sum(1, keepdim=True)

    rollouts, log_probs = random_batch(25, [2, 2], per_token=False)
    rollouts.kinds = ("policy", "expert")
    rollouts.kind[1] = 1
    c = torch.full(log_probs.shape, 5.0)

    def policy(*plugins: Plugin, correction: bool = True) -> Tensor:
        stack = start([*plugins, Given()])
        columns = stack.update_columns(rollouts, stack.credit(rollouts))
        columns |= {"correction": c} if correction else {}
        leaf = log_probs.clone().requires_grad_()
        stack.mini_batch(columns, kinds=rollouts.kinds).loss(leaf).total.backward()
        return leaf.grad

    plain, corrected = policy(correction=False), policy()
    torch.testing.assert_close(corrected[0], 5 * plain[0])
    torch.testing.assert_close(corrected[1], plain[1])
    torch.testing.assert_close(policy(Corrects()), plain)
    own = policy(Expert(owner=True))  # a loss per response of its own is not refused: its correction is 1
    torch.testing.assert_close(own[1, :2], torch.full((2,), -0.5, dtype=torch.float64))
    torch.testing.assert_close(own[0], corrected[0])


def test_rows_of_each_kind_and_their_weights_stand_in_the_same_sums() -> None:
    class Expert(Plugin):
        name = "expert"
        kinds = frozenset({"expert"})

        @hookimpl(kind="expert")
        def policy_loss(self, log_probs: Tensor, mask: Tensor) -> Tensor:
            return -log_probs * mask

    rollouts, log_probs = random_batch(26)
    rollouts.kinds = ("policy", "expert")
    rollouts.kind[[1, 4, 6]] = 1
    for reduction in REDUCTIONS:
        stack = start([Given(), Weighing(), Expert()], owners={"reduce_loss": reduction, "policy_loss": "reinforce"})
        whole, gradient = cut_loss(stack, rollouts, log_probs, [range(8)])
        as_advantage = rollouts.select(torch.arange(8))
        as_advantage.columns["a"] = rollouts.columns["a"].clone()
        as_advantage.columns["a"][[1, 4, 6]] = 1.0
        wanted = by_hand(as_advantage, log_probs, "reinforce", reduction, "none")
        assert float(whole) == pytest.approx(wanted, rel=1e-6)
        parts, same = cut_loss(stack, rollouts, log_probs, [[6, 0], [1, 2, 3], [4], [5, 7]])
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(same, gradient, rtol=1e-10, atol=1e-12)


def test_the_log_ratio_is_clamped_at_twenty() -> None:
    seen: list[Tensor] = []

    class Sees(Plugin):
        name = "sees"

        @hookimpl
        def policy_loss(self, ratio: Tensor) -> Tensor:
            seen.append(ratio)
            return ratio

    rollouts, log_probs = random_batch(27, [3])
    log_probs = torch.tensor([[500.0, -500.0, 0.5]], dtype=torch.float64)
    rollouts.old_log_probs[:] = 0
    loss, gradient = cut_loss(start([Sees()]), rollouts, log_probs, [range(1)])
    assert seen[0].tolist()[0] == pytest.approx([math.exp(20), math.exp(-20), math.exp(0.5)])
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_no_gradient_goes_through_adapted_advantages_and_bounds_only_through_log_probs_and_entropy() -> None:
    class Adapts(Plugin):
        name = "adapts"

        @hookimpl
        def adapt_advantages(self, advantages: Tensor, ratio: Tensor, entropy: Tensor) -> Tensor:
            assert not ratio.requires_grad and not entropy.requires_grad
            return advantages * ratio * entropy

        @hookimpl
        def clip_range(self, ratio: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
            assert not ratio.requires_grad and not entropy.requires_grad
            return torch.zeros_like(ratio), ratio + entropy

        @hookimpl
        def auxiliary_loss(self, entropy: Tensor, log_probs: Tensor, loss_weights: Tensor, batch: Any) -> Tensor:
            assert entropy.requires_grad and log_probs.requires_grad
            return (entropy * loss_weights).sum() / batch.token_weight

    rollouts, log_probs = random_batch(28)
    leaf, entropy = log_probs.clone().requires_grad_(), torch.rand_like(log_probs).requires_grad_()
    stack = start([Adapts(), Given()])
    mini = stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts)))
    mini.loss(leaf, entropy=entropy).total.backward()
    ratio = (log_probs - rollouts.old_log_probs).exp()
    tokens = rollouts.mask.sum()
    wanted = -rollouts.columns["a"] * ratio * entropy.detach() * ratio * rollouts.mask / tokens
    torch.testing.assert_close(leaf.grad, wanted)
    torch.testing.assert_close(entropy.grad, rollouts.mask / tokens.double())


def test_the_entropy_of_the_old_policy_never_stands_in_for_the_current_one() -> None:
    class Current(Plugin):
        name = "current"
        needs = (needs.column("entropy"),)

        @hookimpl
        def auxiliary_loss(self, entropy: Tensor) -> Tensor:
            return entropy.sum()

    rollouts, log_probs = random_batch(29)
    rollouts.entropy = torch.rand_like(log_probs)
    stack = start([Current(), Given()])
    mini = stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts)))
    with pytest.raises(Exception, match="'entropy' is not available"):
        mini.loss(log_probs)


def test_loss_arithmetic_is_float32() -> None:
    rollouts, log_probs = random_batch(30)
    stack = stack_of("ppo_clip", "token_mean", "k3")
    mini = stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts)))
    assert mini.loss(log_probs.bfloat16().requires_grad_()).total.dtype == torch.float32


def test_the_entropy_bonus_is_the_token_mean() -> None:
    rollouts, log_probs = random_batch(31)
    trainer = Trainer("t", provides=frozenset({"current_entropy"}), extras=(EntropyBonus(coefficient=0.1),))
    stack = start([Given(), Weighing()], trainer=trainer)
    mini = stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts)))
    entropy = torch.rand_like(log_probs)
    weights = (rollouts.columns["w"] * rollouts.columns["u"] * rollouts.mask).double()
    wanted = -0.1 * (entropy * weights).sum() / weights.sum()
    torch.testing.assert_close(mini.loss(log_probs, entropy=entropy).auxiliary, wanted)


# the critic


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_critics_loss_uses_the_sample_weights_and_the_mask_of_its_targets(clip: float | None) -> None:
    class Targets(Plugin):
        name = "targets"

        @hookimpl
        def value_targets(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            half = mask.clone()
            half[:, 0] = False
            return values + 1, half

    rollouts, _ = random_batch(32)
    rollouts.values = torch.rand(8, 5) * rollouts.mask
    stack = start([Targets(), Given(), Weighing(tokens=False)])
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    new = torch.rand(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    old, w = rollouts.values.double(), rollouts.columns["w"].double()
    error = (new - old - 1).square()
    if clip is not None:
        error = torch.maximum(error, (old + (new - old).clamp(-clip, clip) - old - 1).square())
    counted = rollouts.mask * (torch.arange(5) > 0) * w
    wanted = 0.5 * (error * counted).sum() / counted.sum()
    mini = stack.mini_batch(columns)
    for cut in ([range(8)], [range(3), range(3, 8)]):
        parts = [mini.value_loss(new[rows], torch.tensor(rows), clip) for rows in cut]
        torch.testing.assert_close(sum(parts), wanted)
    shares = torch.arange(8).tensor_split(2)

    def one_rank(rank: int, reducer: Reducer) -> Tensor:
        mine = {name: column[shares[rank]] for name, column in columns.items()}
        part: MiniBatch = stack.mini_batch(mine, {}, reduce=reducer, metrics=Metrics())
        return part.value_loss(new[shares[rank]].detach(), None, clip)

    torch.testing.assert_close(sum(on_ranks(2, one_rank)), wanted.detach())
