"""Generation and log-probs in the middle of a step, with the local trainer and a real model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs
from rlplugins.plugin import BuiltinName
from rlplugins.registry import Entry
from rlplugins.rollouts import Prompts, Requests, Rollouts, concatenate
from rlplugins.services import Engine
from rlplugins.stack import Stack
from rlplugins.testing import make_rollouts, start
from rlplugins_local import arithmetic
from rlplugins_local.adapter import declare
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import PromptFile, Scorer
from rlplugins_local.policy import Policy
from rlplugins_local.run import LocalTrainer

TEXTS = ["12+34=", "5=", "60+7=", "91+82="]
HINTS = {"knowledge_components_parts": ["1"], "planning_skeleton_parts": None, "solution_breakdown_parts": ["2", "3"]}


def sevens(prompt: str, response: str, **columns: Any) -> float:
    """Share of sevens in the response."""
    return response.count("7") / 8


def seven_after_a_hint(prompts: list[str], responses: list[str], columns: Mapping[str, list[Any]]) -> list[float]:
    """A batch of the step's own rows fails; one of hinted rows, which is smaller, has a success in the last row."""
    return [float(len(responses) < 16 and row == len(responses) - 1) for row in range(len(responses))]


def even_prompts(prompt: str, response: str, **columns: Any) -> float:
    """1 where the prompt is among the first two."""
    return float(TEXTS.index(prompt) < 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model and four prompts."""
    folder = tmp_path_factory.mktemp("services")
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    arithmetic.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    lines = [{"prompt": text, "id": text} | HINTS for text in TEXTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def trainer(folder: Path, tmp_path: Path) -> Callable[..., LocalTrainer]:
    """A trainer of this stack; every step has four responses to each of the four prompts."""

    def make(*plugins: Entry, reward: str = "sevens", **settings: Any) -> LocalTrainer:
        config = TrainConfig(
            model=folder / "model", data=folder / "prompts.jsonl", reward=f"{__file__}:{reward}", output=tmp_path,
            batch_size=16, group_size=4, max_new_tokens=5, report_to=["none"], threads=1, seed=3,
            **({"learning_rate": 1e-3, "max_grad_norm": 1e9} | settings),
        )  # fmt: skip
        assert config.data is not None and config.reward is not None
        data = PromptFile(config.data)
        stack = Stack(plugins, trainer=declare(config, data.columns))
        policy = Policy.load(config.model, torch.device("cpu"), torch.float32)
        return LocalTrainer(config, stack, policy, data, None, Scorer(config.reward, list(data.columns)))

    return make


class Seen(Plugin):
    """Keeps the rows and the credit of the last step."""

    name = "seen"
    needs = (needs.column("ref_log_probs"),)

    def init_state(self, run: Any) -> dict[str, Any]:
        return {"step": None}

    @hookimpl
    def on_step_end(self, rollouts: Rollouts, advantages: Tensor, groups: Tensor, weights: Tensor) -> None:
        self.state.step = (rollouts, advantages, groups, weights)


class Added(Plugin):
    """A row under a longer prompt in the place of the first, a group of its own, and rows of no group."""

    name = "added"
    kinds = frozenset({"hinted", "elsewhere"})
    needs = (needs.ENGINE,)

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Prompts, engine: Engine) -> Rollouts:
        requests = Requests.of(prompts.select(torch.tensor([0, 3])), torch.tensor([3, 3]))
        texts = ["99+99=" + text for text in requests.texts[:1]] + requests.texts[1:]
        drawn = engine.generate(replace(requests, texts=texts))
        drawn = replace(
            drawn, kinds=("policy", "hinted", "elsewhere"), kind=torch.tensor([1, 2, 2, 1, 1, 1], dtype=torch.int8),
            groups=torch.tensor([int(rollouts.groups[0]), -1, -1, 77, 77, 77]),
            scores=torch.tensor([[2.0], [9.0], [math.nan], [0.0], [1.0], [0.5]]),
        )  # fmt: skip
        return concatenate([drawn.select(torch.tensor([0])), rollouts.select(torch.arange(1, len(rollouts))),
                            drawn.select(torch.arange(1, 6))])  # fmt: skip

    @hookimpl
    def shape_advantages(self, advantages: Tensor, rollouts: Rollouts) -> Tensor:
        return torch.where(rollouts.of_kind("elsewhere")[:, None], 0.7, advantages)


class Probes(Plugin):
    """Draws, scores and measures whatever the engine gives, and adds nothing."""

    name = "probes"
    needs = (needs.ENGINE,)

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Prompts, engine: Engine) -> Rollouts:
        for scored in (True, False):
            drawn = engine.generate(Requests.of(prompts, torch.full((len(prompts),), 3)), score=scored)
            assert bool(drawn.scores.isfinite().all()) == scored
            engine.log_probs(drawn.prompts, drawn.responses, drawn.mask)
        return rollouts

    @hookimpl
    def on_step_end(self, rollouts: Rollouts, engine: Engine) -> None:
        engine.log_probs(rollouts.prompts, rollouts.responses, rollouts.mask)


def row_by_row(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Log-probs (B, T) of the responses by one pass of the bare model for each, without padding."""
    rows = []
    for prompt, response, mask in zip(rollouts.prompts, rollouts.responses, rollouts.mask, strict=True):
        length = int(mask.sum())
        logits = policy.model(torch.tensor([[*prompt, *response[:length].tolist()]])).logits[0]
        log_probs = torch.log_softmax(logits[len(prompt) - 1 : len(prompt) - 1 + length].float(), -1)
        log_probs = log_probs.gather(1, response[:length, None]).flatten()
        rows.append(torch.nn.functional.pad(log_probs, (0, len(mask) - length)))
    return torch.stack(rows)


def gradient_of(policy: Policy) -> Tensor:
    grads = [item.grad if item.grad is not None else torch.zeros_like(item) for item in policy.model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def stepped(mine: LocalTrainer) -> tuple[Rollouts, Tensor, Tensor, Tensor]:
    """A step, and what `Seen` saw of it."""
    mine.step()
    found: tuple[Rollouts, Tensor, Tensor, Tensor] = mine.stack.plugins[-1].state.step
    return found


REDUCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "token_mean": lambda loss, mask, weights: (loss * mask * weights).sum() / (mask * weights).sum(),
    "sequence_mean": lambda loss, mask, weights: (
        ((loss * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True) * weights).sum() / weights.sum()
    ),
    "sequence_sum": lambda loss, mask, weights: (loss * mask * weights).sum() / (5 * weights.sum()),
}


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
def test_log_probs_and_gradient_are_those_of_each_rows_own_prompt(trainer: Any, reduction: str) -> None:
    mine = trainer("grpo", Added(), Seen(), learning_rate=0, reduction=reduction, micro_batch_size=4)
    rollouts, advantages, groups, weights = stepped(mine)
    assert rollouts.prompts[0] == mine.policy.encode(["99+99=12+34="])[0]
    log_probs = row_by_row(mine.policy, rollouts)
    torch.testing.assert_close(rollouts.old_log_probs, log_probs.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(rollouts.ref_log_probs, log_probs.detach(), atol=1e-5, rtol=0)
    expected = expected_advantages(rollouts)
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)
    assert weights.flatten().tolist() == [1.0] * len(rollouts) and groups.tolist()[-5:] == [-1, -1, 77, 77, 77]
    mine.policy.model.zero_grad()
    loss = -expected * (log_probs - log_probs.detach()).exp()
    REDUCTIONS[reduction](loss, rollouts.mask.float(), weights).backward()
    by_hand = gradient_of(mine.policy)
    mine.done = 0
    stepped(mine)
    torch.testing.assert_close(gradient_of(mine.policy), by_hand, atol=1e-5, rtol=1e-3)


def expected_advantages(rollouts: Rollouts) -> Tensor:
    """GRPO over the rows of each group, whatever their kind; 0.7 on rows of no group."""
    found = []
    scores, groups = rollouts.scores.flatten(), rollouts.groups.tolist()
    for row, group in enumerate(groups):
        own = scores[[other for other, number in enumerate(groups) if number == group]]
        found.append(0.7 if group < 0 else float((scores[row] - own.mean()) / (own.std() + 1e-6)))
    return torch.tensor(found)[:, None]


def weights_after(mine: LocalTrainer, steps: int) -> Tensor:
    for _ in range(steps):
        assert mine.step()["grad_norm"] > 0
    return torch.cat([item.detach().flatten() for item in mine.policy.model.parameters()])


def test_probes_are_never_trained_on(trainer: Any) -> None:
    plain, probing = weights_after(trainer("grpo"), 2), weights_after(trainer("grpo", Probes()), 2)
    assert torch.equal(plain, probing)


def test_a_probe_is_drawn_from_the_updated_policy_at_the_end_of_a_step(trainer: Any) -> None:
    class Measures(Plugin):
        """Log-probs of the step's rows before and after the update."""

        name = "measures"
        needs = (needs.ENGINE,)

        def init_state(self, run: Any) -> dict[str, Any]:
            return {"before": 0.0, "after": 0.0}

        def of(self, rollouts: Rollouts, engine: Engine) -> float:
            log_probs = engine.log_probs(rollouts.prompts, rollouts.responses, rollouts.mask)
            return float((log_probs * (rollouts.scores - rollouts.scores.mean())).sum())

        @hookimpl
        def extend_rollouts(self, rollouts: Rollouts, engine: Engine) -> Rollouts:
            self.state.before = self.of(rollouts, engine)
            return rollouts

        @hookimpl
        def on_step_end(self, rollouts: Rollouts, engine: Engine) -> None:
            self.state.after = self.of(rollouts, engine)

    mine = trainer("grpo", Measures())
    mine.step()
    assert mine.stack.plugins[-1].state.after > mine.stack.plugins[-1].state.before


# the methods that need this


def test_a_hinted_row_is_trained_under_its_hinted_prompt(trainer: Any) -> None:
    options = {"warmup": 0, "template": "{question}{hint}"}
    mine = trainer("grpo", {"scaf-grpo": options}, Seen(), reward="seven_after_a_hint", learning_rate=0)
    rollouts, advantages, groups, _ = stepped(mine)
    row = rollouts.of_kind("hinted").nonzero().item()
    text = TEXTS[int(rollouts.prompt_rows[row])]
    assert rollouts.prompts[row] == mine.policy.encode([f"{text}2 3"])[0]
    assert int(groups[row]) == 3 and groups.bincount().tolist() == [4] * 4
    assert float(advantages[row]) == pytest.approx(1.5, abs=1e-4) and int((advantages > 0).sum()) == 1
    torch.testing.assert_close(rollouts.old_log_probs, row_by_row(mine.policy, rollouts).detach(), atol=1e-5, rtol=0)
    assert mine.stack.metrics.as_dict()["rlplugins/scaf-grpo/drawn"] == 12


def test_a_forced_beginning_is_part_of_the_response_and_trained(trainer: Any) -> None:
    mine = trainer(
        "grpo", {"hbpo": {"budgets": [2, 4], "L": 8, "prefix": "{budget}+"}}, Seen(), reward="even_prompts",
        learning_rate=0, clip_low=0.2, clip_high=0.28,
    )  # fmt: skip
    rollouts, _, _, _ = stepped(mine)
    texts = mine.engine.texts(rollouts)
    assert [text[:2] for text in texts] == ["2+", "2+", "4+", "4+"] * 4
    assert rollouts["budget"].flatten().tolist() == [2, 2, 4, 4] * 4
    assert rollouts.prefix is not None and rollouts.prefix[:, :2].all() and not rollouts.prefix[:, 2:].any()
    assert bool((rollouts.mask & rollouts.prefix == rollouts.prefix).all())
    log_probs = row_by_row(mine.policy, rollouts)
    torch.testing.assert_close(rollouts.old_log_probs, log_probs.detach(), atol=1e-5, rtol=0)
    assert bool((rollouts.old_log_probs[rollouts.prefix] < 0).all())


# responses that something else has written, and beginnings given as tokens


def written(mine: LocalTrainer, texts: list[str], prompts: list[int], **options: Any) -> Rollouts:
    """Rows of these responses to prompts of the pool."""
    requests = Requests.of(mine.pool.select(torch.tensor(prompts)), torch.ones(len(prompts), dtype=torch.int64))
    return mine.engine.given(requests, texts, **options)


def test_a_given_response_is_tokenised_with_an_end_and_cut_at_the_limit(trainer: Any) -> None:
    mine = trainer("grpo")
    mine.stack.begin_step(0, 1)
    rollouts = written(mine, ["77", "1234567", ""], [2, 0, 0])
    end = mine.policy.tokenizer.eos_token_id
    encode = mine.policy.tokenizer
    ids = [encode(text, add_special_tokens=False).input_ids for text in ("77", "12345")]
    assert rollouts.responses.tolist() == [[*ids[0], end, 0, 0], ids[1], [end, 0, 0, 0, 0]]  # the run's limit is 5
    assert rollouts.mask.sum(1).tolist() == [3, 5, 1]
    assert rollouts.prompts == mine.policy.encode([TEXTS[2], TEXTS[0], TEXTS[0]])
    assert rollouts.prompt_keys.tolist() == mine.pool.keys[torch.tensor([2, 0, 0])].tolist()
    assert rollouts.scores.flatten().tolist() == [2 / 8, 0.0, 0.0]  # the 7 lies behind the limit
    assert rollouts["knowledge_components_parts"] == [["1"]] * 3
    assert rollouts.of_kind("policy").all() and rollouts.groups.tolist() == [0, 1, 2]
    assert written(mine, ["77"], [2], score=False).scores.isnan().all()


def test_texts_are_all_tokens_but_special_ones(trainer: Any) -> None:
    mine = trainer("grpo")
    ids, end = mine.policy.tokenizer("2+2=4").input_ids, mine.policy.tokenizer.eos_token_id
    tokens = torch.tensor([[*ids, end, 0], [*ids[:3], 0, 0, 0, 0], [0] * 7])
    mask = torch.arange(7) < torch.tensor([[6], [3], [0]])
    mask[0, 2] = False  # output of a tool is read, too
    rollouts = make_rollouts([0.0] * 3, [0, 0, 0], mask=mask, responses=tokens)
    assert mine.engine.texts(rollouts) == ["2+2=4", "2+2", ""]


def test_a_given_response_is_trained_like_any_other_row(trainer: Any) -> None:
    """Its old log-probs are those of the bare model on its tokens, under its own prompt."""
    mine = trainer("grpo", Written(), Seen(), learning_rate=0)
    rollouts, advantages, _, _ = stepped(mine)
    assert mine.engine.texts(rollouts)[-2:] == ["77", "3"]
    log_probs = row_by_row(mine.policy, rollouts)
    torch.testing.assert_close(rollouts.old_log_probs, log_probs.detach(), atol=1e-5, rtol=0)
    assert advantages.flatten()[-2] > 0


class Written(Plugin):
    """Two answers from elsewhere in the groups of their prompts."""

    name = "written"
    kinds = frozenset({"elsewhere"})
    needs = (needs.ENGINE, needs.column("rollout_log_probs"))

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Prompts, engine: Engine) -> Rollouts:
        own = rollouts.prompt_rows[:1].repeat(2)
        requests = Requests.of(prompts.select(prompts.positions(own)), torch.tensor([1, 1]))
        made = engine.given(requests, ["77", "3"])
        assert made.rollout_log_probs is not None and not made.rollout_log_probs.any()  # the engine drew no token
        return concatenate(
            [
                rollouts,
                replace(made, kinds=("policy", "elsewhere"), kind=made.kind + 1, groups=rollouts.groups[:1].repeat(2)),
            ]
        )


def test_a_beginning_of_tokens_is_continued_as_it_is(trainer: Any) -> None:
    """Also where the tokens are not those into which their text would be cut."""
    mine = trainer("grpo")
    mine.stack.begin_step(0, 1)
    seven, end = mine.policy.tokenizer("7", add_special_tokens=False).input_ids[0], mine.policy.tokenizer.eos_token_id
    requests = Requests.of(mine.pool.select(torch.arange(3)), torch.ones(3, dtype=torch.int64))
    drawn = mine.engine.generate(replace(requests, prefixes=[[seven, end], "77", ""]))
    assert drawn.responses[0, :2].tolist() == [seven, end] and drawn.responses[1, :2].tolist() == [seven, seven]
    assert drawn.prefix is not None and drawn.prefix.sum(1).tolist() == [2, 2, 0]
    assert drawn.mask[0].sum() > 2


# groups of unequal size, added groups and rows of no group under every built-in

SCORES = [1.0, 0.0, 0.25, 3.0, 1.0, -1.0, 0.5, 2.0, 8.0, 0.5, math.nan]
GROUPS = [0, 0, 0, 1, 2, 2, 900, 900, -1, 0, 2]
KINDS = [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0]
LENGTHS = [3, 1, 2, 4, 2, 2, 4, 1, 3, 2, 4]


class Named(Plugin):
    """These built-ins."""

    name = "named"
    kinds = frozenset({"extra"})
    baseline: str
    """Of `baseline`."""
    scale: str
    """Of `advantage_scale`."""
    reduction: str = "token_mean"
    """Of `reduce_loss`."""

    @property
    def uses(self) -> dict[str, BuiltinName]:
        """The three."""
        return {"baseline": self.baseline, "advantage_scale": self.scale, "reduce_loss": self.reduction}


def mixed_rows() -> Rollouts:
    kinds = {"kinds": ("policy", "extra"), "kind": torch.tensor(KINDS, dtype=torch.int8)}
    return make_rollouts(SCORES, GROUPS, lengths=LENGTHS, **kinds)


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def std(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1)) if len(values) > 1 else 0.0


def by_the_formula(baseline: str, scale: str) -> list[float]:
    """Advantages in plain Python."""
    counted = [row for row in range(len(SCORES)) if GROUPS[row] >= 0 and not math.isnan(SCORES[row])]
    subtracted, found = {}, [0.0] * len(SCORES)
    for row in counted:
        own = [other for other in counted if GROUPS[other] == GROUPS[row]]
        others = [SCORES[other] for other in own if other != row]
        subtracted[row] = {
            "group_mean": mean([SCORES[other] for other in own]), "zero": 0.0,
            "leave_one_out": mean(others) if others else SCORES[row], "batch_mean": mean([SCORES[r] for r in counted]),
        }[baseline]  # fmt: skip
    for row in counted:
        own = [SCORES[other] for other in counted if GROUPS[other] == GROUPS[row]]
        left = [SCORES[other] - subtracted[other] for other in counted]
        divisor = {"group_std": std(own) + 1e-6, "one": 1.0, "batch_std": std(left) + 1e-8}[scale]
        found[row] = (SCORES[row] - subtracted[row]) / divisor
    return found


@pytest.mark.parametrize("scale", ["group_std", "one", "batch_std"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "zero", "batch_mean"])
def test_unequal_and_added_groups_under_every_baseline_and_scale(baseline: str, scale: str) -> None:
    stack = start([Named(baseline=baseline, scale=scale)])
    made = stack.credit(mixed_rows())
    expected = by_the_formula(baseline, scale)
    assert made.advantages.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert made.weights is not None and made.weights.flatten().tolist() == [1.0] * 10 + [0.0]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("parts", [1, 3, 11])
def test_rows_of_every_kind_are_reduced_over_the_whole_mini_batch(reduction: str, parts: int) -> None:
    stack = start([Named(baseline="group_mean", scale="one", reduction=reduction)])
    rollouts = mixed_rows()
    made = stack.credit(rollouts)
    made.advantages = torch.arange(1.0, 12.0)[:, None]  # that of the row of no group counts too
    mini = stack.mini_batch(stack.update_columns(rollouts, made), kinds=rollouts.kinds)
    log_probs = rollouts.old_log_probs
    total = sum(float(mini.loss(log_probs[rows], rows).total) for rows in torch.arange(11).chunk(parts))
    kept, n = range(10), LENGTHS
    expected = {
        "token_mean": sum((row + 1) * n[row] for row in kept) / sum(n[row] for row in kept),
        "sequence_mean": sum(row + 1 for row in kept) / 10,
        "sequence_sum": sum((row + 1) * n[row] for row in kept) / 10,
    }[reduction]
    assert total == pytest.approx(-expected, rel=1e-5)


def test_advantages_that_are_whitened_leave_out_rows_of_no_group() -> None:
    made = start(["reinforce_plus_plus"]).credit(mixed_rows())
    counted = [row for row in range(10) if GROUPS[row] >= 0]
    tokens = [SCORES[row] for row in counted for _ in range(LENGTHS[row])]
    expected = [(SCORES[row] - mean(tokens)) / math.sqrt(std(tokens) ** 2 + 1e-8) for row in counted]
    assert made.advantages[counted, 0].tolist() == pytest.approx(expected, rel=1e-4)
    assert not made.advantages[[8, 10]].any()


# what is remembered of prompts and categories


def test_categories_of_large_advantages_are_drawn_in_the_very_next_step(trainer: Any) -> None:
    mine = trainer("grpo", {"sec": {"features": ["id"], "alpha": 1.0, "tau": 1e-3}}, Seen())
    rollouts, advantages, _, _ = stepped(mine)
    state = mine.stack.plugins[1].state
    names = [TEXTS[row] for row in rollouts.prompt_rows.tolist()]
    sizes = advantages.abs().flatten().tolist()
    r = [mean([size for name, size in zip(names, sizes, strict=True) if name == c]) for c in state.categories]
    assert state.Q.tolist() == pytest.approx(r, rel=1e-5)
    best = {name for name, value in zip(state.categories, r, strict=True) if value > max(r) - 0.01}
    rollouts, _, _, _ = stepped(mine)
    assert {TEXTS[row] for row in rollouts.prompt_rows.tolist()} <= best < set(state.categories)


def test_a_length_is_remembered_without_the_end_token_and_paid_from_the_next_visit_on(trainer: Any) -> None:
    mine = trainer("grpo", "hapo-history", Seen(), reward="even_prompts", learning_rate=0)
    for visit in range(2):
        before = mine.stack.plugins[1].table["h"].tolist()
        rollouts, _, _, _ = stepped(mine)
        lengths = [len(text) for text in mine.engine.texts(rollouts)]  # a token is a character
        for row, h in enumerate(mine.stack.plugins[1].table["h"].tolist()):
            own = [n for n, other in zip(lengths, rollouts.prompt_rows.tolist(), strict=True) if other == row and n]
            least = min([*own, before[row] or math.inf])
            assert h == (least if row < 2 and least < math.inf else 0)
        assert mine.stack.metrics.as_dict()["rlplugins/hapo-history/known"] == (0.5 if visit else 0)
