"""What OpenRLHF's flags mean for a stack: built-ins, needs that can be met, and flags that cannot be combined."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlplugins.defaults import EntropyBonus
from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import HOOKS
from rlplugins.needs import Need
from rlplugins.plan import PREFERENCES
from rlplugins.plugin import BuiltinName, Plugin
from rlplugins.rollouts import DECLARED
from rlplugins.stack import Stack, StackConfig
from rlplugins.trainer import Trainer

ACTOR = "_actor"
"""Folder of OpenRLHF's checkpoints of the actor."""
TESTED = "0.11.2"
OLDEST, TOO_NEW = (0, 10, 4), (0, 12)
RANGE = ">=0.10.4,<0.12"

UNBOUND = frozenset(name for name, hook in HOOKS.items() if hook.phase == "preferences")
"""Hooks that have no place in `train_ppo_ray`."""

CREDIT = frozenset(name for name, hook in HOOKS.items() if hook.phase == "credit")
UPDATE = frozenset(name for name, hook in HOOKS.items() if hook.phase == "update") - {"forward"}
WEIGHTS = frozenset({"select_samples", "select_tokens"})
PROMPTS = frozenset(name for name, hook in HOOKS.items() if hook.phase == "prompts")
ROLLOUTS = frozenset(name for name, hook in HOOKS.items() if hook.phase == "rollouts")
RESIZING = frozenset({"allocate_rollouts", "extend_rollouts", "filter_rollouts"})
"""Hooks after which a step need not have `rollout.batch_size` groups of equal size, as OpenRLHF's own functions take it."""
GROWING = ("allocate_rollouts", "extend_rollouts", "assign_groups")
"""Hooks after which a group may have more rows than `--rollout.n_samples_per_prompt`."""
METHOD = ("baseline", "advantage_scale", "compute_advantages")
CLIPPED = (-10.0, 10.0)
"""OpenRLHF's default of `--reward.clip_range`."""


def check_version() -> str:
    """The version of OpenRLHF.

    Raises:
        ConfigurationError: if it is missing or not one that the adapter knows.
    """
    try:
        found = version("openrlhf")
    except PackageNotFoundError:
        raise ConfigurationError(f'OpenRLHF is not installed here: pip install "openrlhf{RANGE}"') from None
    if not OLDEST <= _numbers(found) < TOO_NEW:
        raise ConfigurationError(
            f"openrlhf {found} is installed, rlplugins-openrlhf binds openrlhf {RANGE} (tested: {TESTED}): install one of "
            "these, or a version of rlplugins-openrlhf for yours"
        )
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def loss_values() -> int:
    """How many values OpenRLHF's policy loss returns."""
    return 5 if _numbers(version("openrlhf")) >= (0, 11, 2) else 4


def at(args: Any, path: str, default: Any = None) -> Any:
    """The flag at a dotted path, or `default` where this version lacks it or it is None."""
    for name in path.split("."):
        args = getattr(args, name, None)
        if args is None:
            return default
    return args


def group_size(args: Any) -> int:
    """Responses per prompt."""
    return int(at(args, "rollout.n_samples_per_prompt", 1))


def budget(args: Any) -> int:
    """Responses per step."""
    return int(at(args, "rollout.batch_size", 1)) * group_size(args)


def duplicates(args: Any) -> int:
    """Processes of the actor that compute on the same rows."""
    return int(at(args, "ds.ring_attn_size", 1)) * int(at(args, "ds.tensor_parallel_size", 1))


def ranks(args: Any) -> int:
    """Processes that share a mini-batch."""
    return int(at(args, "actor.num_nodes", 1)) * int(at(args, "actor.num_gpus_per_node", 1)) // duplicates(args)


def micro_batch(args: Any) -> int:
    """Rows of a micro-batch of the update."""
    return int(at(args, "train.micro_batch_size", 4))


def why_apart(args: Any) -> str:
    """The flags that would let groups stay whole in micro-batches; empty if they do."""
    if at(args, "train.dynamic_batch_enable", False):
        return "leave out --train.dynamic_batch_enable"
    size, micro = group_size(args), micro_batch(args)
    batch, wanted = int(at(args, "train.batch_size", 128)), -(-micro // size) * size
    wrong = [(name, right) for name, given, right in (
        ("micro_batch_size", micro, wanted), ("batch_size", batch, -(-batch // (wanted * ranks(args))) * wanted * ranks(args))
    ) if given != right]  # fmt: skip
    if not wrong:
        return ""
    flags = " ".join(f"--train.{name} {right}" for name, right in wrong)
    return f"set {flags}, so that micro-batches and optimiser steps hold whole groups of {size}"


def together(stack: Stack) -> list[Need]:
    """What the stack's plugins need to have in one micro-batch, or would like to."""
    return [need for need in stack.plan.needs() if need.kind == "together"]


def must_keep_together(stack: Stack) -> bool:
    """Whether some plugin cannot do without; such a stack is refused where `why_apart` has a reason."""
    return any(need.required for need in together(stack))


def keeps_together(args: Any, stack: Stack) -> bool:
    """Whether the trainer decides which rows make a micro-batch; OpenRLHF else draws them."""
    fits = int(at(args, "train.batch_size", 128)) % (micro_batch(args) * ranks(args)) == 0
    return bool(together(stack)) and fits and not at(args, "train.dynamic_batch_enable", False)


def why_no_gradients(args: Any) -> str:
    """The flags without which `engine.gradient_products` would work; empty if it does."""
    wrong = {
        "set --ds.zero_stage 2, since stage 3 splits the parameters over the ranks": at(args, "ds.zero_stage", 2) == 3,
        "leave out --ds.ring_attn_size, which splits sequences": int(at(args, "ds.ring_attn_size", 1)) > 1,
        "leave out --ds.tensor_parallel_size, which splits the parameters": int(at(args, "ds.tensor_parallel_size", 1)) > 1,
        "leave out --ds.lora.rank: products of the gradients of adapters are untested": int(at(args, "ds.lora.rank", 0)) > 0,
        "leave out --ds.load_in_4bit, whose weights have no gradient": at(args, "ds.load_in_4bit", False),
        "set --ds.param_dtype bf16, since gradients in 16 bits vanish without a scaled loss":
            at(args, "ds.param_dtype", "bf16") == "fp16",
        "leave out --ds.deepcompile, which reduces gradients inside of the graph": at(args, "ds.deepcompile", False),
        "leave out --actor.gradient_checkpointing_reentrant, which torch.autograd.grad cannot pass":
            at(args, "actor.gradient_checkpointing_enable", False)
            and at(args, "actor.gradient_checkpointing_reentrant", False),
        "leave out --data.max_images_per_prompt: images are not passed on": int(at(args, "data.max_images_per_prompt", 0)) > 0,
        "leave out --train.async_enable": ahead(args),
    }  # fmt: skip
    return "; ".join(remedy for remedy, given in wrong.items() if given)


def ahead(args: Any) -> bool:
    """Whether generation runs in a process apart, ahead of the updates."""
    return bool(at(args, "train.async_enable", False))


def has_reference(args: Any) -> bool:
    """Whether the reference's log-probs reach the stack."""
    return float(at(args, "algo.kl.init_coef", 0.0)) > 0 and bool(at(args, "algo.kl.use_loss", False))


def has_critic(args: Any) -> bool:
    """Whether a critic runs."""
    return str(at(args, "algo.advantage.estimator")) == "gae"


def keeps_log_probs(args: Any) -> bool:
    """Whether the engine can say with which probabilities it drew: before temperature and top-p, unless it is told."""
    plain = float(at(args, "rollout.temperature", 1.0)) == 1 and float(at(args, "rollout.top_p", 1.0)) == 1
    return plain or corrects(args)


def corrects(args: Any) -> bool:
    """Whether OpenRLHF corrects for stale rollouts."""
    advantage = at(args, "algo.advantage")
    level = str(at(advantage, "is_correction_level", "off"))
    return level != "off" or bool(at(advantage, "is_correction_enable", False))


def scores_late(args: Any) -> bool:
    """Whether a reward model scores, after the hooks of the rollouts."""
    return not at(args, "reward.remote_url") and not at(args, "train.agent_func_path")


def declare(args: Any, columns: Iterable[str] | None = None) -> Trainer:
    """OpenRLHF's `train_ppo_ray` with these flags.

    Args:
        args: OpenRLHF's, nested.
        columns: columns of the prompt file; None: not read yet.
    """
    found, _ = builtins(args)
    given = {"components", "entropy"}
    given |= {"ref_log_probs"} if has_reference(args) else set()
    given |= {"values"} if has_critic(args) else set()
    given |= {"rollout_log_probs"} if keeps_log_probs(args) else set()
    coefficient = float(at(args, "actor.entropy_coef", 0.0))
    every_step = bool(at(args, "eval.dataset")) and at(args, "eval.steps", -1) == 1
    filtered = bool(at(args, "algo.dynamic_filtering_enable", False))
    apart, blocked = why_apart(args), why_no_gradients(args)
    return Trainer(
        name="openrlhf",
        binds=frozenset(HOOKS) - UNBOUND,
        provides=provides(ahead(args))
        | ({"validation_every_step"} if every_step else set())
        | (set() if apart else {"together"})
        | (set() if blocked else {"gradients"}),
        columns=None if columns is None else frozenset(given | set(columns)),
        group_size=group_size(args),
        ranks=ranks(args),
        defaults=found,
        extras=[EntropyBonus(coefficient=coefficient)] if coefficient else [],
        breaks={"complete_groups": "--algo.dynamic_filtering_enable"} if filtered else {},
        remedies=REMEDIES | {"together": apart, "gradients": blocked},
    )


REMEDIES = {
    "group_size": "set --rollout.n_samples_per_prompt {low} (1 takes --algo.advantage.estimator flash_reinforce)",
    "validation_every_step": "set --eval.dataset and --eval.steps 1",
    "column": "add the column to the prompt file",
    "column:ref_log_probs": "set --algo.kl.use_loss and an --algo.kl.init_coef above 0, 1e-9 if no penalty is wanted",
    "column:values": "set --algo.advantage.estimator gae",
    "column:rollout_log_probs": "set --rollout.temperature 1 and --rollout.top_p 1",
    "engine": "leave out --train.async_enable",
    "prompts_after_update": "leave out --train.async_enable",
    PREFERENCES: "run train_dpo",
    "one_rank": "set --actor.num_nodes 1 --actor.num_gpus_per_node 1",
}


def provides(ahead: bool) -> frozenset[str]:
    """Needs that OpenRLHF meets, with or without generation ahead of the updates."""
    always = {"mini_batch_log_probs", "current_entropy", "response_prefix", "trainable_model"}
    return frozenset(always if ahead else always | {"engine", "prompts_after_update"})


def builtins(args: Any) -> tuple[dict[str, BuiltinName], dict[str, str]]:
    """The built-in per hook that the flags mean; and per hook the flag that means none."""
    found: dict[str, BuiltinName] = {}
    missing: dict[str, str] = {}
    _advantages(args, found, missing)
    low, high = at(args, "actor.eps_clip_low_high") or [float(at(args, "actor.eps_clip", 0.2))] * 2
    found["clip_range"] = {"fixed": {"low": float(low), "high": float(high)}}
    loss = str(at(args, "actor.policy_loss_type", "ppo"))
    dual = at(args, "actor.dual_clip")
    clipped = {"ppo_clip": {} if dual is None else {"dual_clip": float(dual)}}
    known: dict[str, BuiltinName] = {"ppo": clipped, "gspo": "gspo"}
    _choose("policy_loss", known.get(loss), f"--actor.policy_loss_type {loss}", found, missing)
    by_sequence = loss == "gspo" or at(args, "actor.loss_agg_mode", "token-mean") == "seq-mean-token-mean"
    found["reduce_loss"] = "sequence_mean" if by_sequence else "token_mean"
    _penalty(args, found, missing)
    return found, missing


def _choose(
    hook: str, wanted: BuiltinName | None, flag: str, found: dict[str, BuiltinName], missing: dict[str, str]
) -> None:
    if wanted is None:
        missing[hook] = flag
    else:
        found[hook] = wanted


def _advantages(args: Any, found: dict[str, BuiltinName], missing: dict[str, str]) -> None:
    advantage = at(args, "algo.advantage")
    estimator = str(at(advantage, "estimator", "gae"))
    gamma, lam = float(at(advantage, "gamma", 1.0)), float(at(advantage, "lambd", 1.0))
    raw = bool(at(advantage, "no_std_norm", False))
    match estimator:
        case "group_norm":
            found |= {"baseline": "group_mean", "advantage_scale": {"group_std": {"eps": 1e-9}}}
        case "dr_grpo":
            found |= {"baseline": "group_mean", "advantage_scale": "one"}
        case "rloo":
            found |= {"baseline": "leave_one_out", "advantage_scale": "one"}
        case "flash_reinforce":
            found |= {"baseline": "batch_mean", "advantage_scale": "one"}
        case "reinforce" if not raw:
            found["compute_advantages"] = {"reinforce_plus_plus": {"gamma": gamma}}
        case "gae" if not raw:
            found["compute_advantages"] = {"gae": {"gamma": gamma, "lam": lam}}
        case _:
            flag = f"--algo.advantage.estimator {estimator}" + (" with no_std_norm" if raw else "")
            missing |= dict.fromkeys(METHOD, flag)


def _penalty(args: Any, found: dict[str, BuiltinName], missing: dict[str, str]) -> None:
    if not has_reference(args):
        found["kl_penalty"] = "none"
    elif at(args, "algo.kl.unbiased_gradient", False):
        missing["kl_penalty"] = "--algo.kl.unbiased_gradient"
    else:
        found["kl_penalty"] = {str(at(args, "algo.kl.estimator", "k1")): {"coefficient": float(args.algo.kl.init_coef)}}


def resizes(stack: Stack) -> bool:
    """Whether a step of the stack may have groups of unequal size, or further rows."""
    return any(stack.claims(hook) for hook in RESIZING)


def owns_credit(stack: Stack) -> bool:
    """Whether the stack computes the advantages; else OpenRLHF does, as configured."""
    return resizes(stack) or any(stack.claims(hook) for hook in CREDIT)


def owns_loss(stack: Stack) -> bool:
    """Whether the stack computes the loss, whose columns the critic's targets travel with; else OpenRLHF, as configured.

    A plugin that asks for the gradients of the stack's loss asks for those of the loss that is trained.
    """
    claimed = any(stack.claims(hook) for hook in UPDATE | WEIGHTS | {"value_targets"}) or stack.needs("gradients")
    return resizes(stack) or claimed or any(plugin.kinds for plugin in stack.plugins)


def owns_critic(args: Any, stack: Stack) -> bool:
    """Whether the critic learns what the stack says; else OpenRLHF's own targets and loss."""
    claimed = any(stack.claims(hook) for hook in ("value_targets", *WEIGHTS))
    return has_critic(args) and owns_credit(stack) and (claimed or resizes(stack))


def build_stack(args: Any, wanted: StackConfig, columns: Iterable[str] | None = None) -> Stack:
    """The checked stack.

    Args:
        args: OpenRLHF's, nested.
        wanted: the user's stack.
        columns: columns of the prompt file; None: not read yet, so only what OpenRLHF itself gives is checked.

    Raises:
        StackError: if it cannot run here.
        ConfigurationError: if a flag of OpenRLHF cannot be combined with it.
    """
    if columns is None:
        columns = Stack.from_config(wanted, declare(args)).needed_columns - DECLARED
    stack = Stack.from_config(wanted, declare(args, columns))
    if problems := refusals(args, stack):
        raise ConfigurationError("OpenRLHF's flags cannot be combined with this stack:\n" + "\n".join(
            f"- {problem}" for problem in problems))  # fmt: skip
    return stack


def state_folder(args: Any, step: int) -> Path:
    """Where the plugins' state of a step lies, beside OpenRLHF's checkpoints of the actor."""
    return Path(args.ckpt.path) / "rlplugins" / f"global_step{step}"


def check_state(args: Any, stack: Stack) -> None:
    """Look at the state that a run with these flags would go on from.

    Raises:
        StateError: if it belongs to another stack.
    """
    latest = Path(str(at(args, "ckpt.path", ""))) / ACTOR / "latest"
    if at(args, "ckpt.load_enable", False) and latest.is_file():
        folder = state_folder(args, int(latest.read_text().rpartition("step")[2] or 0))
        if folder.exists():
            stack.check_state(folder)


def refusals(args: Any, stack: Stack) -> list[str]:
    """Flags of OpenRLHF that a hook of the stack cannot be combined with, each with what to do."""
    credit, loss = owns_credit(stack), owns_loss(stack)
    return [*_credit_refusals(args, credit), *_loss_refusals(args, stack, loss), *_forward_refusals(args, stack),
            *_rollout_refusals(args, stack), *_ahead_refusals(args, stack), *_unmapped(args, stack, credit, loss)]  # fmt: skip


def _credit_refusals(args: Any, credit: bool) -> list[str]:
    found = []
    if credit and float(at(args, "algo.kl.init_coef", 0.0)) > 0 and not at(args, "algo.kl.use_loss", False):
        found.append("--algo.kl.init_coef without --algo.kl.use_loss puts the KL into rewards that the stack computes with: "
                     "add --algo.kl.use_loss, or set --algo.kl.init_coef 0")  # fmt: skip
    clip = tuple(map(float, at(args, "reward.clip_range", CLIPPED)))
    if credit and clip != CLIPPED:
        found.append("--reward.clip_range cuts what is left of a reward after its baseline, which the stack computes: leave "
                     "it out, and bound the rewards in the reward function")  # fmt: skip
    return found


def _loss_refusals(args: Any, stack: Stack, loss: bool) -> list[str]:
    found = []
    if loss and corrects(args):
        found.append(
            "--algo.advantage.is_correction_* reweights tokens in a loss that the stack computes: leave it out"
        )
    if loss and at(args, "algo.kl.target") is not None:
        found.append(
            "--algo.kl.target changes the coefficient of a KL term that the stack computes: use --algo.kl.init_coef"
        )
    if loss and at(args, "train.dynamic_batch_enable", False):
        found.append("--train.dynamic_batch_enable cuts mini-batches in a place that has no binding yet: leave it out "
                     "(--ds.packing_samples may stay)")  # fmt: skip
    growing = [hook for hook in GROWING if stack.claims(hook)]
    if growing and must_keep_together(stack):
        found.append(f"{', '.join(growing)} may make a group that must stay whole larger than --train.micro_batch_size: use a "
                     "stack without one of the two")  # fmt: skip
    if stack.claims("value_targets") and not has_critic(args):
        found.append("no critic reads value_targets: set --algo.advantage.estimator gae")
    if stack.claims("reference_policy") and int(at(args, "ds.zero_stage", 2)) == 3:
        found.append(
            "reference_policy copies weights that --ds.zero_stage 3 splits over the ranks: set --ds.zero_stage 2"
        )
    return found


def _forward_refusals(args: Any, stack: Stack) -> list[str]:
    if not stack.claims("forward"):
        return []
    wrong = {
        "--ds.ring_attn_size splits sequences": int(at(args, "ds.ring_attn_size", 1)) > 1,
        "--ds.tensor_parallel_size splits the logits": int(at(args, "ds.tensor_parallel_size", 1)) > 1,
        "--actor.aux_loss_coef takes a loss of OpenRLHF's own forward": float(at(args, "actor.aux_loss_coef", 0.0)) > 1e-8,
        "--data.max_images_per_prompt takes images": int(at(args, "data.max_images_per_prompt", 0)) > 0,
    }  # fmt: skip
    return [
        f"{reason}, and forward gets whole sequences of tokens: leave it out"
        for reason, given in wrong.items()
        if given
    ]


def _rollout_refusals(args: Any, stack: Stack) -> list[str]:
    found = []
    prompts = [hook for hook in sorted(PROMPTS) if stack.claims(hook)]
    rollouts = [hook for hook in sorted(ROLLOUTS) if stack.claims(hook)]
    if at(args, "algo.dynamic_filtering_enable", False) and prompts:
        found.append(f"--algo.dynamic_filtering_enable asks for further prompts within a step, past {', '.join(prompts)}: "
                     "leave it out and filter with a plugin")  # fmt: skip
    if scores_late(args) and rollouts:
        found.append(f"a reward model scores after {', '.join(rollouts)}: use --reward.remote_url")
    if int(at(args, "data.max_images_per_prompt", 0)) > 0 and (prompts or rollouts):
        found.append(f"rows with images cannot pass {', '.join(prompts + rollouts)} yet")
    return found


def _ahead_refusals(args: Any, stack: Stack) -> list[str]:
    """What cannot work where generation runs ahead, in a process of its own."""
    if not ahead(args):
        return []
    found = [
        f"{plugin.name} keeps a state that its {', '.join(hooks)} reads, and --train.async_enable generates in a process "
        "apart: leave --train.async_enable out"
        for plugin in stack.plugins
        if (hooks := _reads_state_early(stack, plugin))
    ]
    generated = int(at(args, "rollout.vllm_generate_batch_size", 0) or 0)
    if generated > int(args.rollout.batch_size) and any(stack.claims(hook) for hook in PROMPTS):
        found.append("--rollout.vllm_generate_batch_size mixes the prompts of several steps: leave it out")
    return found


def _reads_state_early(stack: Stack, plugin: Plugin) -> list[str]:
    stateful = type(plugin).init_state is not Plugin.init_state
    early = PROMPTS | {"extend_rollouts"}
    return [item.hook for item in stack.plan.everything_running() if item.plugin is plugin and item.hook in early
            and stateful]  # fmt: skip


def _unmapped(args: Any, stack: Stack, credit: bool, loss: bool) -> list[str]:
    """Flags that mean no built-in, where the stack computes that part and no plugin decides it."""
    live = stack.plan.live_hooks()
    found: dict[str, list[str]] = {}
    for hook, flag in builtins(args)[1].items():
        runs = credit if hook in CREDIT else loss
        if runs and hook in live and not stack.claims(hook) and not _method_claimed(stack, hook):
            found.setdefault(flag, []).append(hook)
    return [f"{flag} has no counterpart among the built-ins, and the stack computes {', '.join(hooks)} itself: choose another "
            "one, or a plugin that owns it" for flag, hooks in found.items()]  # fmt: skip


def _method_claimed(stack: Stack, hook: str) -> bool:
    return hook in METHOD and any(stack.claims(name) for name in METHOD)


def total_steps(args: Any, prompts: int) -> int:
    """Planned training steps over so many prompts."""
    each = -(-prompts // int(args.rollout.batch_size))
    return int(at(args, "train.num_episodes", 1)) * each


READ = (
    "rollout.n_samples_per_prompt", "rollout.batch_size", "rollout.micro_batch_size", "rollout.temperature", "rollout.top_p",
    "rollout.max_new_tokens",
    "train.batch_size", "train.micro_batch_size", "train.seed", "train.num_episodes", "train.async_enable",
    "train.dynamic_batch_enable",
    "train.agent_func_path", "actor.num_nodes", "actor.num_gpus_per_node", "actor.eps_clip", "actor.eps_clip_low_high",
    "actor.dual_clip", "actor.policy_loss_type", "actor.entropy_coef", "actor.aux_loss_coef",
    "actor.gradient_checkpointing_enable", "actor.gradient_checkpointing_reentrant", "critic.value_clip", "ds.ring_attn_size",
    "ds.tensor_parallel_size", "ds.zero_stage", "ds.lora.rank", "ds.load_in_4bit", "ds.param_dtype", "ds.deepcompile",
    "algo.advantage.estimator", "algo.advantage.gamma", "algo.advantage.lambd",
    "algo.advantage.no_std_norm", "algo.kl.init_coef", "algo.kl.use_loss", "algo.kl.estimator", "algo.kl.target",
    "algo.dynamic_filtering_enable", "reward.remote_url", "reward.clip_range", "eval.dataset", "eval.steps", "ckpt.path",
    "ckpt.save_steps", "ckpt.disable_ds", "data.prompt_dataset", "data.input_key", "data.max_samples", "data.max_len",
    "data.apply_chat_template", "data.max_images_per_prompt",
)  # fmt: skip
"""Flags of `train_ppo_ray` that the adapter reads and all supported versions have."""
