"""`rlplugins doctor openrlhf`: versions, every bound point, and canaries that need neither training nor a device."""

from __future__ import annotations

import ast
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlplugins import bindings
from rlplugins.errors import ConfigurationError
from rlplugins_openrlhf import settings
from rlplugins_openrlhf.points import (
    ACTOR,
    AGENT,
    BUFFER,
    CRITIC,
    ENGINE,
    LAUNCHER,
    MAKER,
    MODEL,
    POINTS,
    SAMPLES,
    TRAINER,
)  # fmt: skip

CALLS = (
    (TRAINER, "PPOTrainer.fit", "self.samples_generator.generate_samples("),
    (TRAINER, "PPOTrainer.fit", "self.train_step("),
    (TRAINER, "PPOTrainer.fit", "self.init_checkpoint_states("),
    (TRAINER, "PPOTrainer.fit", "self.save_logs_and_checkpoints("),
    (TRAINER, "PPOTrainer.fit", "self.save_best_checkpoint("),
    (TRAINER, "BasePPOTrainer.train_step", "self.experience_maker.make_experience_batch("),
    (TRAINER, "BasePPOTrainer.train_step", "self._compute_rollout_stats("),
    (SAMPLES, "SamplesGenerator._generate_vllm", "_collect_prompt_batch("),
    (SAMPLES, "SamplesGenerator._generate_vllm", "self._dispatch_prompts_to_vllm("),
    (MAKER, "RemoteExperienceMaker.make_experience_batch", "self.make_experience("),
    (MAKER, "RemoteExperienceMaker.make_experience_batch", "self.compute_advantages_and_returns("),
    (BUFFER, "NaiveReplayBuffer.__getitem__", "self.dynamic_indices["),
    (ENGINE, "create_vllm_engines", "RolloutRayActor.options("),
    (ACTOR, "ActorPPOTrainer.ppo_train", "self.replay_buffer.sample_batch_size"),
    (ACTOR, "ActorPPOTrainer.ppo_train", "iter_grad_accum_global_norm("),
    (ACTOR, "ActorPPOTrainer.ppo_train", "self.training_step("),
    (ACTOR, "ActorPPOTrainer.training_step", "self.actor_loss_fn("),
    (ACTOR, "ActorPPOTrainer.training_step", "self.actor("),
    (ACTOR, "ActorPPOTrainer.training_step", "self.actor_scheduler.get_last_lr("),
    (ACTOR, "PolicyModelActor.fit", "self.trainer.ppo_train("),
    (ACTOR, "PolicyModelActor.forward", "self.actor("),
    (LAUNCHER, "ReferenceModelActor.forward", "self.model("),
    (MODEL, "Actor.forward", "self.model("),
    (AGENT, "SingleTurnAgentExecutor.execute", "llm_engine.generate("),
    (CRITIC, "CriticPPOTrainer.ppo_train", "iter_grad_accum_global_norm("),
    (CRITIC, "CriticPPOTrainer.training_step", "self.critic_loss_fn("),
    ("cli/train_ppo_ray.py", "train", "ray.is_initialized("),
)
"""File, function, and a call in it without which what is replaced would never be asked."""


def report() -> tuple[str, bool]:
    """The report, and whether all is well."""
    try:
        found = settings.check_version()
    except ConfigurationError as error:
        return f"  FAIL  {error}", False
    lines = [f"  openrlhf {found}; tested range {settings.RANGE}, tested {settings.TESTED}"]
    lines += [f"  {name} {_version(name)}" for name in ("ray", "deepspeed", "torch", "transformers", "vllm")]
    root = bindings.package("openrlhf")
    points, well = bindings.report(POINTS, root)
    for name, problem in (("calls", missing_calls(root)), ("loss", loss_values(root)), ("flags", unread_flags(root))):
        well = well and not problem
        points.append(f"  {'FAIL ' if problem else 'ok   '} canary    {name}{f': {problem}' if problem else ''}")
    return "\n".join([*lines, *points]), well


def _version(name: str) -> str:
    for candidate in (name, f"{name}-cpu"):
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return "not installed"


def missing_calls(root: Path) -> str:
    """Calls that OpenRLHF's own functions no longer make."""
    sources: dict[str, str] = {}
    missing = []
    for file, name, call in CALLS:
        text = sources.setdefault(file, (root / file).read_text(encoding="utf-8") if (root / file).is_file() else "")
        body = bindings.source(text, name)
        if call not in body:
            missing.append(f"{file}:{name} no longer calls {call.rstrip('(')}")
    return "; ".join(missing)


def loss_values(root: Path) -> str:
    """Whether the actor takes as many values of the loss as the stack's gives."""
    body = bindings.source((root / ACTOR).read_text(encoding="utf-8"), "ActorPPOTrainer.training_step")
    targets = [
        len(node.targets[0].elts)
        for node in ast.walk(ast.parse(body.strip() or "pass"))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and "actor_loss_fn" in ast.dump(node.value)
    ]
    wanted = settings.loss_values()
    return "" if targets == [wanted] else f"the actor takes {targets} values of its loss, tested with {wanted}"


def unread_flags(root: Path) -> str:
    """Flags whose meaning the adapter knows and the command no longer has."""
    text = (root / "cli" / "train_ppo_ray.py").read_text(encoding="utf-8")
    gone = [flag for flag in settings.READ if f'"--{flag}"' not in text]
    return f"gone: {', '.join(gone)}" if gone else ""
