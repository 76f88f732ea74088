"""Stack: the plugins of a run, resolved, checked, and called in order. An adapter's only interface."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from rlplugins import curriculum, legality, ops, registry, state
from rlplugins.defaults import Response
from rlplugins.dispatch import Scope, call, expect, expect_finite, wrapped
from rlplugins.errors import ConfigurationError, HookError, StackError, StateError
from rlplugins.files import read_yaml
from rlplugins.hookspecs import HOOKS, STATEFUL, VERSION
from rlplugins.judge import Judge, JudgeConfig, PluginJudge
from rlplugins.pairs import SIDES, Pairs
from rlplugins.plan import Implementation, Method, Owner, Plan, resolve
from rlplugins.plugin import Plugin, State, Stateful
from rlplugins.preferences import PairMiniBatch
from rlplugins.registry import Entry
from rlplugins.rollouts import (
    POLICY,
    Column,
    Columns,
    Prompts,
    ReadGuard,
    Requests,
    Rollouts,
    Sampling,
    concatenate,
    empty_rows,
)  # fmt: skip
from rlplugins.services import Engine
from rlplugins.steps import Metrics, Run, Step
from rlplugins.table import PluginTable, PromptTable
from rlplugins.trainer import Trainer, find_adapter
from rlplugins.update import MiniBatch, Reducer


class StackConfig(BaseModel):
    """A stack file."""

    model_config = ConfigDict(extra="forbid")

    plugins: list[str | dict[str, dict[str, Any] | None]] = []
    """Plugins in stack order: a name, or a name with options."""
    owners: dict[str, str | dict[str, Any]] = {}
    """Per hook the plugin or built-in that decides, or several with weights; only to settle a conflict."""
    off: list[str] = []
    """`<plugin>.<hook>`: claims to drop."""
    allow: list[str] = []
    """Facts that may be assumed although something breaks them."""
    judge: JudgeConfig | None = None
    """The endpoint that answers questions of plugins."""


@dataclass
class Credit:
    """What the credit phase made of a step's rollouts.

    Attributes:
        rewards: (B, 1), (B, N) per segment, or (B, T) per token; NaN (only with N > 1) where there is none.
        groups: (B,) int64; -1 for rows without a group, those without a finite reward included.
        segments: (B, T) int64 credit units; read by plugins only.
        advantages: (B, 1) or (B, T).
        weights: (B, 1), how often each response counts; None: once.
        token_weights: (B, T) or None: every token once.
        value_targets: (B, T) and the token mask of the critic's loss, if a critic runs.
    """

    rewards: Tensor
    groups: Tensor
    segments: Tensor | None
    advantages: Tensor
    weights: Tensor | None
    token_weights: Tensor | None
    value_targets: tuple[Tensor, Tensor] | None


@dataclass
class _Running:
    """One step while it runs."""

    step: Step
    metrics: Metrics = field(default_factory=Metrics)
    dropped: Rollouts | None = None


class Stack:
    """Plugins that are checked against each other and against a trainer.

    Args:
        plugins: names, `{name: options}`, or plugins, in stack order.
        trainer: a `Trainer`, the name of an installed adapter, or None to check against none.
        owners: per hook the plugin or built-in that decides, or several with weights.
        off: `<plugin>.<hook>` claims to drop.
        allow: facts that may be assumed although something breaks them.
        judge: the endpoint that answers questions of plugins.

    Raises:
        StackError: with every violation at once.
        ConfigurationError: if a plugin is unknown or its options are wrong.
    """

    def __init__(
        self,
        plugins: Sequence[Entry] = (),
        *,
        trainer: Trainer | str | None = None,
        owners: Mapping[str, Any] | None = None,
        off: Iterable[str] = (),
        allow: Iterable[str] = (),
        judge: JudgeConfig | Mapping[str, Any] | None = None,
    ) -> None:
        judge = read_config({"judge": judge}, "stack").judge if isinstance(judge, Mapping) else judge
        self.trainer = _trainer(trainer, judge)
        self.judge = Judge(judge)
        self._lines: dict[str, Any] = {"owners": dict(owners or {}), "off": sorted(off), "allow": sorted(allow)}
        made = [registry.make_entry(entry) for entry in plugins]
        self.plan: Plan = resolve(made, self.trainer, self._lines["owners"], self._lines["off"])
        found = legality.violations(self.plan, self._lines["allow"])
        if found:
            raise StackError(found, [plugin.name for plugin in made])
        self.plugins = self.plan.plugins
        self.metrics = Metrics()
        self._by_name = {plugin.name: plugin for plugin in self.plan.active_plugins()}
        self._guards = {name: ReadGuard(name, self.plan.reads(plugin)) for name, plugin in self._by_name.items()}
        self._live = self.plan.live_hooks()
        self._needs = self.plan.needs()
        self._items = self.plan.everything_running()
        self._running: _Running | None = None
        self._table = PromptTable()
        self._pool: Prompts | None = None
        self._categories: curriculum.Categories | None = None

    # making

    @classmethod
    def from_config(cls, config: StackConfig, trainer: Trainer | str | None = None) -> Stack:
        """A stack from a validated stack file."""
        return cls(
            config.plugins,
            trainer=trainer,
            owners=config.owners,
            off=config.off,
            allow=config.allow,
            judge=config.judge,
        )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], trainer: Trainer | str | None = None) -> Stack:
        """A stack from the mapping that a stack file holds."""
        return cls.from_config(read_config(mapping, "stack"), trainer)

    @classmethod
    def from_file(cls, path: Path | str, trainer: Trainer | str | None = None) -> Stack:
        """A stack from a YAML file."""
        return cls.from_config(read_file(Path(path)), trainer)

    @staticmethod
    def explain(config: StackConfig, trainer: Trainer | str | None = None, width: int = 110) -> tuple[str, bool]:
        """The table of who does what, and whether the stack is legal."""
        trainer = _trainer(trainer, config.judge)
        made = [registry.make_entry(entry) for entry in config.plugins]
        plan = resolve(made, trainer, config.owners, config.off)
        found = legality.violations(plan, config.allow)
        return legality.explain(plan, found, width), not found

    # what travels

    def specification(self) -> dict[str, Any]:
        """The stack as JSON: what every process builds it from, and answers the hash of."""
        return {
            "specification": VERSION,
            "plugins": [
                {"name": plugin.name, "version": _version(plugin), "options": _plain(plugin.configuration())}
                for plugin in self.plugins
            ],
            "defaults": _plain(dict(self.trainer.defaults)) if self.trainer else {},
            **self._lines,
        }

    @property
    def fingerprint(self) -> str:
        """Hash of the specification; processes with the same one run the same stack."""
        return hashlib.sha256(json.dumps(self.specification(), sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_specification(cls, specification: Mapping[str, Any], trainer: Trainer | None = None) -> Stack:
        """The same stack in another process, without state.

        Raises:
            ConfigurationError: if this process has another version of the specification or of a plugin.
        """
        if specification["specification"] != VERSION:
            raise ConfigurationError(
                f"hook specification {specification['specification']} is not {VERSION}, which is installed"
            )
        base = trainer or Trainer(name="worker", provides=frozenset(legality.needs.MEANINGS))
        stack = cls(
            [{item["name"]: item["options"]} for item in specification["plugins"]],
            trainer=replace(base, defaults=specification["defaults"], extras=()),
            owners=specification["owners"], off=specification["off"], allow=specification["allow"],
        )  # fmt: skip
        here = {plugin.name: _version(plugin) for plugin in stack.plugins}
        for item in specification["plugins"]:
            if here[item["name"]] != item["version"]:
                raise ConfigurationError(
                    f"{item['name']} {here[item['name']]} is installed here, the run uses {item['version']}"
                )
        return stack

    # questions of adapters

    def claims(self, hook: str) -> bool:
        """Whether a plugin decides or contributes to the hook; else the trainer does as configured."""
        return self.plan.claimed(hook)

    def takes(self, argument: str, phase: str | None = None) -> bool:
        """Whether anything that runs takes this argument (`values`, `entropy`, ...), in one phase or in any."""
        return any(
            argument in item.arguments and item.hook in self._live
            for item in self._items if phase is None or HOOKS[item.hook].phase == phase
        )  # fmt: skip

    def needs(self, kind: str, value: str = "") -> bool:
        """Whether some plugin has this need (optional ones included)."""
        return any(need.kind == kind and value in ("", need.value) for need in self._needs)

    @property
    def needed_columns(self) -> frozenset[str]:
        """Columns that some plugin declared, in any phase."""
        return frozenset(need.value for need in self._needs if need.kind == "column")

    @cached_property
    def group_sizes(self) -> tuple[int, float]:
        """Smallest and largest number of responses per prompt that every plugin admits."""
        return legality.group_sizes(self.plan)

    # a run

    def start(self, run: Run) -> None:
        """Make every plugin's state; to be called once, before the first step or `load`."""
        self._table, self._pool = run.prompt_table, run.pool
        for plugin in self._by_name.values():
            table = PluginTable(self._table, plugin.name)
            object.__setattr__(plugin, "table", table)
            object.__setattr__(plugin, "state", State(plugin.init_state(replace(run, table=table))))

    def begin_step(self, number: int, total_steps: int, seed: int = 0) -> None:
        """Open a step; metrics start anew."""
        self._running = _Running(Step(number, total_steps, seed))
        self.metrics = self._running.metrics

    @contextlib.contextmanager
    def step_ahead(self, number: int, total_steps: int, seed: int = 0) -> Iterator[None]:
        """Open a step to come for its prompt hooks, in a trainer that generates ahead; then the one that runs goes on."""
        running = self._running
        self.begin_step(number, total_steps, seed)
        ahead = self.metrics
        try:
            yield
        finally:
            self._running = running
            if running is not None:
                self.metrics = running.metrics
                self.metrics.merge(ahead)

    @property
    def step(self) -> Step:
        """The step that runs."""
        return self._current.step

    @property
    def _current(self) -> _Running:
        if self._running is None:
            raise RuntimeError("no step is running; call begin_step first")
        return self._running

    # prompts

    def choose_prompts(self, pool: Prompts, count: int) -> Tensor:
        """Which prompts the step trains on: (M,) int64 positions in the pool."""
        scope = self._scope({"prompts": pool, "prompt_weights": None, "count": count})
        if self.plan.running("prompt_weights"):
            scope["prompt_weights"] = weights = self._product("prompt_weights", scope, [(len(pool),)])
            if not bool((weights > 0).any()):
                names = ", ".join(item.plugin.name for item in self.plan.running("prompt_weights"))
                raise HookError(names, "prompt_weights", "no prompt of the pool has a weight above 0")
            self._categories = self._categories or curriculum.Categories(pool)
            curriculum.log_weights(self.metrics, weights, self._categories)

        def positions(item: Implementation, value: Any) -> Tensor:
            chosen = expect(item, value, [(count,)])
            if chosen.dtype != torch.int64 or bool(((chosen < 0) | (chosen >= len(pool))).any()):
                raise HookError(item.plugin.name, item.hook, f"positions must be int64 in 0..{len(pool) - 1}")
            return chosen

        return self._owned("choose_prompts", scope, positions)

    def allocate_rollouts(self, prompts: Prompts, budget: int) -> Tensor:
        """Responses per chosen prompt, (M,) int64."""

        def allowed(item: Implementation, value: Any) -> Tensor:
            counts = expect(item, value, [(len(prompts),)])
            if counts.dtype != torch.int64 or int(counts.min()) < 1:
                raise HookError(item.plugin.name, item.hook, "counts must be int64 and at least 1")
            if int(counts.sum()) > max(budget, len(prompts)):
                raise HookError(item.plugin.name, item.hook, f"gave out {int(counts.sum())} of {budget} responses")
            return counts

        return self._owned("allocate_rollouts", self._scope({"prompts": prompts, "budget": budget}), allowed)

    def rewrite_prompts(self, requests: Requests) -> Requests:
        """The requests as they will be sent."""
        return self._chain("rewrite_prompts", "requests", requests, self._scope({}), self._same_rows)

    def sampling_params(self, requests: Requests, sampling: Sampling) -> Sampling:
        """How each request is drawn."""
        return self._chain(
            "sampling_params", "sampling", sampling, self._scope({"requests": requests}), self._same_rows
        )

    @staticmethod
    def _same_rows(item: Implementation, before: Any, after: Any) -> Any:
        if type(after) is not type(before) or len(after) != len(before):
            raise HookError(item.plugin.name, item.hook, f"must return {type(before).__name__} of {len(before)} rows")
        return after

    def process_logits(self, logits: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """Next-token logits (N, V) as the stack wants them; only if `claims("process_logits")`."""
        scope = Scope({"logits": logits, "numbers": numbers})
        return self._owned("process_logits", scope, lambda item, value: expect(item, value, [tuple(logits.shape)]))

    # rollouts

    def extend_rollouts(self, rollouts: Rollouts, engine: Engine) -> Rollouts:
        """The rollouts after every plugin has added, replaced and removed rows."""
        scope = self._scope({"engine": engine, "prompts": self._pool}, judge=self._judge)
        scope.renew("rollouts", self._guarded(rollouts))
        kinds = {POLICY, *rollouts.kinds, *(kind for plugin in self.plugins for kind in plugin.kinds)}

        def checked(item: Implementation, before: Any, after: Any) -> Rollouts:
            if not isinstance(after, Rollouts):
                raise HookError(item.plugin.name, item.hook, f"returned {type(after).__name__}, not Rollouts")
            if unknown := sorted(set(after.kinds) - kinds):
                raise HookError(item.plugin.name, item.hook, f"added rows of the kinds {', '.join(unknown)}, which no plugin "
                                "names: add them to its `kinds`")  # fmt: skip
            return after.unguarded()

        def combine() -> Rollouts:
            extended = rollouts
            for item in self.plan.lists.get("extend_rollouts", []):
                scope.renew("rollouts", self._guarded(extended))
                with self._open_state(item.plugin):
                    extended = checked(item, extended, call(item, scope))
            return extended

        return self._wrapped("extend_rollouts", scope, combine, checked)

    def filter_rollouts(self, rollouts: Rollouts) -> Rollouts:
        """The rows that stay; the dropped ones come back in `end_step`."""
        if not self.plan.running("filter_rollouts"):
            return rollouts
        scope = self._row_scope(rollouts, {"scores": rollouts.scores, "groups": rollouts.groups})
        keep = self._product("filter_rollouts", scope, [(len(rollouts), 1)], rollouts)
        if bool(((keep != 0) & (keep != 1)).any()):
            names = ", ".join(item.plugin.name for item in self.plan.running("filter_rollouts"))
            raise HookError(names, "filter_rollouts", "must return 0 (drop) or 1 (keep)")
        kept = keep.flatten() > 0
        if bool(kept.all()):
            return rollouts
        self._current.dropped = rollouts.select(~kept)
        self.metrics.log("rollouts/kept", kept.float().mean())
        return rollouts.select(kept)

    # credit

    def credit(self, rollouts: Rollouts, engine: Engine | None = None) -> Credit:
        """Advantages and weights of the step's rollouts."""
        mask = rollouts.mask
        parts = rollouts.components if rollouts.components is not None else rollouts.scores
        values: dict[str, Any] = {"mask": mask, "scores": rollouts.scores, "components": parts, "engine": engine}
        values["credit"] = lambda rewards: self._credit_of(rewards, rollouts)
        scope = self._row_scope(rollouts, values, judge=self._judge)
        self._everyone("prepare_step", scope)
        return self._from_rewards(scope, self._rewards(scope, rollouts), rollouts)

    def _credit_of(self, rewards: Tensor, rollouts: Rollouts) -> Tensor:
        """The `credit` service: the advantages that other rewards would have."""
        parts = rollouts.components if rollouts.components is not None else rollouts.scores
        scope = self._row_scope(rollouts, {"mask": rollouts.mask, "scores": rollouts.scores, "components": parts})
        rewards = self._shaped_rewards(rewards, scope, rollouts)
        return self._from_rewards(scope, rewards, rollouts, advantages_only=True).advantages

    def _rewards(self, scope: Scope, rollouts: Rollouts) -> Tensor:
        rows, tokens = rollouts.mask.shape

        def checked(item: Implementation, value: Any) -> Tensor:
            if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] != rows:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise HookError(
                    item.plugin.name, item.hook, f"returned {shape}, not ({rows}, 1), ({rows}, N) or ({rows}, {tokens})"
                )
            return value

        return self._shaped_rewards(self._owned("combine_rewards", scope, checked).float(), scope, rollouts)

    def _shaped_rewards(self, rewards: Tensor, scope: Scope, rollouts: Rollouts) -> Tensor:
        def checked(item: Implementation, before: Tensor, after: Any) -> Tensor:
            after = expect(item, after, [tuple(before.shape)])
            foreign = self._foreign(item.plugin, rollouts, rollouts.groups)
            return after if foreign is None else torch.where(foreign, before, after)

        return self._chain("shape_rewards", "rewards", rewards, scope, checked)

    def _from_rewards(self, scope: Scope, rewards: Tensor, rollouts: Rollouts, advantages_only: bool = False) -> Credit:
        """From rewards to advantages and weights: the hooks after `shape_rewards`, in the order of the specification."""
        rows, mask = len(rollouts), rollouts.mask
        finite = rewards.isfinite()
        rewards = torch.where(finite, rewards, torch.nan)
        scope["rewards"] = rewards
        scope["segments"] = self._segments(scope, rewards, mask)
        scope["groups"] = rollouts.groups
        groups = self._owned("assign_groups", scope, lambda item, value: _expect_integers(item, value, (rows,)))
        present = finite.any(1) | ((rollouts.groups < 0) & (groups < 0))  # what was in no group needs no reward
        assigned = groups
        scope["groups"] = groups = torch.where(finite.any(1), groups, -1)
        if rewards.shape[1] == 1:
            scope["rewards"] = rewards = torch.nan_to_num(rewards)
        self._check_facts(rewards, groups, assigned)
        advantages = self._advantages(scope, rows, groups)
        scope["advantages"] = advantages
        advantages = self._shaped_advantages(scope, rollouts, groups)
        scope["advantages"] = advantages
        if advantages_only:
            return Credit(rewards, groups, scope["segments"], advantages, None, None, None)
        targets = None
        if "value_targets" in self._live and rollouts.values is not None:
            targets = self._owned("value_targets", scope, self._targets(tuple(mask.shape)))
        weights = self._weights(scope, rollouts, groups, present)
        scope["weights"] = weights if weights is not None else rewards.new_ones((rows, 1))
        token_weights = self._token_weights(scope, rollouts, groups, finite)
        return Credit(rewards, groups, scope["segments"], advantages, weights, token_weights, targets)

    @staticmethod
    def _targets(shape: tuple[int, ...]) -> Callable[[Implementation, Any], tuple[Tensor, Tensor]]:
        def checked(item: Implementation, value: Any) -> tuple[Tensor, Tensor]:
            if not isinstance(value, tuple) or len(value) != 2:
                raise HookError(item.plugin.name, item.hook, f"must return targets and mask, {shape} each")
            return expect(item, value[0], [shape]), expect(item, value[1], [shape])

        return checked

    def _segments(self, scope: Scope, rewards: Tensor, mask: Tensor) -> Tensor | None:
        """The credit units (B, T), if there are any but the whole response."""
        owners = [claim for method in self.plan.methods for _, claim in method.owners["compute_advantages"]]
        taken = any("segments" in claim.implementation.arguments for claim in owners)
        if not self.plan.claimed("segment_tokens") and (rewards.shape[1] == 1 or not taken):
            return None
        if rewards.shape[1] > 1 and taken and isinstance(self._single("segment_tokens").plugin, Response):
            raise HookError(self._single("combine_rewards").plugin.name, "combine_rewards", "returned "
                            f"{rewards.shape[1]} rewards per response, but the whole response is one unit of credit: claim "
                            "segment_tokens, or write `owners: {segment_tokens: token}` for rewards per token")  # fmt: skip
        shape = tuple(mask.shape)
        return self._owned("segment_tokens", scope, lambda item, value: _expect_integers(item, value, shape))

    def _check_facts(self, rewards: Tensor, groups: Tensor, assigned: Tensor) -> None:
        """What was assumed and can be measured."""
        allowed = set(self._lines["allow"])
        assumed: dict[str, str] = {}
        for plugin in self._by_name.values():
            for fact in set(plugin.assumes) - allowed:
                assumed.setdefault(fact, plugin.name)
        counted = rewards[groups >= 0]
        if "response_rewards" in assumed and rewards.shape[1] != 1:
            shape = tuple(rewards.shape)
            raise HookError(assumed["response_rewards"], "combine_rewards", f"assumes response_rewards (one reward per "
                            f"response), but rewards have shape {shape}")  # fmt: skip
        if "unit_rewards" in assumed and bool(((counted < 0) | (counted > 1)).any()):
            low, high = float(counted.nan_to_num().min()), float(counted.nan_to_num().max())
            raise HookError(assumed["unit_rewards"], "combine_rewards", f"assumes unit_rewards (rewards in [0, 1]), got "
                            f"{low:g} to {high:g}; change the reward function or write `allow: [unit_rewards]`")  # fmt: skip
        if "equal_groups" in assumed and bool((assigned >= 0).any()):  # a missing reward is no clash of sizes
            sizes = ops.group_sizes(assigned)[assigned >= 0]
            if int(sizes.min()) != int(sizes.max()):
                raise HookError(assumed["equal_groups"], "assign_groups", "assumes groups of equal size (equal_groups), got "
                                f"{int(sizes.min())} to {int(sizes.max())} responses")  # fmt: skip
        if self.group_sizes[0] > 1 and bool((groups >= 0).any()):
            alone = (ops.group_sizes(groups) == 1).float()
            self.metrics.log("rollouts/groups_of_one", alone.mean())

    def _advantages(self, scope: Scope, rows: int, groups: Tensor) -> Tensor:
        """Baseline, scale and advantages, once per method of the mix; rows of group -1 get 0."""
        methods = self.plan.methods
        shapes = [(rows, 1), tuple(scope["mask"].shape)]
        outside = (groups < 0)[:, None] if bool((groups < 0).any()) else None
        if len(methods) == 1:  # its wrappers may take what it is made of
            self._prepare_method(scope, methods[0], rows)

        def clean(item: Implementation, before: Any, after: Any) -> Tensor:
            after = expect(item, after, shapes)
            if after.shape[1] > 1:
                after = ops.masked(after, scope["mask"])
            if outside is not None:
                after = torch.where(outside, 0.0, after)
            expect_finite(item, after, "a row with a finite reward")
            return after

        def combine() -> Tensor:
            total: Tensor | None = None
            for method in methods:
                if len(methods) > 1:
                    self._prepare_method(scope, method, rows)
                part = self._mixed(method.owners["compute_advantages"], scope, shapes)
                part = clean(method.owners["compute_advantages"][0][1].implementation, None, part)
                part = part * method.weight if method.weight != 1 else part
                total = part if total is None else total + part
            assert total is not None
            return total

        return self._wrapped("compute_advantages", scope, combine, clean)

    def _prepare_method(self, scope: Scope, method: Method, rows: int) -> None:
        """Baseline and scale of one method, where its advantages (or wrappers) take them."""
        wanted = {name for _, claim in method.owners["compute_advantages"] for name in claim.implementation.arguments}
        wanted |= {name for item in self.plan.wrappers.get("compute_advantages", ()) for name in item.arguments}
        shapes = [(rows, 1), tuple(scope["rewards"].shape)]
        scoped = "scale" in wanted and any(
            "baseline" in claim.implementation.arguments for _, claim in method.owners["advantage_scale"]
        )
        for hook, name in (("baseline", "baseline"), ("advantage_scale", "scale")):
            if name in wanted or (name == "baseline" and scoped):
                scope[name] = self._part(hook, method.owners[hook], scope, shapes)

    def _part(self, hook: str, owner: Owner, scope: Scope, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """A baseline or a scale, wrappers around it."""

        def checked(item: Implementation, before: Any, after: Any) -> Tensor:
            after = expect(item, after, shapes)
            if after.shape[1] == 1:
                expect_finite(item, after[scope["groups"] >= 0], "a row with a finite reward")
            return after

        def combine() -> Tensor:
            return checked(owner[0][1].implementation, None, self._mixed(owner, scope, shapes))

        return self._wrapped(hook, scope, combine, checked)

    @staticmethod
    def _mixed(owner: Owner, scope: Scope, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """The value of an owner hook: one implementation's, or the weighted sum of several."""
        total: Tensor | None = None
        for weight, claim in owner:
            value = expect(claim.implementation, call(claim.implementation, scope), shapes)
            value = value * weight if weight != 1 else value
            total = value if total is None else total + value
        assert total is not None
        return total

    def _shaped_advantages(self, scope: Scope, rollouts: Rollouts, groups: Tensor) -> Tensor:
        shapes = [(len(rollouts), 1), tuple(rollouts.mask.shape)]

        def checked(item: Implementation, before: Tensor, after: Any) -> Tensor:
            after = expect(item, after, shapes)
            foreign = self._foreign(item.plugin, rollouts, groups)
            if foreign is not None:
                after = torch.where(foreign, before, after)
            after = ops.masked(after, rollouts.mask) if after.shape[1] > 1 else after
            expect_finite(item, after, "the advantages")
            return after

        return self._chain("shape_advantages", "advantages", scope["advantages"], scope, checked)

    def _foreign(self, plugin: Plugin, rollouts: Rollouts, groups: Tensor) -> Tensor | None:
        """(B, 1) rows of no group whose kind another plugin added: not for `plugin` to change. None if there are none."""
        foreign = groups < 0
        for kind in plugin.kinds:
            foreign = foreign & ~rollouts.of_kind(kind)
        return foreign[:, None] if bool(foreign.any()) else None

    def _weights(self, scope: Scope, rollouts: Rollouts, groups: Tensor, present: Tensor) -> Tensor | None:
        weights = None
        if self.plan.running("select_samples"):
            weights = self._product("select_samples", scope, [(len(rollouts), 1)], rollouts, groups)
        if not bool(present.all()):
            there = present[:, None].to(torch.float32)
            weights = there if weights is None else weights * there
        return weights

    def _token_weights(self, scope: Scope, rollouts: Rollouts, groups: Tensor, finite: Tensor) -> Tensor | None:
        weights = None
        if self.plan.running("select_tokens"):
            weights = self._product("select_tokens", scope, [tuple(rollouts.mask.shape)], rollouts, groups)
            weights = ops.masked(weights, rollouts.mask)
        if scope["segments"] is not None and not bool(finite[finite.any(1)].all()):
            absent = ~finite & finite.any(1, keepdim=True)
            missing = ops.spread_segments(absent.float(), scope["segments"]) > 0
            there = (~missing & rollouts.mask).float()
            weights = there if weights is None else weights * there
        return weights

    # update

    def update_columns(self, rollouts: Rollouts, credit: Credit) -> dict[str, Column]:
        """The columns that the update needs: the frame's, those that its hooks declared, those that plugins wrote."""
        columns: dict[str, Column] = {
            "mask": rollouts.mask,
            "advantages": credit.advantages,
            "rewards": credit.rewards,
            "groups": credit.groups,
            "kind": rollouts.kind,
        }
        optional = {
            "old_log_probs": rollouts.old_log_probs,
            "weights": credit.weights,
            "token_weights": credit.token_weights,
            "segments": credit.segments,
        }
        if credit.value_targets is not None:
            targets, counted = credit.value_targets
            optional |= {"value_targets": targets, "value_mask": counted, "values": rollouts.values}
        columns |= {name: column for name, column in optional.items() if column is not None}
        declared = {name for plugin in self._updating_plugins for name in self._guards[plugin.name].declared}
        for name in sorted((declared | rollouts.columns.written) - set(columns)):
            column = rollouts.get(name)
            if column is not None:
                columns[name] = column
        return columns

    def gradient_columns(self, rollouts: Rollouts, advantages: Tensor) -> dict[str, Column]:
        """The columns of an update with these advantages, (B, 1) or (B, T), in which every row and token counts once."""
        plain = rollouts.unguarded()
        rewards = plain.scores.nan_to_num()
        return self.update_columns(plain, Credit(rewards, plain.groups, None, advantages.detach(), None, None, None))

    @cached_property
    def _updating_plugins(self) -> list[Plugin]:
        """Plugins with a hook in the update."""
        items = [item for item in self._items if HOOKS[item.hook].phase == "update"]
        return list(dict.fromkeys(item.plugin for item in items))

    def mini_batch(
        self,
        columns: Mapping[str, Column],
        shared: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        kinds: Sequence[str] = (POLICY,),
        reduce: Reducer | None = None,
        log_probs: Tensor | None = None,
        metrics: Metrics | None = None,
    ) -> MiniBatch:
        """Open a mini-batch on this rank; see `MiniBatch`."""
        if shared is None:
            shared = self.step.shared_by_all() if self._running else {}
        return MiniBatch(self.plan, self._guards, columns, shared, kinds, reduce, log_probs, metrics or self.metrics)

    def forward(self, model: Any, batch: Any, temperature: float) -> tuple[Tensor, Tensor | None]:
        """Log-probs, and entropies if asked for, of a packed batch; only if `claims("forward")`."""
        shape = [tuple(batch.mask.shape)]

        def checked(item: Implementation, result: Any) -> tuple[Tensor, Tensor | None]:
            if not isinstance(result, tuple) or len(result) != 2:
                raise HookError(item.plugin.name, item.hook, "must return log-probs, and entropies or None")
            log_probs, entropy = result
            return expect(item, log_probs, shape), expect(item, entropy, shape) if entropy is not None else None

        scope = Scope({"model": model, "batch": batch, "temperature": temperature})
        return self._owned("forward", scope, checked)

    @property
    def needs_mini_batch_log_probs(self) -> bool:
        """Whether `mini_batch` must be given the current log-probs of all its rows."""
        return self.needs("mini_batch_log_probs")

    # preferences

    def build_preferences(self, pairs: Pairs) -> Pairs:
        """The step's pairs as every plugin has changed them."""
        if not self.plan.running("build_preferences"):
            return pairs

        def checked(item: Implementation, before: Any, after: Any) -> Pairs:
            if not isinstance(after, Pairs):
                raise HookError(item.plugin.name, item.hook, f"returned {type(after).__name__}, not Pairs")
            for name in ("weights", *(f"{side}_token_weights" for side in SIDES)):
                weights = getattr(after, name)
                if weights is not None:
                    expect(item, weights, [(len(after), 1) if name == "weights" else tuple(after.chosen_mask.shape)])
                    if not bool(((weights >= 0) & (weights < torch.inf)).all()):
                        raise HookError(item.plugin.name, item.hook, f"{name} must be finite and >= 0")
            return after.guarded(None)

        def combine() -> Pairs:
            built = pairs
            for item in self.plan.lists.get("build_preferences", []):
                scope.renew("pairs", self._guarded_pairs(built))
                built = checked(item, built, call(item, scope))
            return built

        scope = self._scope({})
        scope.renew("pairs", self._guarded_pairs(pairs))
        return self._wrapped("build_preferences", scope, combine, checked)

    def _guarded_pairs(self, pairs: Pairs) -> Callable[[str], Pairs]:
        return lambda plugin: pairs.guarded(self._guards[plugin])

    def pair_columns(self, pairs: Pairs) -> dict[str, Column]:
        """The columns that the update needs: the frame's, those that its hooks declared, those that plugins wrote."""
        names = ("chosen_mask", "rejected_mask", "weights", "chosen_token_weights", "rejected_token_weights")
        columns = {name: getattr(pairs, name) for name in names if getattr(pairs, name) is not None}
        wanted = pairs.columns.written | {name for guard in self._guards.values() for name in guard.declared}
        return columns | {name: pairs.columns[name] for name in sorted(wanted & set(pairs.columns))}

    def pair_mini_batch(
        self,
        columns: Mapping[str, Column],
        shared: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        reduce: Reducer | None = None,
        metrics: Metrics | None = None,
    ) -> PairMiniBatch:
        """Open a mini-batch of pairs on this rank; see `PairMiniBatch`."""
        if shared is None:
            shared = self.step.shared_by_all() if self._running else {}
        return PairMiniBatch(self.plan, self._guards, columns, shared, reduce, metrics or self.metrics)

    # life

    def reference_policy(self) -> str:
        """`initial`, or `current` to copy the policy's weights into the reference now."""

        def checked(item: Implementation, wanted: Any) -> str:
            if wanted not in ("initial", "current"):
                raise HookError(item.plugin.name, item.hook, f"returned {wanted!r}, not 'initial' or 'current'")
            return str(wanted)

        return self._owned("reference_policy", self._scope({}), checked)

    def end_step(self, rollouts: Rollouts, credit: Credit | None, engine: Engine | None = None) -> None:
        """After the update: every plugin's `on_step_end` on all rows of the step; counts the prompts' visits."""
        rows, everything = len(rollouts), rollouts
        dropped = self._current.dropped
        if dropped is not None:
            everything = concatenate([rollouts.unguarded(), _with_passes_of(rollouts.unguarded(), dropped)])
        more = len(everything) - rows
        values = _life_columns(everything, credit, rows, more)
        scope = self._row_scope(everything, values | {"engine": engine, "scores": everything.scores})
        self._everyone("on_step_end", scope)
        curriculum.log_rollouts(self.metrics, everything, self._table, len(self._pool or ()))
        rows_seen = everything.prompt_rows[everything.of_kind(POLICY)]
        self._table.visit(rows_seen.cpu(), self.step.number)

    def validated(self, metrics: Mapping[str, float], engine: Engine | None = None) -> None:
        """After a validation: every plugin's `on_validation`."""
        scope = self._scope({"metrics": metrics, "engine": engine})
        self._everyone("on_validation", scope)

    # state

    def save(self, folder: Path | str, step: int) -> None:
        """Write the state of every plugin and the prompt table to `folder`, without pickle."""
        states = {plugin.name: plugin.state.as_dict() for plugin in self._by_name.values() if plugin.state.as_dict()}
        versions = {plugin.name: plugin.state_version for plugin in self.plugins}
        notes = {"step": step, "plugins": versions, "stack": self.specification(), "judge": self.judge.requests}
        state.save(Path(folder), states, notes, self._table)

    def load(self, folder: Path | str) -> int:
        """Restore what `save` wrote, after `start`; returns the step that was saved.

        Raises:
            StateError: if it belongs to another stack or another version of a plugin's state.
        """
        states, notes, table = state.load(Path(folder))
        self._expect_own(Path(folder), notes)
        self._table.restore(table)
        if self._pool is not None:
            self._pool.rows = self._table.resolve(self._pool.keys)
        for plugin in self._by_name.values():
            fresh = plugin.state.as_dict()
            saved = states.get(plugin.name, {})
            if set(fresh) != set(saved):
                raise StateError(
                    f"the saved state of {plugin.name} has {sorted(saved)}, this version has {sorted(fresh)}"
                )
            for name, value in fresh.items():
                if isinstance(value, Stateful):
                    saved[name] = _restored(plugin, name, value, saved[name])
            object.__setattr__(plugin, "state", State(saved))
        self.judge.requests = int(notes["judge"])
        return int(notes["step"])

    def check_state(self, folder: Path | str) -> None:
        """Raise what `load` would, as far as it shows before `start`.

        Raises:
            StateError: if it belongs to another stack or another version of a plugin's state.
        """
        self._expect_own(Path(folder), state.load(Path(folder))[1])

    def _expect_own(self, folder: Path, notes: Mapping[str, Any]) -> None:
        mine = {plugin.name: plugin.state_version for plugin in self.plugins}
        if notes["plugins"] != mine:
            raise StateError(_difference(folder, notes["plugins"], mine))

    # calling

    def _scope(self, values: Mapping[str, Any], **personal: Callable[[str], Any]) -> Scope:
        step = self._current.step
        return Scope(values, personal={"step": step.of, "log": self.metrics.logger, **personal})

    def _row_scope(self, rollouts: Rollouts, values: Mapping[str, Any], **personal: Callable[[str], Any]) -> Scope:
        """A scope whose hooks may also take the rollouts and their declared columns."""
        lazy = {name: (lambda scope, name=name: rollouts[name]) for name in ("entropy", "values", "ref_log_probs")}
        own = {"step": self._current.step.of, "log": self.metrics.logger, "rollouts": self._guarded(rollouts)}
        return Scope({"mask": rollouts.mask, **values}, lazy, own | personal)

    def _judge(self, plugin: str) -> PluginJudge:
        """The judge as this plugin sees it."""
        return self.judge.logging(self.metrics.logger(plugin))

    def _guarded(self, rollouts: Rollouts) -> Callable[[str], Rollouts]:
        return lambda plugin: rollouts.guarded(self._guards[plugin])

    def _single(self, hook: str) -> Implementation:
        """The implementation that is named in errors about the hook's result."""
        return self.plan.owners[hook][POLICY][0][1].implementation

    def _owned(self, hook: str, scope: Scope, check: Callable[[Implementation, Any], Any]) -> Any:
        """The value of an owner hook (or the weighted sum of a mix), wrappers around it; `check` sees what each returns."""
        owner = self.plan.owners[hook][POLICY]

        def combine() -> Any:
            parts = []
            for weight, claim in owner:
                item = claim.implementation
                with self._open_state(item.plugin, hook):
                    part = check(item, call(item, scope))
                parts.append(part if weight == 1 else weight * part)
            return parts[0] if len(parts) == 1 else sum(parts)

        return self._wrapped(hook, scope, combine, lambda item, before, after: check(item, after))

    def _everyone(self, hook: str, scope: Scope) -> None:
        """Call all implementations of a hook that gives nothing, wrappers around them."""

        def combine() -> None:
            for item in self.plan.lists.get(hook, []):
                with self._open_state(item.plugin, hook):
                    call(item, scope)

        self._wrapped(hook, scope, combine)

    def _wrapped(
        self, hook: str, scope: Scope, combine: Callable[[], Any],
        check: Callable[[Implementation, Any, Any], Any] | None = None,
    ) -> Any:  # fmt: skip
        """`combine` with the hook's wrappers around it, which may set their state where the hook may."""
        wrappers = self.plan.wrappers.get(hook, ())
        with contextlib.ExitStack() as opened:
            for item in wrappers:
                opened.enter_context(self._open_state(item.plugin, hook))
            return wrapped(wrappers, scope, combine, check)

    def _chain(
        self, hook: str, name: str, value: Any, scope: Scope,
        check: Callable[[Implementation, Any, Any], Any] = lambda item, before, after: after,
    ) -> Any:  # fmt: skip
        """`value` passed through each implementation in order, wrappers around the whole chain."""

        def combine() -> Any:
            for item in self.plan.lists.get(hook, []):
                scope[name] = check(item, scope[name], call(item, scope))
            return scope[name]

        scope[name] = value
        return self._wrapped(
            hook, scope, combine, lambda item, before, after: check(item, value if before is None else before, after)
        )

    def _product(
        self, hook: str, scope: Scope, shapes: Sequence[tuple[int, ...]], rollouts: Rollouts | None = None,
        groups: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The product of all weights, each finite and >= 0; rows of another plugin's kind keep weight 1."""

        def checked(item: Implementation, before: Any, after: Any) -> Tensor:
            weights = expect(item, after, shapes).float()
            if rollouts is not None:
                foreign = self._foreign(item.plugin, rollouts, rollouts.groups if groups is None else groups)
                weights = (
                    weights if foreign is None else torch.where(foreign, 1.0 if before is None else before, weights)
                )
            low, high = weights.aminmax() if weights.numel() else (0.0, 0.0)  # NaN if one is
            if not (low >= 0 and high < torch.inf):
                raise HookError(item.plugin.name, item.hook, "weights must be finite and >= 0")
            return weights

        def combine() -> Tensor:
            factors = [checked(item, None, call(item, scope)) for item in self.plan.lists.get(hook, [])]
            if not factors:  # only wrappers
                return torch.ones(shapes[0], device=None if rollouts is None else rollouts.mask.device)
            return functools.reduce(torch.mul, factors)

        return self._wrapped(hook, scope, combine, checked)

    @contextlib.contextmanager
    def _open_state(self, plugin: Plugin, hook: str = "on_step_end") -> Iterator[None]:
        """Let the plugin set its state, in the hooks that may."""
        opened = getattr(plugin, "state", None) if hook in STATEFUL else None
        if opened is None:
            yield
            return
        before = opened._open
        object.__setattr__(opened, "_open", True)
        try:
            yield
        finally:
            object.__setattr__(opened, "_open", before)


def _trainer(trainer: Trainer | str | None, judge: JudgeConfig | None) -> Trainer | None:
    """What a stack is checked against: the trainer, and a judge where one is configured."""
    trainer = find_adapter(trainer).configured({}) if isinstance(trainer, str) else trainer
    if trainer is None:
        return None
    return replace(trainer, provides=trainer.provides | {"judge"}) if judge is not None else trainer


def read_config(mapping: Any, where: str) -> StackConfig:
    """A validated stack file from a mapping; `where` names it in errors."""
    try:
        return StackConfig.model_validate(mapping if mapping is not None else {})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors())
        raise ConfigurationError(f"{where}: {problems} (fields: {', '.join(StackConfig.model_fields)})") from None


def read_file(path: Path) -> StackConfig:
    """A validated stack file.

    Raises:
        ConfigurationError: if it is missing, no YAML, or has an unknown field.
    """
    return read_config(read_yaml(path, "stack file"), str(path))


def _version(plugin: Plugin) -> str:
    """Version of the distribution that the plugin's module belongs to."""
    module = type(plugin).__module__.partition(".")[0]
    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:
        return "none"


def _plain(value: Any) -> Any:
    """The value as JSON would give it back."""
    return json.loads(json.dumps(value, default=str))


def _expect_integers(item: Implementation, value: Any, shape: tuple[int, ...]) -> Tensor:
    """`value`, if it is an int64 tensor of this shape that holds -1 and more."""
    value = expect(item, value, [shape])
    if value.dtype != torch.int64 or (value.numel() and int(value.min()) < -1):
        raise HookError(item.plugin.name, item.hook, f"must return int64 numbers, -1 or more; got {value.dtype}")
    return value


_PASSES = ("old_log_probs", "ref_log_probs", "entropy", "values")


def _with_passes_of(rollouts: Rollouts, dropped: Rollouts) -> Rollouts:
    """The dropped rows with zeros for what the log-prob passes and the credit phase, which they never had, gave the others."""
    nothing = dropped.mask.float() * 0
    passes: dict[str, Any] = {name: nothing for name in _PASSES if getattr(rollouts, name) is not None}
    columns = {name: empty_rows(rollouts.columns[name], len(dropped)) for name in rollouts.columns.written}
    return replace(dropped.unguarded(), columns=Columns(columns | dict(dropped.columns)), **passes)


def _life_columns(everything: Rollouts, credit: Credit | None, rows: int, more: int) -> dict[str, Any]:
    """The credit of all rows of the step, the dropped ones at the end."""
    total = rows + more
    if credit is None:
        missing = torch.full((total, 1), torch.nan)
        nothing = torch.zeros((total, 1))
        return {"rewards": missing, "advantages": missing, "groups": torch.full((total,), -1), "weights": nothing,
                "token_weights": nothing}  # fmt: skip
    weights = credit.weights if credit.weights is not None else credit.rewards.new_ones((rows, 1))
    token_weights = credit.token_weights if credit.token_weights is not None else weights.new_ones((rows, 1))
    pad = torch.nn.functional.pad
    return {
        "rewards": pad(credit.rewards, (0, 0, 0, more), value=torch.nan),
        "advantages": pad(credit.advantages, (0, 0, 0, more), value=torch.nan),
        "groups": pad(credit.groups, (0, more), value=-1),
        "weights": pad(weights, (0, 0, 0, more)),
        "token_weights": pad(token_weights, (0, 0, 0, more)),
    }


def _restored(plugin: Plugin, name: str, model: Stateful, saved: Any) -> Stateful:
    """The model with what was saved of it."""
    try:
        model.load_state_dict(saved)
    except Exception as error:
        raise StateError(f"the saved {name} of {plugin.name} does not fit this run's: {error}") from error
    return model


def _difference(folder: Path, saved: Mapping[str, int], mine: Mapping[str, int]) -> str:
    """Why a state does not fit, and what to do."""
    parts = []
    if missing := sorted(set(saved) - set(mine)):
        parts.append(f"it has the state of {', '.join(missing)}, which this stack lacks")
    if extra := sorted(set(mine) - set(saved)):
        parts.append(f"this stack has {', '.join(extra)}, which it lacks")
    for name in sorted(set(saved) & set(mine)):
        if saved[name] != mine[name]:
            parts.append(f"the state of {name} has version {saved[name]}, this plugin reads {mine[name]}")
    return (
        f"the plugin state in {folder} belongs to another stack: {'; '.join(parts) or 'other order of plugins'}. "
        "Use the stack that wrote it, or start without plugin state: delete that folder or name another output folder"
    )
