"""What OpenRLHF's flags mean for a stack, the launcher, and the errors that come before anything starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rlplugins import Plugin, hookimpl, logits, needs
from rlplugins.errors import ConfigurationError, StackError, StateError
from rlplugins.registry import make_builtin
from rlplugins.rollouts import Requests, Sampling
from rlplugins.stack import Stack, StackConfig
from rlplugins.steps import Run
from rlplugins.testing import make_pool
from rlplugins_openrlhf import install, launch, rollout, settings, study, worker
from rlplugins_openrlhf.adapter import adapter

FLAGS = {
    "rollout.batch_size": 4, "rollout.n_samples_per_prompt": 4, "rollout.temperature": 1.0, "rollout.top_p": 1.0,
    "actor.num_nodes": 1, "actor.num_gpus_per_node": 2, "actor.eps_clip": 0.2, "algo.advantage.estimator": "group_norm",
    "algo.kl.init_coef": 0.0, "reward.remote_url": ["reward.py"],
}  # fmt: skip

KL = {"algo__kl__init_coef": 1e-9, "algo__kl__use_loss": True}


def flags(**changes: Any) -> SimpleNamespace:
    """OpenRLHF's flags, nested; dots are written as two underscores."""
    given = FLAGS | {name.replace("__", "."): value for name, value in changes.items()}
    nested: dict[str, Any] = {}
    for name, value in given.items():
        *parents, last = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return as_namespace(nested)


def as_namespace(node: Mapping[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{name: as_namespace(v) if isinstance(v, Mapping) else v for name, v in node.items()})


def built(args: Any, *plugins: Any, **lines: Any) -> Stack:
    return settings.build_stack(args, StackConfig(plugins=list(plugins), **lines))


@pytest.mark.parametrize(
    ("changes", "hook", "meant"),
    [
        ({}, "baseline", "group_mean"),
        ({}, "advantage_scale", {"group_std": {"eps": 1e-9}}),
        ({"algo__advantage__estimator": "dr_grpo"}, "advantage_scale", "one"),
        ({"algo__advantage__estimator": "rloo"}, "baseline", "leave_one_out"),
        ({"algo__advantage__estimator": "flash_reinforce"}, "baseline", "batch_mean"),
        ({"algo__advantage__estimator": "gae", "algo__advantage__lambd": 0.9}, "compute_advantages",
         {"gae": {"gamma": 1.0, "lam": 0.9}}),
        ({}, "clip_range", {"fixed": {"low": 0.2, "high": 0.2}}),
        ({"actor__eps_clip_low_high": (0.2, 0.3)}, "clip_range", {"fixed": {"low": 0.2, "high": 0.3}}),
        ({"actor__dual_clip": 3}, "policy_loss", {"ppo_clip": {"dual_clip": 3.0}}),
        ({"actor__policy_loss_type": "gspo"}, "reduce_loss", "sequence_mean"),
        ({"actor__loss_agg_mode": "seq-mean-token-mean"}, "reduce_loss", "sequence_mean"),
        ({}, "reduce_loss", "token_mean"),
        ({}, "kl_penalty", "none"),
        ({"algo__kl__init_coef": 0.1, "algo__kl__use_loss": True, "algo__kl__estimator": "k3"}, "kl_penalty",
         {"k3": {"coefficient": 0.1}}),
    ],
)  # fmt: skip
def test_a_flag_means_a_builtin(changes: dict[str, Any], hook: str, meant: Any) -> None:
    found, missing = settings.builtins(flags(**changes))
    assert found[hook] == meant
    assert not missing
    assert make_builtin(hook, meant)


@pytest.mark.parametrize("estimator", ["reinforce_baseline"])
def test_an_estimator_without_a_counterpart_is_left_to_openrlhf_or_refused(estimator: str) -> None:
    args = flags(algo__advantage__estimator=estimator)
    assert not settings.owns_credit(built(args, "bapo"))  # no plugin touches the credit phase
    assert built(args, "bnpo")  # a plugin owns what the flag would mean
    with pytest.raises(ConfigurationError, match="no counterpart") as refused:
        built(args, "knapsack")  # unequal groups: the stack computes the advantages itself
    assert f"--algo.advantage.estimator {estimator}" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "plugin", "reason"),
    [
        ({"algo__kl__init_coef": 0.1}, "bnpo", "add --algo.kl.use_loss"),
        ({"reward__clip_range": (-1, 1)}, "bnpo", "--reward.clip_range"),
        ({"algo__advantage__is_correction_level": "token"}, "bapo", "is_correction"),
        ({"algo__kl__target": 0.1}, "bapo", "--algo.kl.target"),
        ({"train__dynamic_batch_enable": True}, "bapo", "--train.dynamic_batch_enable"),
        ({"algo__dynamic_filtering_enable": True}, "knapsack", "--algo.dynamic_filtering_enable"),
        ({"train__async_enable": True}, "knapsack", "keeps a state"),
        ({"data__max_images_per_prompt": 2}, "knapsack", "images"),
    ],
)
def test_a_flag_that_cannot_be_combined_is_refused_by_name(changes: dict[str, Any], plugin: str, reason: str) -> None:
    with pytest.raises((ConfigurationError, StackError), match=reason):
        built(flags(**changes), plugin)
    built(flags(), plugin)


def test_a_stack_that_touches_another_part_leaves_the_flag_alone() -> None:
    assert built(flags(algo__advantage__is_correction_level="token"), "bnpo")
    assert built(flags(reward__clip_range=(-1, 1)), "bapo")
    assert built(flags(train__async_enable=True), "bnpo", "bapo")


def test_a_reward_model_scores_after_the_hooks_of_the_rollouts() -> None:
    class Filter(Plugin):
        name = "filter"

        @hookimpl
        def filter_rollouts(self, scores: torch.Tensor) -> torch.Tensor:
            return torch.ones_like(scores)

    stack = Stack([Filter()])
    assert any("reward model" in line for line in settings.refusals(flags(reward__remote_url=None), stack))
    assert settings.refusals(flags(), stack) == []


def test_group_sizes_are_checked_against_the_flags() -> None:
    with pytest.raises(StackError, match="n_samples_per_prompt 1"):
        built(flags(), "spo")
    with pytest.raises(StackError, match="n_samples_per_prompt 2"):
        built(flags(rollout__n_samples_per_prompt=1, algo__advantage__estimator="flash_reinforce"), "bnpo")
    assert built(flags(rollout__n_samples_per_prompt=1, algo__advantage__estimator="flash_reinforce"), "spo", "bapo")


def test_the_engine_says_its_probabilities_only_where_they_are_those_it_drew_with() -> None:
    assert "rollout_log_probs" in settings.declare(flags(), []).columns
    assert "rollout_log_probs" not in settings.declare(flags(rollout__temperature=0.7), []).columns


def test_an_untested_version_is_refused_with_those_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, works in {
        "0.10.3": False,
        "0.10.4": True,
        "0.11.2": True,
        "0.11.9.post1": True,
        "0.12.0": False,
    }.items():
        monkeypatch.setattr(settings, "version", lambda name, version=version: version)
        if works:
            assert settings.check_version() == version
        else:
            with pytest.raises(ConfigurationError, match=r"0\.10\.4"):
                settings.check_version()


def test_the_stack_is_split_from_the_flags(tmp_path: Path) -> None:
    config, rest = launch.split(["--a.b", "1", "--rlplugins", "bnpo,bapo", "--c"])
    assert config.plugins == ["bnpo", "bapo"] and rest == ["--a.b", "1", "--c"]
    (tmp_path / "stack.yaml").write_text("plugins: [{bapo: {target: 0.4}}]\n")
    config, _ = launch.split([f"--rlplugins={tmp_path / 'stack.yaml'}"])
    assert config.plugins == [{"bapo": {"target": 0.4}}]
    assert launch.split(["--rlplugins", "[]"])[0].plugins == []
    for wrong in (["--rlplugins"], ["--rlplugins", "bnpo", "--rlplugins", "bapo"], ["--rlplugins", "no/such.yaml"]):
        with pytest.raises(ConfigurationError):
            launch.split(wrong)


def test_an_unknown_plugin_or_command_ends_with_one_line() -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rlplugins", "openrlhf", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("train_sft", "--rlplugins", "bnpo")
    assert done.returncode == 2 and "train_sft takes no stack; those that do: train_ppo_ray" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("train_ppo_ray", "--rlplugins", "bapoo")
    assert done.returncode == 2 and "bapo" in done.stderr and "Traceback" not in done.stderr


def test_the_stack_is_checked_when_the_flags_are_read() -> None:
    module = ModuleType("config")
    module.hierarchize = lambda args: args  # type: ignore[attr-defined]
    install.check_flags(module, StackConfig(plugins=["spo"]))
    with pytest.raises(StackError, match="n_samples_per_prompt"):
        module.hierarchize(flags())  # type: ignore[attr-defined]


def test_the_stack_owns_a_part_that_a_plugin_touches() -> None:
    critic = {"algo__advantage__estimator": "gae"}
    for plugin, credit, loss, values in (
        ("bnpo", True, False, False),
        ("bapo", False, True, False),
        ("knapsack", True, True, True),
        ("pf-ppo", True, True, True),
    ):
        args = flags(**({} if plugin == "bnpo" else critic))
        stack = built(args, plugin)
        found = settings.owns_credit(stack), settings.owns_loss(stack), settings.owns_critic(args, stack)
        assert found == (credit, loss, values), plugin


def test_the_state_of_another_stack_is_refused_when_the_flags_are_read(tmp_path: Path) -> None:
    args = flags(ckpt__path=str(tmp_path), ckpt__load_enable=True)
    other = Stack(["bapo"])
    other.start(Run(1, 1, 1, make_pool(2)))
    other.begin_step(0, 1)
    settings.check_state(args, built(args, "bnpo"))  # no checkpoint yet
    other.save(settings.state_folder(args, 4), 4)
    (tmp_path / settings.ACTOR).mkdir()
    (tmp_path / settings.ACTOR / "latest").write_text("best_global_step4")
    settings.check_state(args, built(args, "bapo"))
    with pytest.raises(StateError, match="delete that folder"):
        settings.check_state(args, built(args, "bnpo"))


def test_a_fit_binds_its_own_trainer_first() -> None:
    class Actor:
        def fit(self, global_step: int = 0) -> int:
            return global_step

    import rlplugins_openrlhf.trainer as trainer_module

    seen: list[Any] = []
    original, trainer_module.bind = trainer_module.bind, lambda *given: seen.append(given)  # type: ignore[assignment]
    try:
        fit = install.binding("PPOTrainer", Actor.fit, {"plugins": ["bapo"]})
        actor = Actor()
        assert fit(actor, global_step=3) == 3
    finally:
        trainer_module.bind = original
    assert seen == [("PPOTrainer", actor, {"plugins": ["bapo"]}, {"global_step": 3})]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__micro_batch_size": 2}, "set --train.micro_batch_size 4, so"),
        ({"train__micro_batch_size": 6}, "set --train.micro_batch_size 8, so"),
        ({"train__batch_size": 12}, "set --train.batch_size 16, so"),
        ({"train__dynamic_batch_enable": True}, "leave out --train.dynamic_batch_enable"),
    ],
)
def test_flags_that_tear_groups_apart_are_refused_with_what_to_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StackError, match="p3o needs rows kept in one micro-batch") as refused:
        built(flags(**KL, **changes), "p3o")
    assert said in str(refused.value)
    if "train__dynamic_batch_enable" not in changes:
        built(flags(**changes), "bapo")


def test_flags_that_keep_groups_are_accepted_but_for_groups_that_may_grow() -> None:
    built(flags(**KL), "p3o")
    built(flags(**KL, train__micro_batch_size=8, train__batch_size=32), "p3o")
    built(flags(**KL, train__micro_batch_size=2), {"p3o": {"partners": "mini_batch"}}, "knapsack")
    with pytest.raises(ConfigurationError, match="allocate_rollouts may make a group"):
        built(flags(**KL), "p3o", "knapsack")


def test_a_need_that_a_plugin_can_do_without_refuses_nothing() -> None:
    class Prefers(Plugin):
        name = "prefers"
        needs = (needs.together("prompt").optional(),)

    for changes, kept in (
        ({}, True),
        ({"train__micro_batch_size": 2}, True),  # smaller than a group
        ({"train__micro_batch_size": 3, "train__batch_size": 18}, True),
        ({"train__batch_size": 12}, False),  # OpenRLHF leaves rows out of the last micro-batch
        ({"train__dynamic_batch_enable": True}, False),
    ):
        args = flags(**changes)
        stack = Stack([Prefers()], trainer=settings.declare(args))
        assert settings.refusals(args, stack) == [] and settings.keeps_together(args, stack) is kept
        assert not settings.must_keep_together(stack) and not settings.owns_loss(stack)
    grown = Stack([Prefers(), "knapsack"], trainer=settings.declare(flags()))
    assert settings.refusals(flags(), grown) == []  # groups may grow beyond a micro-batch


NO_GRADIENTS = {
    "ds__zero_stage": 3, "ds__ring_attn_size": 2, "ds__tensor_parallel_size": 2, "ds__lora__rank": 8, "ds__load_in_4bit": True,
    "ds__param_dtype": "fp16", "ds__deepcompile": True, "data__max_images_per_prompt": 1, "train__async_enable": True,
    "actor__gradient_checkpointing_reentrant": True,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_GRADIENTS)
def test_gradients_are_given_where_they_can_be_taken(name: str) -> None:
    class Asks(Plugin):
        name = "asks"
        needs = (needs.GRADIENTS, needs.TRAINABLE_MODEL)

    args = flags(actor__gradient_checkpointing_enable=True, **{name: NO_GRADIENTS[name]})
    with pytest.raises(StackError, match="asks needs loss gradients before the update") as refused:
        Stack([Asks()], trainer=settings.declare(args))
    assert f"--{name.replace('__', '.')}" in str(refused.value) and "trainable" not in str(refused.value)
    stack = Stack([Asks()], trainer=settings.declare(flags(actor__gradient_checkpointing_enable=True)))
    assert settings.owns_loss(stack)  # which it asks about


@pytest.mark.parametrize(
    ("name", "value"),
    [("ds__ring_attn_size", 2), ("ds__tensor_parallel_size", 2), ("actor__aux_loss_coef", 0.1),
     ("data__max_images_per_prompt", 1)],
)  # fmt: skip
def test_a_forward_of_a_plugin_gets_whole_sequences_of_text(name: str, value: Any) -> None:
    class Forward(Plugin):
        name = "forward"

        @hookimpl
        def forward(self, model: Any, batch: Any, temperature: float) -> Any: ...

    stack = Stack([Forward()], trainer=settings.declare(flags()))
    assert settings.refusals(flags(), stack) == [] and not settings.owns_loss(stack)
    refused = settings.refusals(flags(**{name: value}), stack)
    assert len(refused) == 1 and refused[0].startswith(f"--{name.replace('__', '.')}")


def test_micro_batches_are_filled_with_whole_units_and_then_with_rows_that_count_nowhere() -> None:
    from rlplugins_openrlhf.trainer import whole

    assert whole(torch.arange(3).repeat_interleave(2), 6, 2) == list(range(6))
    units = torch.tensor([0, 1, 1, 2, 1, 2, 0, 3])  # of sizes 2, 3, 2 and 1
    order = whole(units, 12, 4)
    assert sorted(order) == list(range(12))
    parts = [order[first : first + 4] for first in range(0, 12, 4)]
    for unit in range(4):
        assert sum(any(row < 8 and units[row] == unit for row in part) for part in parts) == 1
    with pytest.raises(ConfigurationError, match="4 rows that must stay whole in one micro-batch of 2"):
        whole(torch.zeros(4, dtype=torch.int64), 6, 2)


def test_the_buffer_gives_whole_micro_batches_in_every_step() -> None:
    buffer = SimpleNamespace(items=list("abcdef"), dynamic_batch=False, sample_batch_size=2, dynamic_indices=[])
    worker.keep_whole(buffer, 2)
    assert buffer.dynamic_indices == [[0, 1], [2, 3], [4, 5]] and buffer.dynamic_batch and buffer.sample_batch_size == 1
    buffer.items = list("gh")
    worker.keep_whole(buffer, 2)
    assert buffer.dynamic_indices == [[0, 1]]
    buffer.items = list("ijk")
    worker.keep_whole(buffer, 2)
    assert buffer.dynamic_indices == [[0, 1]]  # as OpenRLHF's loader leaves rows out


def test_the_rule_for_logits_is_among_the_options_of_every_engine() -> None:
    given: list[Any] = []

    class Engine:
        """Stands for Ray's actor class."""

        def options(self, **scheduling: Any) -> SimpleNamespace:
            given.append(scheduling)
            return SimpleNamespace(remote=lambda **words: given.append(words))

    module = ModuleType("vllm_engine")
    module.RolloutRayActor = Engine()  # type: ignore[attr-defined]
    stack = built(flags(), "hapo-token")
    install.bind_engines(module, stack)
    for number in range(2):
        module.RolloutRayActor.options(num_cpus=1).remote(model="m", seed=number)
        scheduling, words = given[-2:]
        assert scheduling == {"num_cpus": 1} and words["model"] == "m" and words["seed"] == number
        assert words["logits_processors"] == [logits.PROCESSOR]
        assert logits.Rule(words["additional_config"][logits.KEY]).stack.fingerprint == stack.fingerprint


def test_a_request_takes_its_numbers_where_the_engine_has_a_rule() -> None:
    prompts = make_pool(2)
    plain = Requests.of(prompts, torch.ones(2, dtype=torch.int64))
    sampling = Sampling.of(2, 1.0, 5)
    sampling.numbers["hapo_token"] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for numbers in (False, True):
        made = [row[0].sampling for row in rollout.requests_of(plain, sampling, {}, numbers=numbers)]
        found = [logits.numbers_of(parameters or {}) for parameters in made]
        assert found == ([{"hapo_token": [1.0, 2.0]}, {"hapo_token": [3.0, 4.0]}] if numbers else [{}, {}])


def test_a_study_shows_its_flags() -> None:
    base = "python -m openrlhf.cli.train_ppo_ray --rollout.n_samples_per_prompt 1 --algo.advantage.estimator reinforce"
    declared = adapter.configured(
        {"base": base, "overrides": ["--train.async_enable", "--actor.eps_clip_low_high", "0.2", "0.3"]}
    )
    assert declared.group_size == 1 and "engine" not in declared.provides
    assert declared.defaults["clip_range"] == {"fixed": {"low": 0.2, "high": 0.3}}
    assert adapter.configured({"base": "bash train.sh"}).group_size is None  # a script hides them
    with pytest.raises(ConfigurationError, match=r"train\.bse"):
        adapter.configured({"bse": base})


def test_a_study_may_be_of_either_command() -> None:
    base = "deepspeed --module openrlhf.cli.train_dpo --model.beta 0.3"
    declared = adapter.configured({"base": base, "overrides": ["--model.label_smoothing", "0.1"]})
    assert declared.defaults == {"preference_loss": {"cdpo": {"beta": 0.3, "label_smoothing": 0.1}}}
    stack, legal = Stack.explain(StackConfig(plugins=["bnpo"]), declared)
    assert not legal and "run train_ppo_ray" in " ".join(stack.split())
    ppo = adapter.configured({"base": "rlplugins openrlhf train_ppo_ray --rollout.n_samples_per_prompt 4"})
    stack, legal = Stack.explain(StackConfig(plugins=["rdpo"]), ppo)
    assert not legal and "run train_dpo" in " ".join(stack.split())
    words = study.with_launcher(base.split())
    assert words[2:4] == ["rlplugins_openrlhf", "train_dpo"] and words[-1] == "0.3"


@pytest.mark.parametrize("plugin", ["rdpo", "bnpo", "p3o", "hapo-token"])
def test_explain_takes_plugins_of_either_command(plugin: str) -> None:
    text, legal = Stack.explain(StackConfig(plugins=[plugin]), "openrlhf")
    assert legal, text


def test_a_study_puts_its_cell_into_the_command_line(tmp_path: Path) -> None:
    run = study.validated(
        {"base": ["python", "-m", "openrlhf.cli.train_ppo_ray", "--a", "1"], "overrides": ["--b"]}, "train"
    )
    words = study.arguments(run, tmp_path)
    assert words[:6] == ["python", "-m", "rlplugins_openrlhf", "train_ppo_ray", "--a", "1"] and words[-1] == "--b"
    assert words[words.index("--rlplugins") + 1] == str(tmp_path / "stack.yaml") and "--ckpt.load_enable" in words
    with pytest.raises(ConfigurationError, match="max_samples"):
        study.arguments(study.validated({"base": "x", "steps": 3}, "train"), tmp_path)
