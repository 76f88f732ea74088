"""What verl's configuration means for a stack, and what is refused before any worker is started."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import parity_plugins  # noqa: F401
import pytest

from rlplugins import Plugin, bindings, hookimpl, needs
from rlplugins.ablation import external
from rlplugins.defaults import BUILTINS
from rlplugins.errors import ConfigurationError, RlpluginsError, StackError
from rlplugins.imports import after_import
from rlplugins.registry import make_builtin
from rlplugins.stack import Stack, StackConfig
from rlplugins_verl import doctor, install, settings, study
from rlplugins_verl.adapter import adapter
from rlplugins_verl.bindings import BASE, POINTS


def config(**given: Any) -> dict[str, Any]:
    """verl's configuration with settings by dotted path, `__` for the dots."""
    made: dict[str, Any] = {}
    defaults = {
        "algorithm__adv_estimator": "grpo", "actor_rollout_ref__rollout__n": 4, "actor_rollout_ref__actor__strategy": "fsdp2",
    }  # fmt: skip
    for path, value in (defaults | given).items():
        node = made
        *parents, name = path.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return made


def build(*plugins: Any, mode: str = "sync", **given: Any) -> Stack:
    return settings.build_stack(config(**given), StackConfig(plugins=list(plugins)), mode)


@pytest.mark.parametrize(
    ("given", "hook", "meant"),
    [
        ({}, "baseline", "group_mean"),
        ({}, "advantage_scale", "group_std"),
        ({"algorithm__norm_adv_by_std_in_grpo": False}, "advantage_scale", "one"),
        ({"algorithm__adv_estimator": "rloo"}, "baseline", "leave_one_out"),
        ({"algorithm__adv_estimator": "gae", "algorithm__lam": 0.9}, "compute_advantages", {"gae": {"gamma": 1.0, "lam": 0.9}}),
        ({}, "policy_loss", {"ppo_clip": {"dual_clip": 3.0}}),
        ({"actor_rollout_ref__actor__policy_loss__loss_mode": "gspo"}, "policy_loss", "gspo"),
        ({"actor_rollout_ref__actor__clip_ratio_high": 0.28}, "clip_range", {"fixed": {"low": 0.2, "high": 0.28}}),
        ({}, "kl_penalty", "none"),
        ({"actor_rollout_ref__actor__use_kl_loss": True}, "kl_penalty", {"k3": {"coefficient": 0.001, "cut": 10.0}}),
        ({"actor_rollout_ref__actor__loss_agg_mode": "seq-mean-token-mean"}, "reduce_loss", "sequence_mean"),
        ({"actor_rollout_ref__actor__loss_agg_mode": "seq-mean-token-sum"}, "reduce_loss", {"sequence_sum": {"constant": 1.0}}),
    ],
)  # fmt: skip
def test_a_setting_means_a_builtin(given: dict[str, Any], hook: str, meant: Any) -> None:
    found, missing = settings.builtins(config(**given))
    assert found[hook] == meant
    assert hook not in missing
    make_builtin(hook, meant)


def test_every_builtin_that_settings_mean_exists() -> None:
    found, _ = settings.builtins(config())
    assert all(make_builtin(hook, wanted).name in BUILTINS[hook] for hook, wanted in found.items())


def test_what_no_plugin_touches_is_left_to_verl() -> None:
    stack = build("knapsack", algorithm__adv_estimator="gdpo", actor_rollout_ref__actor__policy_loss__loss_mode="sapo")
    assert not settings.owns_credit(stack) and not settings.owns_loss(stack)
    assert settings.owns_credit(build("bnpo")) and not settings.owns_loss(build("bnpo"))
    assert settings.owns_loss(build("bapo")) and not settings.owns_credit(build("bapo"))
    assert settings.owns_credit(build("d3s")) and settings.owns_loss(build("d3s"))


def test_a_setting_without_a_builtin_is_refused_where_a_plugin_touches_its_part() -> None:
    with pytest.raises(ConfigurationError, match="loss_mode=sapo has no counterpart"):
        build("d3s", actor_rollout_ref__actor__policy_loss__loss_mode="sapo")
    with pytest.raises(ConfigurationError, match="adv_estimator=gdpo has no counterpart"):
        build("d3s", algorithm__adv_estimator="gdpo")
    build("bnpo", actor_rollout_ref__actor__policy_loss__loss_mode="sapo")
    build("gtpo", actor_rollout_ref__actor__policy_loss__loss_mode="sapo")  # brings a loss of its own


@pytest.mark.parametrize(
    ("plugins", "given", "said"),
    [
        (["spo"], {}, "actor_rollout_ref.rollout.n=1"),
        (["grpo"], {"actor_rollout_ref__rollout__n": 1}, "actor_rollout_ref.rollout.n=2"),
        (["bnpo"], {"algorithm__use_kl_in_reward": True}, "use_kl_loss=True"),
        (["pf-ppo"], {"algorithm__use_pf_ppo": True}, "algorithm.use_pf_ppo=True"),
        (["bapo"], {"algorithm__rollout_correction__rollout_is": "token"}, "rollout_correction.rollout_is"),
        (["bapo"], {"actor_rollout_ref__actor__strategy": "megatron"}, "fsdp2"),
        (["knapsack"], {"algorithm__filter_groups__enable": True}, "filter_groups.enable"),
        (["bapo"], {"distillation__enabled": True}, "distillation.enabled"),
        (["knapsak"], {}, "did you mean knapsack"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_what_to_do(
    plugins: list[str], given: dict[str, Any], said: str
) -> None:
    with pytest.raises(RlpluginsError) as refused:
        build(*plugins, **given)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"actor_rollout_ref__actor__strategy": "megatron"}, "`forward` is bound to verl's FSDP engines"),
        ({"actor_rollout_ref__actor__ulysses_sequence_parallel_size": 2}, "actor.ulysses_sequence_parallel_size"),
        ({"actor_rollout_ref__ref__ulysses_sequence_parallel_size": 2}, "ref.ulysses_sequence_parallel_size"),
        ({"actor_rollout_ref__model__use_fused_kernels": True}, "use_fused_kernels=True"),
        ({"actor_rollout_ref__actor__calculate_sum_pi_squared": True}, "calculate_sum_pi_squared"),
        ({"actor_rollout_ref__actor__use_prefix_grouper": True}, "use_prefix_grouper=True does nothing"),
        ({"distillation__enabled": True}, "distillation.enabled"),
    ],
)
def test_settings_under_which_no_plugin_can_do_the_forward_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        build("plain-forward", **given)
    assert said in str(refused.value)
    build("knapsack", **given)


def test_a_forward_alone_leaves_credit_and_loss_to_verl() -> None:
    stack = build(
        "plain-forward", actor_rollout_ref__actor__policy_loss__loss_mode="sapo", algorithm__adv_estimator="gdpo"
    )
    assert not settings.owns_credit(stack) and not settings.owns_loss(stack)


@pytest.mark.parametrize("mode", settings.MODES)
def test_gradients_are_those_of_the_loss_that_trains(mode: str) -> None:
    assert settings.owns_loss(build("asking", mode=mode))
    with pytest.raises(StackError, match=r"(?s)asking needs loss gradients.*strategy=fsdp2"):
        build("asking", mode=mode, actor_rollout_ref__actor__strategy="megatron")
    with pytest.raises(ConfigurationError, match="loss_mode=sapo has no counterpart"):
        build("asking", mode=mode, actor_rollout_ref__actor__policy_loss__loss_mode="sapo")


def test_a_plugin_that_can_do_without_gradients_leaves_the_loss_to_megatron() -> None:
    class Optional(Plugin):
        """Uses gradients where there are any."""

        name = "optional"
        needs = (needs.GRADIENTS.optional(), needs.TRAINABLE_MODEL)

        @hookimpl
        def shape_rewards(self, rewards: Any) -> Any:
            return rewards

    def owned(strategy: str) -> bool:
        trainer = settings.declare(config(actor_rollout_ref__actor__strategy=strategy), "colocate_async")
        return settings.owns_loss(Stack([Optional()], trainer=trainer))

    assert owned("fsdp") and not owned("megatron")


def test_spo_needs_the_engine_and_the_prompts_of_the_synchronous_mode() -> None:
    build("spo", actor_rollout_ref__rollout__n=1)
    with pytest.raises(StackError, match="trainer_mode=rlplugins_sync"):
        build("spo", mode="colocate_async", actor_rollout_ref__rollout__n=1)


def test_an_entropy_bonus_is_part_of_the_stack() -> None:
    stack = build("bapo", actor_rollout_ref__actor__entropy_coeff=0.01)
    assert stack.takes("entropy", "update")
    assert [plugin.name for plugin in stack.plugins] == ["bapo", "entropy_bonus"]


def test_a_stack_comes_from_the_flags_or_from_a_file_but_not_both(tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text("plugins: [bnpo, {bapo: {target: 0.5}}]\n")
    from_file = settings.read_stack({"rlplugins": {"stack": str(file)}})
    assert from_file == settings.read_stack({"rlplugins": {"plugins": ["bnpo", {"bapo": {"target": 0.5}}]}})
    assert settings.read_stack({}).plugins == []
    with pytest.raises(ConfigurationError, match="names a file"):
        settings.read_stack({"rlplugins": {"stack": str(file), "plugins": ["bnpo"]}})
    with pytest.raises(ConfigurationError, match="plugin"):
        settings.read_stack({"rlplugins": {"plugin": ["bnpo"]}})


@pytest.mark.parametrize(
    ("found", "good"), [("0.9.0", True), ("0.9.1", True), ("0.8.0", False), ("0.10.0", False), ("1.0", False)]
)
def test_only_versions_of_the_tested_range_are_accepted(
    found: str, good: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "version", lambda name: found)
    if good:
        assert settings.check_version() == found
    else:
        with pytest.raises(ConfigurationError, match=f"verl {found} is installed.*>=0.9,<0.10"):
            settings.check_version()


def test_a_missing_verl_is_said_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise settings.PackageNotFoundError(name)

    monkeypatch.setattr(settings, "version", missing)
    with pytest.raises(ConfigurationError, match="pip install"):
        settings.check_version()
    text, well = doctor.report()
    assert not well and "verl is not installed" in text


# loading


def test_an_action_follows_an_import_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []
    before = len(sys.meta_path)
    after_import("lazy_module", lambda module: seen.append(module.value))
    assert seen == []
    import lazy_module  # type: ignore[import-not-found]

    assert seen == [1] and len(sys.meta_path) == before
    after_import("lazy_module", lambda module: seen.append(module.value + 1))
    assert seen == [1, 2]
    assert lazy_module.__spec__.loader.get_source("lazy_module") == "value = 1\n"


@pytest.mark.parametrize("mode", ["rlplugins_sync", "sync"])
def test_a_stack_under_the_deprecated_trainer_is_refused(mode: str) -> None:
    started: list[Any] = []
    handle = SimpleNamespace(run=SimpleNamespace(remote=started.append))
    module = ModuleType("main_ppo_v0")
    module.TaskRunner = SimpleNamespace(remote=lambda: handle)  # type: ignore[attr-defined]
    install.guard_v0(module)

    class Config(dict):
        trainer = SimpleNamespace(v1=SimpleNamespace(trainer_mode=mode))

    plain = Config() if mode == "sync" else Config(rlplugins={"plugins": ["bnpo"]})
    if mode == "sync":
        module.TaskRunner.remote().run.remote(plain)
        assert started == [plain]
    else:
        with pytest.raises(ConfigurationError, match="deprecated trainer"):
            module.TaskRunner.remote().run.remote(plain)
        assert started == []


# doctor


def test_a_point_with_another_signature_is_named(tmp_path: Path) -> None:
    for point in POINTS:
        path = tmp_path / point.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    base = tmp_path / BASE
    base.write_text(
        "def register_trainer(name): ...\nclass PPOTrainer:\n    def fit(self, manager, *, resume=True): ...\n"
    )
    found = {point.name: now for point, now in bindings.changed(POINTS, tmp_path)}
    assert found["register_trainer"] == "(name)"
    assert found["PPOTrainer.fit"] == "(manager, *, resume)"
    assert found["PPOTrainer.on_step_end"] == "absent"


# studies


def test_a_study_adds_to_the_users_own_command_line(tmp_path: Path) -> None:
    run = external.ExternalRun(
        base="python -m verl.trainer.main_ppo data.train_files='a b.parquet'", overrides=["x=1"], seed=3, steps=5
    )
    words = study.arguments(run, tmp_path)
    assert words[:4] == ["python", "-m", "verl.trainer.main_ppo", "data.train_files=a b.parquet"]
    assert words[-1] == "x=1"
    assert {"trainer.v1.trainer_mode=rlplugins_sync", f"+rlplugins.stack={tmp_path / 'stack.yaml'}", "data.seed=3",
            "trainer.total_training_steps=5", f"trainer.default_local_dir={tmp_path / 'checkpoint'}"} <= set(words)  # fmt: skip
    other = external.ExternalRun(base="verl trainer.v1.trainer_mode=colocate_async")
    assert "trainer.v1.trainer_mode=rlplugins_colocate_async" in study.arguments(other, tmp_path)


def test_the_cells_of_a_study_are_checked_under_the_settings_that_its_command_line_shows() -> None:
    base = "python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo actor_rollout_ref.rollout.n=8"
    shown = adapter.configured({"base": base, "overrides": ["actor_rollout_ref.rollout.n=1"]})
    assert shown.group_size == 1 and shown.defaults["baseline"] == "group_mean"
    with pytest.raises(StackError, match="per prompt"):
        Stack(["bnpo"], trainer=shown)
    Stack(["bnpo"], trainer=adapter.configured({"base": base}))
    hidden = adapter.configured({"base": "bash train.sh"})
    assert hidden.group_size is None
    Stack(["spo"], trainer=hidden)
    with pytest.raises(ConfigurationError, match="stepz"):
        adapter.configured({"base": base, "stepz": 3})


def test_metrics_of_a_resumed_run_are_one_line_per_step(tmp_path: Path) -> None:
    def write(name: str, *steps: tuple[int, float]) -> None:
        lines = [json.dumps({"step": step, "data": {"critic/score/mean": score, "note": "x"}}) for step, score in steps]
        (tmp_path / name).write_text("\n".join(lines) + '\n{"step": 9, "da')

    write("verl-0.jsonl", (0, 0.0), (1, 0.1), (2, 0.2), (3, 0.3))
    write("verl-1.jsonl", (3, 0.35), (4, 0.4))
    study.TRAINER.write_metrics(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reward"]) for line in lines] == [(1, 0.1), (2, 0.2), (3, 0.35), (4, 0.4)]
    assert "note" not in lines[0]


def test_a_study_with_a_wrong_field_says_which(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base: verl\nstepz: 3\nseed: 0\nstack: {}\n")
    with pytest.raises(ConfigurationError, match=r"train\.stepz"):
        external.read(tmp_path / "config.yaml")


def test_an_engine_that_cannot_call_the_rule_is_refused() -> None:
    config = {"algorithm": {"adv_estimator": "grpo"}, "actor_rollout_ref": {"rollout": {"n": 4, "name": "sglang"}}}
    with pytest.raises(StackError, match=r"(?s)cannot call process_logits.*off: \[hapo-token.process_logits\]"):
        settings.build_stack(config, StackConfig(plugins=["hapo-token"]), "sync")
