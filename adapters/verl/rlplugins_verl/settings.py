"""What verl's configuration means for a stack: built-ins, needs that can be met, and settings that cannot be combined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlplugins.defaults import EntropyBonus
from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import HOOKS
from rlplugins.plugin import BuiltinName
from rlplugins.rollouts import DECLARED
from rlplugins.stack import Stack, StackConfig, read_config, read_file
from rlplugins.trainer import Trainer

TESTED = "0.9.1"
OLDEST, TOO_NEW = (0, 9), (0, 10)
MODES = ("sync", "colocate_async")
"""Trainer modes of verl that have a counterpart `rlplugins_<mode>`."""

LOGITS_ENGINES = ("vllm", "light")
"""Rollout engines that call `process_logits`."""
UNBOUND = frozenset(name for name, hook in HOOKS.items() if hook.phase == "preferences")
"""Hooks that have no place in verl."""

CREDIT = frozenset(name for name, hook in HOOKS.items() if hook.phase == "credit")
UPDATE = frozenset(name for name, hook in HOOKS.items() if hook.phase == "update") - {"forward"}
WEIGHTS = frozenset({"select_samples", "select_tokens"})
PROMPTS = frozenset(name for name, hook in HOOKS.items() if hook.phase == "prompts")
RESIZING = ("allocate_rollouts", "extend_rollouts", "filter_rollouts", "assign_groups")
METHOD = ("baseline", "advantage_scale", "compute_advantages")

_K3 = {"k3": {"cut": 10.0}}
_KL: dict[str, dict[str, Any]] = {
    "kl": {"k1": {}}, "k1": {"k1": {}}, "mse": {"k2": {}}, "k2": {"k2": {}}, "low_var_kl": _K3, "k3": _K3,
}  # fmt: skip
"""verl's names of the KL penalties, and the built-ins that they mean."""


def check_version() -> str:
    """The version of verl.

    Raises:
        ConfigurationError: if it is missing or not one that the adapter knows.
    """
    try:
        found = version("verl")
    except PackageNotFoundError:
        raise ConfigurationError('verl is not installed here: pip install "verl>=0.9,<0.10" TransferQueue') from None
    if not OLDEST <= tuple(int(part) for part in found.split(".")[:2]) < TOO_NEW:
        raise ConfigurationError(
            f"verl {found} is installed, rlplugins-verl binds verl >=0.9,<0.10 (tested: {TESTED}): install one of these, "
            "or a version of rlplugins-verl for yours"
        )
    return found


def at(config: Any, path: str, default: Any = None) -> Any:
    """The setting at a dotted path, or `default` where it is missing or null."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, Mapping) or hasattr(config, "get") else None
        if config is None:
            return default
    return config


def read_stack(config: Any) -> StackConfig:
    """The stack of `+rlplugins.stack=<file>`, or of `+rlplugins.plugins=[...]` and its companions.

    Raises:
        ConfigurationError: if both are given, or something is wrong in either.
    """
    given = plain(at(config, "rlplugins", {}))
    file = given.pop("stack", None)
    if file is not None and given:
        raise ConfigurationError(f"rlplugins.stack names a file, so leave {', '.join(map(repr, given))} to that file")
    return read_file(Path(file)) if file is not None else read_config(given, "rlplugins")


def plain(node: Any) -> Any:
    """Dicts and lists instead of OmegaConf's."""
    if hasattr(node, "_metadata"):
        from omegaconf import OmegaConf

        return OmegaConf.to_container(node, resolve=True)
    return dict(node)


def group_size(config: Any) -> int:
    """Responses per prompt."""
    return int(at(config, "actor_rollout_ref.rollout.n", 1))


def ranks(config: Any) -> int:
    """Processes of the update."""
    return int(at(config, "trainer.nnodes", 1)) * int(at(config, "trainer.n_gpus_per_node", 1))


def trains_by_fsdp(config: Any) -> bool:
    """Whether FSDP or FSDP2 trains the actor."""
    return str(at(config, "actor_rollout_ref.actor.strategy", "fsdp")) in ("fsdp", "fsdp2")


def has_reference(config: Any) -> bool:
    """Whether verl computes the reference's log-probs."""
    return bool(
        at(config, "algorithm.use_kl_in_reward", False) or at(config, "actor_rollout_ref.actor.use_kl_loss", False)
    )


def has_critic(config: Any) -> bool:
    """Whether a critic runs."""
    enabled = at(config, "critic.enable")
    return bool(enabled) if enabled is not None else str(at(config, "algorithm.adv_estimator")) == "gae"


def declare(config: Any, mode: str, columns: Iterable[str] | None = None) -> Trainer:
    """verl in this configuration.

    Args:
        config: verl's.
        mode: one of `MODES`.
        columns: columns of the data; None: not read yet.
    """
    found, _ = builtins(config)
    given = {"components", "entropy"}
    given |= {"ref_log_probs"} if has_reference(config) else set()
    given |= {"values"} if has_critic(config) else set()
    given |= {"rollout_log_probs"} if at(config, "actor_rollout_ref.rollout.calculate_log_probs", True) else set()
    coefficient = float(at(config, "actor_rollout_ref.actor.entropy_coeff", 0.0))
    every_step = int(at(config, "trainer.test_freq", -1)) == 1
    apart = why_apart(config)
    engine = str(at(config, "actor_rollout_ref.rollout.name", "vllm"))
    filtered = bool(at(config, "algorithm.filter_groups.enable", False))
    return Trainer(
        name="verl",
        binds=frozenset(HOOKS) - UNBOUND - (set() if engine in LOGITS_ENGINES else {"process_logits"}),
        provides=provides(mode)
        | ({"gradients"} if trains_by_fsdp(config) else set())
        | ({"validation_every_step"} if every_step else set())
        | (set() if apart else {"together"}),
        columns=None if columns is None else frozenset(given | set(columns)),
        group_size=group_size(config),
        ranks=ranks(config),
        defaults=found,
        extras=[EntropyBonus(coefficient=coefficient)] if coefficient else [],
        breaks={"complete_groups": "algorithm.filter_groups.enable"} if filtered else {},
        remedies=REMEDIES | {"together": apart},
    )


def why_apart(config: Any) -> str:
    """The setting that would make verl keep a group in one micro-batch; empty if it does."""
    actor, size = "actor_rollout_ref.actor", group_size(config)
    share = max(1, ranks(config) // int(at(config, f"{actor}.ulysses_sequence_parallel_size", 1)))
    if int(at(config, f"{actor}.ppo_mini_batch_size", share)) % share:
        return f"set {actor}.ppo_mini_batch_size to a multiple of {share}, so that each rank gets whole groups"
    if at(config, f"{actor}.shuffle", False):
        return f"set {actor}.shuffle=False"
    if at(config, f"{actor}.use_dynamic_bsz", False):
        longest = int(at(config, "data.max_prompt_length", 0)) + int(at(config, "data.max_response_length", 0))
        limit = int(at(config, f"{actor}.ppo_max_token_len_per_gpu", 0))
        return f"set {actor}.ppo_max_token_len_per_gpu={size * longest}" if limit < size * longest else ""
    rows = int(at(config, f"{actor}.ppo_micro_batch_size_per_gpu", size))
    return f"set {actor}.ppo_micro_batch_size_per_gpu={size}" if rows < size else ""


REMEDIES = {
    "group_size": "set actor_rollout_ref.rollout.n={low}",
    "validation_every_step": "set trainer.test_freq=1",
    "column": "add the column to the parquet file, or to its extra_info",
    "column:ref_log_probs": "set actor_rollout_ref.actor.use_kl_loss=True, with kl_loss_coef=0 if no penalty is wanted",
    "column:values": "set critic.enable=True",
    "column:rollout_log_probs": "set actor_rollout_ref.rollout.calculate_log_probs=True",
    "engine": "set trainer.v1.trainer_mode=rlplugins_sync",
    "prompts_after_update": "set trainer.v1.trainer_mode=rlplugins_sync",
    "one_rank": "set trainer.nnodes=1 trainer.n_gpus_per_node=1",
    "gradients": "set actor_rollout_ref.actor.strategy=fsdp2",
}


def provides(mode: str) -> set[str]:
    """Needs that verl meets in a trainer mode, whatever trains the actor."""
    always = {"mini_batch_log_probs", "current_entropy", "response_prefix", "trainable_model"}
    return always | ({"engine", "prompts_after_update"} if mode == "sync" else set())


def builtins(config: Any) -> tuple[dict[str, BuiltinName], dict[str, str]]:
    """The built-in per hook that the settings mean; and per hook the setting that means none."""
    found: dict[str, BuiltinName] = {}
    missing: dict[str, str] = {}
    _advantages(config, found, missing)
    actor = "actor_rollout_ref.actor"
    ratio = at(config, f"{actor}.clip_ratio", 0.2)
    low, high = (float(at(config, f"{actor}.clip_ratio_{side}", ratio)) for side in ("low", "high"))
    found["clip_range"] = {"fixed": {"low": low, "high": high}}
    loss = str(at(config, f"{actor}.policy_loss.loss_mode", "vanilla"))
    dual = float(at(config, f"{actor}.clip_ratio_c", 3.0))
    known: dict[str, BuiltinName] = {"vanilla": {"ppo_clip": {"dual_clip": dual}}, "gspo": "gspo", "cispo": "cispo"}
    _choose("policy_loss", known.get(loss), f"{actor}.policy_loss.loss_mode={loss}", found, missing)
    _penalty(config, found, missing)
    _reduction(config, found, missing)
    return found, missing


def _choose(
    hook: str, wanted: BuiltinName | None, setting: str, found: dict[str, BuiltinName], missing: dict[str, str]
) -> None:
    if wanted is None:
        missing[hook] = setting
    else:
        found[hook] = wanted


def _advantages(config: Any, found: dict[str, BuiltinName], missing: dict[str, str]) -> None:
    estimator = str(at(config, "algorithm.adv_estimator", "gae"))
    gamma, lam = float(at(config, "algorithm.gamma", 1.0)), float(at(config, "algorithm.lam", 1.0))
    match estimator:
        case "grpo" | "grpo_vectorized":
            normed = at(config, "algorithm.norm_adv_by_std_in_grpo", True)
            found |= {"baseline": "group_mean", "advantage_scale": "group_std" if normed else "one"}
        case "rloo" | "rloo_vectorized":
            found |= {"baseline": "leave_one_out", "advantage_scale": "one"}
        case "reinforce_plus_plus":
            found["compute_advantages"] = {"reinforce_plus_plus": {"gamma": gamma}}
        case "gae":
            found["compute_advantages"] = {"gae": {"gamma": gamma, "lam": lam}}
        case _:
            missing |= dict.fromkeys(METHOD, f"algorithm.adv_estimator={estimator}")


def _penalty(config: Any, found: dict[str, BuiltinName], missing: dict[str, str]) -> None:
    actor = "actor_rollout_ref.actor"
    if not at(config, f"{actor}.use_kl_loss", False):
        found["kl_penalty"] = "none"
        return
    kind = str(at(config, f"{actor}.kl_loss_type", "low_var_kl"))
    coefficient = float(at(config, f"{actor}.kl_loss_coef", 0.001))
    wanted = {name: {"coefficient": coefficient, **options} for name, options in _KL.get(kind, {}).items()} or None
    _choose("kl_penalty", wanted, f"{actor}.kl_loss_type={kind}", found, missing)


def _reduction(config: Any, found: dict[str, BuiltinName], missing: dict[str, str]) -> None:
    actor = "actor_rollout_ref.actor"
    mode = str(at(config, f"{actor}.loss_agg_mode", "token-mean"))
    constant = at(config, f"{actor}.loss_scale_factor")
    known: dict[str, BuiltinName] = {
        "token-mean": "token_mean",
        "seq-mean-token-mean": "sequence_mean",
        "seq-mean-token-sum": {"sequence_sum": {"constant": 1.0}},
    }
    if constant is not None:
        known["seq-mean-token-sum-norm"] = {"sequence_sum": {"constant": float(constant)}}
    _choose("reduce_loss", known.get(mode), f"{actor}.loss_agg_mode={mode}", found, missing)


def owns_credit(stack: Stack) -> bool:
    """Whether the stack computes the advantages; else verl does, as configured."""
    return any(stack.claims(hook) for hook in CREDIT)


def owns_loss(stack: Stack) -> bool:
    """Whether the stack computes the loss, that whose gradients a plugin asks for too; else verl does, as configured."""
    claimed = any(stack.claims(hook) for hook in UPDATE | WEIGHTS) or any(plugin.kinds for plugin in stack.plugins)
    given = stack.trainer is not None and "gradients" in stack.trainer.provides
    return claimed or (given and stack.needs("gradients"))


def needs_whole_units(stack: Stack) -> bool:
    """Whether some plugin cannot do without its rows in one micro-batch; one that can gets as many as fit."""
    return any(need.kind == "together" and need.required for need in stack.plan.needs())


def owns_critic(config: Any, stack: Stack) -> bool:
    """Whether the critic learns what the stack says; else verl's own targets and loss."""
    return has_critic(config) and owns_credit(stack) and any(stack.claims(hook) for hook in ("value_targets", *WEIGHTS))


def build_stack(config: Any, wanted: StackConfig, mode: str, columns: Iterable[str] | None = None) -> Stack:
    """The checked stack.

    Args:
        config: verl's.
        wanted: the user's stack.
        mode: one of `MODES`.
        columns: columns of the data; None: not read yet, so only what verl itself gives is checked.

    Raises:
        StackError: if it cannot run here.
        ConfigurationError: if a setting of verl cannot be combined with it.
    """
    if columns is None:
        columns = Stack.from_config(wanted, declare(config, mode)).needed_columns - DECLARED
    stack = Stack.from_config(wanted, declare(config, mode, columns))
    if problems := refusals(config, stack):
        raise ConfigurationError("verl's configuration cannot be combined with this stack:\n" + "\n".join(
            f"- {problem}" for problem in problems))  # fmt: skip
    return stack


def refusals(config: Any, stack: Stack) -> list[str]:
    """Settings of verl that a hook of the stack cannot be combined with, each with what to do."""
    credit, loss = owns_credit(stack), owns_loss(stack)
    found = []
    forward = stack.claims("forward")
    if (loss or forward) and not trains_by_fsdp(config):
        bound = "the loss" if loss else "the hook `forward`"
        strategy = at(config, "actor_rollout_ref.actor.strategy")
        found.append(f"actor_rollout_ref.actor.strategy={strategy}: {bound} is bound to verl's FSDP engines; set fsdp2")
    found += _with_forward(config) if forward else []
    if credit and at(config, "algorithm.use_kl_in_reward", False):
        found.append("algorithm.use_kl_in_reward=True changes rewards that the stack computes with: set it to False and use "
                     "actor_rollout_ref.actor.use_kl_loss=True")  # fmt: skip
    correction = "algorithm.rollout_correction"
    for name in ("rollout_is", "rollout_rs", "bypass_mode"):
        if (credit or loss) and at(config, f"{correction}.{name}"):
            found.append(f"{correction}.{name} reweights rows that the stack weighs: leave it unset")
    if credit and at(config, "algorithm.use_pf_ppo", False):
        found.append("algorithm.use_pf_ppo=True draws rows anew after their advantages are known: set it to False and use the "
                     "plugin pf-ppo")  # fmt: skip
    if (loss or forward) and at(config, "distillation.enabled", False):
        found.append("distillation.enabled=True brings a loss of its own: set it to False")
    if at(config, "algorithm.filter_groups.enable", False) and any(stack.claims(hook) for hook in PROMPTS):
        found.append("algorithm.filter_groups.enable=True asks for further prompts within a step: set it to False and filter "
                     "with a plugin")  # fmt: skip
    colocated = at(config, "reward.reward_model.enable", False) and not at(
        config, "reward.reward_model.enable_resource_pool", False
    )
    if colocated and (stack.claims("extend_rollouts") or stack.claims("filter_rollouts")):
        found.append("a reward model on the training devices scores after those hooks: set "
                     "reward.reward_model.enable_resource_pool=True")  # fmt: skip
    if stack.claims("value_targets") and not has_critic(config):
        found.append("no critic reads value_targets: set critic.enable=True")
    found += [*_unequal(config, stack), *_unmapped(config, stack, credit, loss)]
    return found


def _with_forward(config: Any) -> list[str]:
    """Settings under which verl's model gives what no plugin's `forward` can compute with."""
    actor, model = "actor_rollout_ref.actor", "actor_rollout_ref.model"
    found = []
    for who in (actor, f"{actor}.fsdp_config", "actor_rollout_ref.ref"):
        if int(at(config, f"{who}.ulysses_sequence_parallel_size", 1)) > 1:
            found.append(
                f"{who}.ulysses_sequence_parallel_size > 1 cuts the rows that `forward` takes whole: set it to 1"
            )
    if at(config, f"{model}.use_fused_kernels", False):
        found.append(f"{model}.use_fused_kernels=True leaves a plugin's `forward` without logits: set it to False")
    if at(config, f"{actor}.calculate_sum_pi_squared", False):
        found.append(f"{actor}.calculate_sum_pi_squared=True asks for what no `forward` gives: set it to False")
    if at(config, f"{actor}.use_prefix_grouper", False):
        found.append(f"{actor}.use_prefix_grouper=True does nothing in this trainer of verl, and a plugin claims `forward`: "
                     "leave it out")  # fmt: skip
    return found


def _unequal(config: Any, stack: Stack) -> list[str]:
    """Groups that must stay whole and may differ in size, where verl deals out equal parts."""
    deciding = [hook for hook in RESIZING if stack.claims(hook)]
    mini_batch = int(at(config, "actor_rollout_ref.actor.ppo_mini_batch_size", 0))
    parts = ranks(config) > 1 or mini_batch < int(at(config, "data.train_batch_size", 0))
    if not (needs_whole_units(stack) and deciding and parts):
        return []
    return [f"{', '.join(deciding)} may change the sizes of groups that must stay whole, and verl deals them out in parts of "
            "equal size: use one rank and actor_rollout_ref.actor.ppo_mini_batch_size as large as data.train_batch_size, or "
            "a stack without one of the two"]  # fmt: skip


def _unmapped(config: Any, stack: Stack, credit: bool, loss: bool) -> list[str]:
    """Settings that mean no built-in, where the stack computes that part and no plugin decides it."""
    live = stack.plan.live_hooks()
    found: dict[str, list[str]] = {}
    for hook, setting in builtins(config)[1].items():
        runs = credit if hook in CREDIT else loss
        if runs and hook in live and not stack.claims(hook) and not _method_claimed(stack, hook):
            found.setdefault(setting, []).append(hook)
    return [f"{setting} has no counterpart among the built-ins, and the stack computes {', '.join(hooks)} itself: choose "
            "another setting, or a plugin that owns it" for setting, hooks in found.items()]  # fmt: skip


def _method_claimed(stack: Stack, hook: str) -> bool:
    return hook in METHOD and any(stack.claims(name) for name in METHOD)
