"""From the lines of a stack to who does what: claims, owners, orders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pluggy

from rlplugins import hookspecs, needs, registry
from rlplugins.defaults import BUILTINS, METHODS
from rlplugins.errors import ConfigurationError, Violation
from rlplugins.hookspecs import HOOKS, PROJECT, Rule
from rlplugins.pairs import SIDES
from rlplugins.plugin import BuiltinName, Plugin
from rlplugins.rollouts import DECLARED, POLICY
from rlplugins.trainer import Trainer

ADVANTAGE_HOOKS = ("baseline", "advantage_scale", "compute_advantages")
"""The hooks that together make a method of computing advantages; a mix evaluates them once per method."""


@dataclass(frozen=True, eq=False)
class Implementation:
    """One plugin's (or built-in's) implementation of one hook."""

    plugin: Plugin
    hook: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    kind: str = POLICY

    def __str__(self) -> str:
        """`plugin.hook`, with the row kind where it is not the policy's."""
        return f"{self.plugin.name}.{self.hook}" + (f" (kind {self.kind})" if self.kind != POLICY else "")


@dataclass(frozen=True, eq=False)
class Claim:
    """An implementation together with the plugin that claims the hook with it (itself, or by `uses`)."""

    by: str
    implementation: Implementation

    def same_as(self, other: Implementation) -> bool:
        """Whether `other` is this implementation, or the same built-in with the same options."""
        mine = self.implementation
        if mine.hook != other.hook:
            return False
        return mine.plugin is other.plugin or (self.by != mine.plugin.name and repr(mine.plugin) == repr(other.plugin))

    @property
    def does(self) -> str:
        """As the tables print it: the plugin, or the built-in and who asked for it."""
        name = self.implementation.plugin.name
        if name == self.by:
            return name
        return repr(self.implementation.plugin).removesuffix("()") + (f", used by {self.by}" if self.by else "")


REWARDS, PREFERENCES = "rewards", "preferences"
"""What a run trains on: responses that it draws and scores, or pairs of a file."""

_OF_BOTH = frozenset({"prepare_mini_batch", "forward", "auxiliary_loss", "reference_policy", "on_validation"})
"""Hooks that run in both kinds of training."""

PAIR_ARGUMENTS = frozenset(name for name in HOOKS["preference_loss"].arguments if name.startswith(SIDES))


def objective_of(hook: str) -> str | None:
    """What a run that calls this hook trains on; None: either."""
    return None if hook in _OF_BOTH else PREFERENCES if HOOKS[hook].phase == "preferences" else REWARDS


def objective_of_implementation(item: Implementation) -> str | None:
    """The same for an implementation, which by its arguments may be for one of the two only."""
    if item.hook != "auxiliary_loss":
        return objective_of(item.hook)
    if PAIR_ARGUMENTS & set(item.arguments):
        return PREFERENCES
    return REWARDS if set(item.arguments) - {"weights", "batch", "log"} else None


_EFFECTS = frozenset(
    {"choose_prompts", "allocate_rollouts", "rewrite_prompts", "sampling_params", "process_logits", "extend_rollouts",
     "filter_rollouts", "prepare_step", "select_samples", "select_tokens", "prepare_mini_batch", "forward", "policy_loss",
     "kl_penalty", "reduce_loss", "auxiliary_loss", "build_preferences", "preference_loss", "reference_policy",
     "on_step_end", "on_validation"}
)  # fmt: skip
"""Hooks that act by themselves; what the others give must be read by somebody."""

Owner = tuple[tuple[float, Claim], ...]
"""Owners of a hook with their weights; one owner with weight 1 unless a mix was asked for."""


@dataclass(frozen=True, eq=False)
class Method:
    """One way to compute advantages: owners of `ADVANTAGE_HOOKS`, and its weight in the mix."""

    name: str
    weight: float
    owners: Mapping[str, Owner]


@dataclass
class Plan:
    """Who does what in a stack.

    Attributes:
        plugins: in stack order, the trainer's extras last.
        owners: per owner hook and row kind.
        methods: per method of computing advantages; one unless `owners:` mixes.
        lists: implementations of the chain, product, sum and all hooks, in the order in which they run.
        wrappers: pluggy wrappers around the combined value of a hook, outermost first.
        violations: what resolution found illegal.
        claims: every claim of a plugin, whether it won or not.
        settled: the hooks that an `owners:` line names.
        named: the core's methods that an `owners:` line names without their being listed.
    """

    plugins: list[Plugin]
    trainer: Trainer | None
    owners: dict[str, dict[str, Owner]] = field(default_factory=dict)
    methods: list[Method] = field(default_factory=list)
    lists: dict[str, list[Implementation]] = field(default_factory=dict)
    wrappers: dict[str, list[Implementation]] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)
    named: list[Plugin] = field(default_factory=list)

    @property
    def objective(self) -> str:
        """`preferences` or `rewards`: the only one that the trainer calls hooks of, else what a plugin or `owners:` is for."""
        binds = self.trainer.binds if self.trainer else frozenset(HOOKS)
        if "preference_loss" in binds and "policy_loss" in binds:
            found = {objective_of_implementation(claim.implementation) for claim in self.claims}
            found |= {objective_of(hook) for hook in self.settled}
            return PREFERENCES if PREFERENCES in found else REWARDS
        return PREFERENCES if "preference_loss" in binds else REWARDS

    def running(self, hook: str) -> list[Implementation]:
        """Every implementation of the hook that runs, wrappers included."""
        if hook in ADVANTAGE_HOOKS:
            owners: Iterable[Owner] = [method.owners[hook] for method in self.methods]
        else:
            owners = self.owners.get(hook, {}).values()
        owned = [claim.implementation for owner in owners for _, claim in owner]
        return [*dict.fromkeys(owned), *self.lists.get(hook, []), *self.wrappers.get(hook, [])]

    def everything_running(self) -> list[Implementation]:
        """Every implementation that runs, in the order of the hooks; without built-ins whose result nobody reads."""
        live = self.live_hooks()
        return [item for hook in HOOKS if hook in live or self.claimed(hook) for item in self.running(hook)]

    def claimed(self, hook: str) -> bool:
        """Whether a plugin (not a built-in by default) decides or contributes to the hook."""
        if self.lists.get(hook) or self.wrappers.get(hook):
            return True
        if hook in ADVANTAGE_HOOKS:
            return any(claim.by for method in self.methods for _, claim in method.owners[hook])
        return any(claim.by for owner in self.owners.get(hook, {}).values() for _, claim in owner)

    def live_hooks(self) -> set[str]:
        """Hooks whose result has an effect: they act by themselves, or a later live hook takes what they give."""
        order = list(HOOKS)
        live = {hook for hook in order if hook in _EFFECTS and self.running(hook)}  # what these take is live too
        if self.claimed("value_targets") or any(
            "values" in item.arguments for hook in order if hook != "value_targets" for item in self.running(hook)
        ):
            live.add("value_targets")
        for position in reversed(range(len(order))):
            hook, gives = order[position], HOOKS[order[position]].gives
            later = [name for name in order[position + 1 :] if name in live]
            carried = any(HOOKS[name].gives == gives for name in later)
            if self.running(hook) and gives and (carried or self._taken(gives, later)):
                live.add(hook)
        return live

    def _taken(self, argument: str, hooks: Iterable[str]) -> bool:
        return any(argument in item.arguments for hook in hooks for item in self.running(hook))

    def active_plugins(self) -> list[Plugin]:
        """The plugins, and the built-ins that run."""
        return list(dict.fromkeys([*self.plugins, *self.named, *(item.plugin for item in self.everything_running())]))

    def needs(self) -> dict[needs.Need, list[str]]:
        """Every need with who has it; taking a declared column as an argument is a need too."""
        found: dict[needs.Need, list[str]] = {}
        for plugin in self.active_plugins():
            for need in plugin.needs:
                found.setdefault(need, []).append(plugin.name)
        for item in self.everything_running():
            for need in argument_needs(item):
                if item.plugin.name not in found.setdefault(need, []):
                    found[need].append(item.plugin.name)
        return found

    def reads(self, plugin: Plugin) -> frozenset[str]:
        """The columns that a plugin declared."""
        named = {need.value for need in plugin.needs if need.kind == "column"}
        for item in self.everything_running():
            if item.plugin is plugin:
                named |= {need.value for need in argument_needs(item) if need.kind == "column"}
        return frozenset(named)


def argument_needs(item: Implementation) -> list[needs.Need]:
    """What an implementation needs by the names of its arguments."""
    found = []
    for name in item.arguments:
        if name == "entropy" and HOOKS[item.hook].phase == "update":
            found.append(needs.CURRENT_ENTROPY)
        elif name in DECLARED and name != "components":
            found.append(needs.column(name))
        elif name in PAIR_ARGUMENTS and name.endswith("_ref_log_probs"):
            found.append(needs.column("ref_log_probs"))
    return found


class _Manager(pluggy.PluginManager):
    """pluggy's registration and validation, with conditional claims."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        if name not in HOOKS:
            method = getattr(type(plugin), name, None)
            if not (callable(method) and hasattr(method, "rlplugins_when")):
                return None  # do not evaluate properties and other attributes
        options = super().parse_hookimpl_opts(plugin, name)
        when = getattr(getattr(plugin, name), "rlplugins_when", None)
        return None if options is not None and when is not None and not when(plugin) else options


def _register(manager: _Manager, plugin: Plugin, name: str) -> None:
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ConfigurationError(
            f"plugin {plugin.name!r} does not fit the hook specification: {_reason(error)}"
        ) from None


def _reason(error: pluggy.PluginValidationError) -> str:
    return " ".join(str(error).split("\n", 1)[-1].split()) or str(error)


def builtin_implementation(hook: str, wanted: BuiltinName) -> Implementation:
    """The implementation of `hook` by a built-in."""
    plugin = registry.make_builtin(hook, wanted)
    manager = _new_manager()
    _register(manager, plugin, plugin.name)
    (item,) = getattr(manager.hook, hook).get_hookimpls()
    return Implementation(plugin, hook, item.function, item.argnames)


def _new_manager() -> _Manager:
    manager = _Manager(PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def resolve(
    plugins: Sequence[Plugin],
    trainer: Trainer | None,
    owners: Mapping[str, Any],
    off: Iterable[str],
) -> Plan:
    """Who does what; conflicts of claims become violations of the plan."""
    plan = Plan([*plugins, *(trainer.extras if trainer else ())], trainer)
    _Resolver(plan, dict(trainer.defaults) if trainer else {}, dict(owners), set(off)).run()
    return plan


class _Resolver:
    """The steps of `resolve` over one plan."""

    def __init__(self, plan: Plan, defaults: dict[str, BuiltinName], owners: dict[str, Any], off: set[str]) -> None:
        self.plan = plan
        self.defaults = defaults
        self.owners = owners
        self.off = off
        self.claims: dict[str, list[Claim]] = {hook: [] for hook in HOOKS}

    def run(self) -> None:
        self._check_names()
        self._collect()
        self._resolve_methods()
        for hook, spec in HOOKS.items():
            if spec.rule is Rule.OWNER and hook not in ADVANTAGE_HOOKS:
                kinds = [
                    POLICY,
                    *dict.fromkeys(c.implementation.kind for c in self.claims[hook] if c.implementation.kind != POLICY),
                ]
                for kind in kinds:
                    if owner := self._owner(hook, kind):
                        self.plan.owners.setdefault(hook, {})[kind] = owner

    def _violate(self, problem: str, settled_by: Sequence[str] = ()) -> None:
        self.plan.violations.append(Violation("claims", problem, tuple(settled_by)))

    def _check_names(self) -> None:
        names = [plugin.name for plugin in self.plan.plugins]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            self._violate(f"the plugin {name!r} is listed more than once")
        for hook in list(self.owners):
            if hook not in HOOKS or HOOKS[hook].rule is not Rule.OWNER:
                known = ", ".join(name for name, spec in HOOKS.items() if spec.rule is Rule.OWNER)
                self._violate(f"owners: {hook!r} is not a hook that has an owner; these have: {known}")
                del self.owners[hook]
        self.plan.settled = set(self.owners) - {"compute_advantages"}

    def _collect(self) -> None:
        """Register everything with pluggy; sort implementations into claims, lists and wrappers."""
        manager = _new_manager()
        order: dict[int, int] = {}
        for position, plugin in enumerate(self.plan.plugins):
            if id(plugin) not in order and manager.get_plugin(plugin.name) is None:
                order[id(plugin)] = position
                _register(manager, plugin, plugin.name)
        dropped = set(self.off)
        for hook, spec in HOOKS.items():
            items = getattr(manager.hook, hook).get_hookimpls()
            items = sorted(items, key=lambda item: (1 - item.tryfirst + item.trylast, order[id(item.plugin)]))
            for item in items:
                kind = getattr(item.function, "rlplugins_kind", POLICY)
                made = Implementation(item.plugin, hook, item.function, item.argnames, kind)
                label = f"{item.plugin.name}.{hook}"
                if label in self.off:
                    dropped.discard(label)
                elif item.hookwrapper or item.wrapper:
                    if item.hookwrapper:
                        raise ConfigurationError(f"{label}: old-style wrappers are not supported; use wrapper=True")
                    self.plan.wrappers.setdefault(hook, []).append(made)
                    self.plan.claims.append(Claim(item.plugin.name, made))
                elif spec.rule is Rule.OWNER:
                    self._claim(hook, Claim(item.plugin.name, made))
                else:
                    self.plan.lists.setdefault(hook, []).append(made)
                    self.plan.claims.append(Claim(item.plugin.name, made))
        for plugin in self.plan.plugins:
            for hook, wanted in plugin.uses.items():
                label = f"{plugin.name}.{hook}"
                if label in self.off:
                    dropped.discard(label)
                else:
                    self._claim(
                        hook, Claim(plugin.name, builtin_implementation(hook, self._with_options(hook, wanted)))
                    )
        for label in sorted(dropped):
            self._violate(f"off: {label!r} is not a claim of a plugin in this stack")

    def _claim(self, hook: str, claim: Claim) -> None:
        self.claims[hook].append(claim)
        self.plan.claims.append(claim)

    def _with_options(self, hook: str, wanted: BuiltinName) -> BuiltinName:
        """A built-in named without options takes those of the user's configuration, if that means the same one."""
        default = self.defaults.get(hook)
        return default if isinstance(wanted, str) and isinstance(default, Mapping) and wanted in default else wanted

    def _default(self, hook: str) -> Owner | None:
        if hook not in BUILTINS or objective_of(hook) not in (None, self.plan.objective):
            return None
        wanted = self.defaults.get(hook, next(iter(BUILTINS[hook])))
        if hook == "value_targets":  # as the estimator that is used
            for method in self.plan.methods:
                for _, claim in method.owners["compute_advantages"]:
                    if claim.implementation.plugin.name in BUILTINS[hook]:
                        wanted = {claim.implementation.plugin.name: claim.implementation.plugin.configuration()}
        return ((1.0, Claim("", builtin_implementation(hook, wanted))),)

    def _owner(self, hook: str, kind: str = POLICY, claims: Sequence[Claim] | None = None) -> Owner | None:
        """The owner of a hook for one row kind: as the user says, else the only claimant, else the built-in."""
        pool = self.claims[hook] if claims is None else claims
        pool = [claim for claim in pool if claim.implementation.kind == kind]
        if kind == POLICY and hook in self.owners:
            return self._chosen(hook, self.owners[hook], pool)
        different = _different(pool)
        if len(different) > 1:
            self._conflict(hook, kind, pool)
        if different:
            return ((1.0, different[0]),)
        return self._default(hook) if kind == POLICY else None

    def _conflict(self, hook: str, kind: str, pool: Sequence[Claim]) -> None:
        names = list(dict.fromkeys(claim.by for claim in pool))
        who = " and ".join(
            claim.does.replace(", used by", " (named by") + (")" if ", used by" in claim.does else "") for claim in pool
        )
        lines = [f"owners: {{{hook}: {name}}}" for name in names]
        if HOOKS[hook].mixes:
            share = ", ".join(f"{name}: {1 / len(names):.2g}" for name in names)
            lines.append(f"owners: {{{hook}: {{{share}}}}}")
        if hook in ADVANTAGE_HOOKS and hook != "compute_advantages":
            share = ", ".join(f"{name}: {1 / len(names):.2g}" for name in names)
            lines.append(f"owners: {{compute_advantages: {{{share}}}}}")
        for kept in _different(pool):
            others = dict.fromkeys(f"{claim.by}.{hook}" for claim in pool if not claim.same_as(kept.implementation))
            lines.append(f"off: [{', '.join(others)}]")
        rows = f" for rows of kind {kind!r}" if kind != POLICY else ""
        if kind != POLICY:
            lines = [line for line in lines if line.startswith("off")]
        self._violate(f"{hook} has one owner, but is claimed by {who}{rows}", lines)

    def _chosen(self, hook: str, wanted: Any, pool: Sequence[Claim]) -> Owner | None:
        """The owners that an `owners:` line names."""
        shares = self._shares(hook, wanted)
        if shares is None:
            return self._default(hook)
        owner = []
        for name, weight in shares:
            claim = self._named(hook, name, pool)
            if claim is None:
                known = ", ".join(dict.fromkeys([*(claim.by for claim in pool), *BUILTINS.get(hook, {})]))
                self._violate(
                    f"owners: {_text(name)} does not claim {hook}; one of these can own it: {known or 'none'}"
                )
            else:
                owner.append((weight, claim))
        return tuple(owner) or self._default(hook)

    def _shares(self, hook: str, wanted: Any) -> list[tuple[BuiltinName, float]] | None:
        """`name`, `{built-in: {option: value}}` or `{name: weight, ...}` as pairs; None if it is none of these."""
        if isinstance(wanted, str):
            return [(wanted, 1.0)]
        if isinstance(wanted, Mapping) and len(wanted) == 1 and isinstance(next(iter(wanted.values())), Mapping):
            return [(wanted, 1.0)]
        if isinstance(wanted, Mapping) and wanted and all(_is_weight(weight) for weight in wanted.values()):
            if len(wanted) > 1 and not HOOKS[hook].mixes:
                self._violate(f"owners: {hook} cannot be mixed, since it does not return an array; name one owner")
            return [(str(name), float(weight)) for name, weight in wanted.items()]
        self._violate(
            f"owners: {hook}: {wanted!r} is neither a name, a built-in with options, nor names with weights above 0"
        )
        return None

    def _named(self, hook: str, name: BuiltinName, pool: Sequence[Claim]) -> Claim | None:
        for claim in pool:
            if name == claim.by:
                return claim
        key = name if isinstance(name, str) else next(iter(name))
        if key in BUILTINS.get(hook, {}):
            return Claim("owners", builtin_implementation(hook, self._with_options(hook, name)))
        return None

    def _resolve_methods(self) -> None:
        """The methods of computing advantages: usually one, several in a mix."""
        line = self.owners.pop("compute_advantages", None)
        shares = self._shares("compute_advantages", line) if line is not None else None
        if shares is None:
            owners = {hook: self._owner(hook) or () for hook in ADVANTAGE_HOOKS}
            self.plan.methods = [Method("", 1.0, owners)]
            return
        members = {name: self._member(name) for name, _ in shares if isinstance(name, str)}
        rest = {hook: [claim for claim in self.claims[hook] if claim.by not in members] for hook in ADVANTAGE_HOOKS[:2]}
        for name, weight in shares:
            own = members.get(name) if isinstance(name, str) else {}
            if own is None or (not own and not isinstance(name, str)):
                own = {}
            computed = own.get("compute_advantages") or self._named("compute_advantages", name, [])
            if computed is None and not own:
                known = ", ".join([*(plugin.name for plugin in self.plan.plugins), *METHODS, "difference"])
                self._violate(f"owners: {_text(name)} does not compute advantages; one of these can: {known}")
                continue
            owners = {
                hook: ((1.0, own[hook]),)
                if hook in own and hook not in self.owners
                else self._owner(hook, claims=rest[hook]) or ()
                for hook in ADVANTAGE_HOOKS[:2]
            }
            last = ((1.0, computed),) if computed else self._default("compute_advantages")
            complete = {hook: owner or () for hook, owner in (owners | {"compute_advantages": last}).items()}
            self.plan.methods.append(Method(_text(name), weight, complete))
        if not self.plan.methods:
            self.plan.methods = [Method("", 1.0, {hook: self._default(hook) or () for hook in ADVANTAGE_HOOKS})]

    def _member(self, name: str) -> dict[str, Claim]:
        """What the method `name` claims of the advantage hooks: a plugin of the stack, or one of the core's methods."""
        claims = {hook: claim for hook in ADVANTAGE_HOOKS for claim in self.claims[hook] if claim.by == name}
        if claims or name not in METHODS or name in BUILTINS["compute_advantages"]:
            return claims
        self.plan.named.append(METHODS[name]())
        uses = self.plan.named[-1].uses
        return {
            hook: Claim(name, builtin_implementation(hook, wanted))
            for hook, wanted in uses.items()
            if hook in ADVANTAGE_HOOKS
        }


def _different(claims: Sequence[Claim]) -> list[Claim]:
    """Claims without those that name the same built-in with the same options as an earlier one."""
    seen: dict[Any, Claim] = {}
    for claim in claims:
        plugin = claim.implementation.plugin
        seen.setdefault(repr(plugin) if plugin.name != claim.by else id(plugin), claim)
    return list(seen.values())


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _text(name: BuiltinName) -> str:
    return name if isinstance(name, str) else next(iter(name))
