"""A step of the local trainer: which hooks run, in which order, and what they compute."""

import json
from collections import Counter

import pytest
import torch

from rlplugins import needs, ops
from rlplugins.hookspecs import HOOKS
from rlplugins.plugin import Plugin, hookimpl
from rlplugins.rollouts import Requests, concatenate
from rlplugins.stack import StackConfig
from rlplugins_local import train
from rlplugins_local.policy import token_log_probs

CALLS: list[str] = []


class Recorder(Plugin):
    """Implements every hook that the local trainer binds, and does what the built-in would."""

    name = "recorder"
    needs = (needs.column("level"), needs.column("entropy"), needs.column("components"), needs.column("rollout_log_probs"),
             needs.ENGINE, needs.RESPONSE_PREFIX, needs.VALIDATION_EVERY_STEP)  # fmt: skip

    def init_state(self, run):
        CALLS.clear()
        return {"steps": 0}

    @hookimpl
    def prompt_weights(self, prompts):
        CALLS.append("prompt_weights")
        return torch.ones(len(prompts))

    @hookimpl
    def choose_prompts(self, prompts, prompt_weights, count):
        CALLS.append("choose_prompts")
        assert len(prompt_weights) == len(prompts) == 8
        return torch.arange(count)

    @hookimpl
    def allocate_rollouts(self, prompts, budget):
        CALLS.append("allocate_rollouts")
        return torch.tensor([1, 2, budget - 4, 1])

    @hookimpl
    def rewrite_prompts(self, requests):
        CALLS.append("rewrite_prompts")
        requests.texts[0] = "9+9="
        requests.prefixes[1] = "12"
        requests.columns["asked"] = torch.arange(len(requests))
        return requests

    @hookimpl
    def sampling_params(self, sampling, requests):
        CALLS.append("sampling_params")
        sampling.numbers["ban"] = torch.full((len(requests),), 5)
        return sampling

    @hookimpl
    def process_logits(self, logits, numbers):
        if CALLS[-1] != "process_logits":
            CALLS.append("process_logits")
        return logits.scatter(1, numbers["ban"][:, None], -1e4) if numbers else logits

    @hookimpl
    def extend_rollouts(self, rollouts, engine):
        CALLS.append("extend_rollouts")
        assert rollouts["asked"].tolist() == list(range(16))
        drawn = rollouts.mask & ~rollouts.prefix
        assert not bool((rollouts.responses[drawn] == 5).any())
        assert rollouts.groups.tolist() == [0] + [1] * 2 + [2] * 12 + [3]
        assert rollouts.prefix[1].sum() == 2
        assert rollouts["level"].tolist() == rollouts.groups.tolist()
        log_probs = engine.log_probs(rollouts.prompts, rollouts.responses, rollouts.mask)
        assert log_probs.shape == rollouts.mask.shape
        return rollouts

    @hookimpl
    def filter_rollouts(self, scores, rollouts):
        CALLS.append("filter_rollouts")
        assert rollouts.old_log_probs is None
        return torch.ones_like(scores)

    @hookimpl
    def prepare_step(self, rollouts):
        CALLS.append("prepare_step")
        drawn = rollouts.rollout_log_probs[rollouts.mask & ~rollouts.prefix]
        assert bool((drawn < 0).all())
        assert rollouts.entropy.shape == rollouts.mask.shape

    @hookimpl
    def combine_rewards(self, scores, components):
        CALLS.append("combine_rewards")
        assert components.shape == (16, 2)
        return scores

    @hookimpl
    def shape_rewards(self, rewards):
        CALLS.append("shape_rewards")
        return rewards

    @hookimpl
    def segment_tokens(self, mask):
        CALLS.append("segment_tokens")
        return mask.long() - 1

    @hookimpl
    def assign_groups(self, groups):
        CALLS.append("assign_groups")
        return groups

    @hookimpl
    def baseline(self, rewards, groups):
        CALLS.append("baseline")
        return ops.group_mean(rewards, groups)

    @hookimpl
    def advantage_scale(self, rewards):
        CALLS.append("advantage_scale")
        return torch.ones_like(rewards)

    @hookimpl
    def compute_advantages(self, rewards, baseline, scale, segments):
        CALLS.append("compute_advantages")
        return (rewards - baseline) / scale

    @hookimpl
    def shape_advantages(self, advantages, entropy):
        CALLS.append("shape_advantages")
        return advantages + 0.1

    @hookimpl
    def value_targets(self, rewards, values, mask):
        CALLS.append("value_targets")
        return rewards * mask, mask

    @hookimpl
    def select_samples(self, advantages):
        CALLS.append("select_samples")
        return torch.ones_like(advantages)

    @hookimpl
    def select_tokens(self, mask):
        CALLS.append("select_tokens")
        return mask.float()

    @hookimpl
    def prepare_mini_batch(self, batch):
        CALLS.append("prepare_mini_batch")

    @hookimpl
    def forward(self, model, batch, temperature):
        CALLS.append("forward")
        tokens = batch.responses.shape[1]
        output = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
        made = token_log_probs(output.logits[:, -tokens - 1 : -1], batch, temperature)
        return made.log_probs, made.entropy

    @hookimpl
    def adapt_advantages(self, advantages, ratio, entropy):
        CALLS.append("adapt_advantages")
        return advantages

    @hookimpl
    def clip_range(self):
        CALLS.append("clip_range")
        return 0.8, 1.2

    @hookimpl
    def policy_loss(self, ratio, advantages, clip):
        CALLS.append("policy_loss")
        return -advantages * ratio.clamp(*clip)

    @hookimpl
    def kl_penalty(self, log_probs, ref_log_probs):
        CALLS.append("kl_penalty")
        return 0.1 * (log_probs - ref_log_probs)

    @hookimpl
    def reduce_loss(self, loss, loss_weights, batch):
        CALLS.append("reduce_loss")
        return (loss * loss_weights).sum() / batch.token_weight

    @hookimpl
    def auxiliary_loss(self, log_probs):
        CALLS.append("auxiliary_loss")
        return log_probs.sum() * 0

    @hookimpl
    def reference_policy(self):
        CALLS.append("reference_policy")
        return "current"

    @hookimpl
    def on_step_end(self, rollouts, engine):
        CALLS.append("on_step_end")
        self.state.steps += 1
        probe = engine.generate(Requests.of(self_prompts(rollouts, engine), torch.tensor([2])), score=False)
        assert len(probe) == 2

    @hookimpl
    def on_validation(self, metrics):
        CALLS.append("on_validation")
        assert 0 <= metrics["validation/reward"] <= 1


def self_prompts(rollouts, engine):
    """One prompt that no file has."""
    from rlplugins.testing import make_pool

    pool = make_pool(1)
    pool.texts = ["1+1="]
    return pool


def test_every_hook_runs_once_in_the_order_of_the_specification(trainer, config):
    settings = config("parts", validation_data=config().data, kl="none")
    mine = trainer(settings, Recorder())
    metrics = mine.step()
    first = list(dict.fromkeys(CALLS))
    bound = [name for name, hook in HOOKS.items() if hook.phase != "preferences"]
    assert set(first) == set(bound)
    free = {"forward", "reference_policy", "process_logits", "reduce_loss"}  # these serve several phases
    assert [name for name in first if name not in free] == [name for name in bound if name not in free]
    assert first[0] == "reference_policy"
    once = set(bound) - {"forward", "process_logits", "reduce_loss"}
    assert {name: count for name, count in Counter(CALLS).items() if name in once and count != 1} == {}
    assert mine.stack.plugins[0].state.steps == 1
    assert metrics["step"] == 1


def test_an_empty_stack_learns(trainer, config):
    settings = config("first_is_seven", batch_size=64, group_size=8, learning_rate=0.01, max_new_tokens=2)
    mine = trainer(settings)
    rewards = [mine.step()["reward"] for _ in range(25)]
    assert sum(rewards[:2]) / 2 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.9


def weights_after(mine, steps=1):
    for _ in range(steps):
        metrics = mine.step()
    return torch.cat([item.detach().flatten() for item in mine.policy.model.parameters()]), metrics


@pytest.mark.parametrize("size", [1, 3, 7])
def test_micro_batches_do_not_change_the_gradient(trainer, config, size):
    gradients = []
    for micro in (None, size):
        mine = trainer(config(micro_batch_size=micro, kl="k3", advantage="gae", entropy_coefficient=0.01))
        _, metrics = weights_after(mine)
        gradients.append(torch.cat([item.grad.flatten() for item in mine.policy.model.parameters()]))
        assert metrics["grad_norm"] > 0
    assert torch.allclose(*gradients, atol=1e-5)


def test_micro_batches_do_not_change_the_weights(trainer, config):
    settings = {"dtype": "float64", "mini_batches": 2, "epochs": 2, "temperature": 0.8}
    whole, first = weights_after(trainer(config(**settings)), 2)
    parts, second = weights_after(trainer(config(**settings, micro_batch_size=3)), 2)
    assert torch.allclose(whole, parts, atol=1e-5)
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-5)


def test_mini_batches_hold_whole_prompts_and_all_rows(trainer, config):
    mine = trainer(config(mini_batches=3, group_size=2))
    units = torch.tensor([5, 5, 7, 7, 7, 7, 2, 9, 9])
    for epoch in range(3):
        parts = list(mine.mini_batches(units, epoch))
        assert sorted(torch.cat(parts).tolist()) == list(range(9))
        owners = [set(units[part].tolist()) for part in parts]
        assert sum(map(len, owners)) == 4


def test_mini_batches_and_epochs_make_the_update_off_policy(trainer, config):
    mine = trainer(config(mini_batches=2, epochs=2))
    metrics = mine.step()
    assert mine.engine.version == 4
    assert metrics["ratio/max"] > 1
    on_policy = trainer(config()).step()
    assert on_policy["ratio"] == pytest.approx(1, abs=1e-5)
    assert on_policy["ratio/max"] == pytest.approx(1, abs=1e-4)


class Together(Plugin):
    """All rows of a group in one micro-batch."""

    name = "together"
    needs = (needs.together("group"), needs.MINI_BATCH_LOG_PROBS)

    @hookimpl
    def prepare_mini_batch(self, batch):
        batch.add_column("change", (batch.log_probs - batch["old_log_probs"]).abs())

    @hookimpl
    def auxiliary_loss(self, groups, log_probs, batch, log):
        for group in groups.unique():
            log("rows_of_a_group", float((groups == group).sum()))
        log("largest_change", batch["change"].max())
        return log_probs.sum() * 0


def test_rows_of_a_group_stay_in_one_micro_batch_and_the_mini_batch_knows_its_log_probs(trainer, config):
    mine = trainer(config(micro_batch_size=1, mini_batches=2), Together())
    metrics = mine.step()
    assert metrics["rlplugins/together/rows_of_a_group"] == 4
    assert metrics["rlplugins/together/largest_change"] > 0


class Merge(Plugin):
    """Groups that span two prompts each."""

    name = "merge"
    needs = (needs.together("group"),)

    @hookimpl
    def assign_groups(self, groups):
        return groups // 2


def test_groups_that_span_prompts_stay_together(trainer, config):
    mine = trainer(config(mini_batches=2), Merge())
    mine.step()
    mine.stack.begin_step(1, 2, 0)
    rollouts = mine.add_passes(mine.draw())
    units = mine.units(rollouts, mine.stack.credit(rollouts).groups)
    assert len(units.unique()) == 2
    assert Counter(units.tolist()).most_common(1)[0][1] == 8


def test_rewards_that_are_nan_leave_the_group(trainer, config):
    mine = trainer(config("some_nan"))
    for _ in range(3):
        metrics = mine.step()
        assert all(value == value for value in metrics.values())
    assert metrics["reward"] >= 0


def test_without_any_reward_the_update_is_skipped(trainer, config):
    mine = trainer(config("nothing"))
    before, metrics = weights_after(mine)
    assert metrics["update_skipped"] == 1
    assert "reward" not in metrics and "loss" not in metrics
    again, _ = weights_after(mine)
    assert torch.equal(before, again)
    assert mine.engine.version == 0


class Drop(Plugin):
    """Drops everything."""

    name = "drop"

    def init_state(self, run):
        return {"rows": 0}

    @hookimpl
    def filter_rollouts(self, scores):
        return torch.zeros_like(scores)

    @hookimpl
    def on_step_end(self, rollouts, weights):
        self.state.rows += len(rollouts)
        assert bool((weights == 0).all())


def test_a_step_of_which_everything_is_dropped_says_so_and_goes_on(trainer, config):
    mine = trainer(config(), Drop())
    for _ in range(2):
        metrics = mine.step()
    assert metrics["update_skipped"] == 1
    assert metrics["rollouts/kept"] == 0
    assert mine.stack.plugins[0].state.rows == 32
    assert mine.pool.table["visits"].sum() > 0


class Expert(Plugin):
    """Adds rows of its own kind."""

    name = "expert"
    kinds = frozenset({"expert"})

    @hookimpl
    def extend_rollouts(self, rollouts, engine):
        added = rollouts.select(torch.arange(2))
        added.kinds, added.kind = ("policy", "expert"), torch.ones(2, dtype=torch.int8)
        added.groups = torch.full((2,), -1)
        return concatenate([rollouts, added])

    @hookimpl(kind="expert")
    def policy_loss(self, log_probs, log):
        log("expert_rows", float(len(log_probs)))
        return -log_probs


@pytest.mark.parametrize("size", [None, 5])
def test_rows_of_another_kind_have_a_loss_of_their_own(trainer, config, size):
    mine = trainer(config(micro_batch_size=size), Expert())
    metrics = mine.step()
    assert metrics["rlplugins/expert/expert_rows"] > 0
    assert metrics["policy_loss"] > 0
    assert metrics["group_size"] == 4


def test_values_are_learned_where_the_advantages_need_them(trainer, config):
    mine = trainer(config("always", advantage="gae", value_learning_rate=0.1, learning_rate=0.0))
    losses = [mine.step()["value_loss"] for _ in range(20)]
    assert losses[0] > 0.3
    assert losses[-1] < losses[0] / 4
    assert trainer(config()).policy.value_head is None


def test_the_critic_does_not_move_the_policy(trainer, config):
    with_critic = trainer(config("nothing", advantage="gae"))
    before = torch.cat([item.detach().flatten() for item in with_critic.policy.model.parameters()])
    after, _ = weights_after(with_critic, 1)
    assert torch.equal(before, after)


def test_a_kl_penalty_holds_the_policy_near_the_reference(trainer, config):
    kls = []
    for coefficient in (0.0, 20.0):
        settings = config("first_is_seven", kl="k3", kl_coefficient=coefficient, learning_rate=3e-3)
        mine = trainer(settings)
        kls.append([mine.step()["kl"] for _ in range(12)])
    assert kls[0][0] == pytest.approx(0, abs=1e-5)
    assert kls[0][-1] > 2 * kls[1][-1] > 0
    assert trainer(config()).policy.reference is None


def test_every_step_has_the_same_budget_whatever_the_group_size(trainer, config):
    for size in (1, 2, 8):
        mine = trainer(config(group_size=size), "reinforce_plus_plus")
        metrics = mine.step()
        assert metrics["group_size"] == size
        assert metrics["tokens"] >= 16


def test_a_mix_of_two_methods_trains(config):
    stack = StackConfig(owners={"compute_advantages": {"grpo": 0.5, "rloo": 0.5}})
    metrics = train(config("first_is_seven"), stack, progress=False)
    assert metrics["step"] == 2
    path = config().output / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_batched_reward_function_gives_what_the_single_one_gives(trainer, config):
    single, batched = (trainer(config(reward)).step() for reward in ("sevens", "batched"))
    assert single == batched


def test_components_have_the_order_of_the_first_result(trainer, config):
    mine = trainer(config("parts"))
    mine.stack.begin_step(0, 2, 0)
    rollouts = mine.draw()
    assert rollouts.component_names == ("length", "first")
    assert rollouts.components.shape == (16, 2)
    texts = mine.engine.texts(rollouts)
    assert rollouts.components[:, 0].tolist() == [len(text) for text in texts]
