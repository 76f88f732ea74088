"""What makes a stack legal: claims, flow, needs and facts; and the table that explains a stack."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlplugins import needs
from rlplugins.defaults import BUILTINS
from rlplugins.errors import Violation
from rlplugins.hookspecs import HOOKS, Rule
from rlplugins.plan import (
    ADVANTAGE_HOOKS,
    Claim,
    Implementation,
    Owner,
    Plan,
    argument_needs,
    objective_of,
    objective_of_implementation,
)
from rlplugins.rollouts import POLICY
from rlplugins.trainer import Trainer

FACTS = {
    "unit_rewards": "rewards lie in [0, 1]",
    "response_rewards": "one reward per response",
    "reward_scale": "a common factor on the rewards reaches the loss",
    "equal_groups": "all groups have the same size",
    "complete_groups": "credit sees all that was drawn for a prompt",
    "whole_groups": "all that was drawn for a prompt is trained",
    "single_entropy": "there is no other entropy term",
    "absolute_advantages": "nothing re-normalises the advantages afterwards",
    "token_ratio": "the loss compares with the old policy token by token",
}


LINES: Mapping[str, tuple[str, ...]] = {"judge": ("judge: {url: ..., model: ...}",)}
"""Per need that a line of the stack file meets this line."""


def violations(plan: Plan, allow: Iterable[str]) -> list[Violation]:
    """Everything that makes the plan illegal."""
    allowed = set(allow)
    found = [*plan.violations, *_flow(plan), *_objective(plan), *_needs(plan), *_facts(plan, allowed)]
    for name in sorted(allowed - set(FACTS)):
        found.append(Violation("facts", f"allow: {name!r} is not a fact; the facts are: {', '.join(FACTS)}"))
    return found


def _flow(plan: Plan) -> list[Violation]:
    """Claims whose result nobody reads."""
    live = plan.live_hooks()
    running = plan.everything_running()
    methods = {method.name for method in plan.methods} - {""}
    found = []
    for claim in plan.claims:
        hook = claim.implementation.hook
        if objective_of_implementation(claim.implementation) not in (None, plan.objective):
            continue
        if any(claim.same_as(item) for item in running):
            unread = hook not in live
        else:  # settled by an `owners:` line, unless that line was about the whole method of computing advantages
            part = hook in ADVANTAGE_HOOKS and hook != "compute_advantages" and hook not in plan.settled
            unread = bool(methods) and part and claim.by not in methods
        if unread:
            found.append(_unread(plan, claim.by, hook))
    found += _token_weights_of_responses(plan)
    if len(plan.methods) > 1:
        found += [_parts_of_a_mix(item) for item in plan.wrappers.get("compute_advantages", []) if _parts(item)]
    return found


def _token_weights_of_responses(plan: Plan) -> list[Violation]:
    """Weights of tokens under a loss that is one per response."""
    losses = [item for item in plan.running("policy_loss") if getattr(item.function, "rlplugins_per_response", False)]
    if not losses:
        return []
    return [
        Violation(
            "flow",
            f"{item.plugin.name}.select_tokens weighs tokens, but {losses[0]} gives one loss per response",
            (f"off: [{item.plugin.name}.select_tokens]",),
        )
        for item in plan.running("select_tokens")
    ]


def _parts(item: Implementation) -> list[str]:
    return [name for name in ("baseline", "scale") if name in item.arguments]


def _parts_of_a_mix(item: Implementation) -> Violation:
    problem = f"{item} takes `{_parts(item)[0]}`, but of the several methods that are mixed each has its own"
    return Violation("flow", problem, (f"off: [{item}]",))


def _objective(plan: Plan) -> list[Violation]:
    """Claims of hooks that the other kind of training calls."""
    kinds = {claim: objective_of_implementation(claim.implementation) for claim in plan.claims}
    mine = ", ".join(dict.fromkeys(claim.by for claim, kind in kinds.items() if kind == plan.objective))
    who = f"the stack ({mine})" if mine else plan.trainer.name if plan.trainer else "the stack"
    other: dict[str, list[Claim]] = {}
    for claim, kind in kinds.items():
        if kind not in (None, plan.objective):
            other.setdefault(claim.by, []).append(claim)
    found = []
    for by, claims in other.items():
        hooks = ", ".join(dict.fromkeys(claim.implementation.hook for claim in claims))
        kind = kinds[claims[0]]
        remedy = plan.trainer.remedies.get(str(kind), "") if plan.trainer else ""
        problem = f"{who} trains on {plan.objective} here, but {by} is for {kind}: nobody calls its {hooks}"
        found.append(Violation("flow", problem + _also(remedy)))
    return found


def _unread(plan: Plan, by: str, hook: str) -> Violation:
    gives = HOOKS[hook].gives
    order = list(HOOKS)
    live = plan.live_hooks()
    readers = [name for name in order[order.index(hook) + 1 :] if gives in HOOKS[name].arguments and name in live]
    who = ", ".join(dict.fromkeys(f"{name} ({item.plugin.name})" for name in readers for item in plan.running(name)))
    lines = [f"off: [{by}.{hook}]"]
    for name in readers:
        for builtin, made in BUILTINS.get(name, {}).items():
            if gives in _arguments(made, name) and all(gives not in item.arguments for item in plan.running(name)):
                lines.append(f"owners: {{{name}: {builtin}}}")
    takes = f"none of {who} takes it" if who else "no hook that runs takes it"
    return Violation("flow", f"{by}.{hook} gives `{gives}`, but nobody reads it: {takes}", tuple(lines))


def _arguments(plugin: type, hook: str) -> tuple[str, ...]:
    code = getattr(plugin, hook).__code__
    return tuple(code.co_varnames[: code.co_argcount])


def group_sizes(plan: Plan) -> tuple[int, float]:
    """Smallest and largest number of responses per prompt that every plugin admits."""
    low, high = 1, float("inf")
    for need in plan.needs():
        if need.kind == "group_size" and need.required:
            smallest, largest = needs.allowed_sizes(need)
            low, high = max(low, smallest), min(high, largest)
    return low, high


def _needs(plan: Plan) -> list[Violation]:
    found = []
    sizes = {need: who for need, who in plan.needs().items() if need.kind == "group_size" and need.required}
    low, high = group_sizes(plan)
    if low > high:
        text = "; ".join(f"{', '.join(who)} needs {need.value}" for need, who in sizes.items())
        found.append(Violation("needs", f"the numbers of responses per prompt clash: {text}"))
    if plan.trainer is None:
        return found
    trainer = plan.trainer
    if low <= high and trainer.group_size is not None and not low <= trainer.group_size <= high:
        wrong = [
            (need, who) for need, who in sizes.items()
            if not needs.allowed_sizes(need)[0] <= trainer.group_size <= needs.allowed_sizes(need)[1]
        ]  # fmt: skip
        text = "; ".join(f"{', '.join(who)} needs {need.value}" for need, who in wrong)
        remedy = trainer.remedies.get("group_size", "").format(low=low)
        found.append(
            Violation(
                "needs", f"{trainer.name} draws {trainer.group_size} response(s) per prompt, but {text}" + _also(remedy)
            )
        )
    for hook in HOOKS:
        if plan.claimed(hook) and hook not in trainer.binds and objective_of(hook) in (None, plan.objective):
            names = ", ".join(dict.fromkeys(item.plugin.name for item in plan.running(hook)))
            problem = f"{trainer.name} cannot call {hook}, which {names} implements"
            found.append(Violation("needs", problem, _off(plan, {hook: plan.running(hook)})))
    for need, who in plan.needs().items():
        if need.required and need.kind != "group_size" and not _met(need, trainer):
            remedy = trainer.remedies.get(f"{need.kind}:{need.value}", trainer.remedies.get(need.kind, ""))
            problem = f"{', '.join(who)} needs {need}, which {trainer.name} does not give here" + _also(remedy)
            declared = any(need in plugin.needs for plugin in plan.active_plugins())
            taking = [item for item in plan.everything_running() if need in argument_needs(item)]
            hooks = {item.hook: [other for other in taking if other.hook == item.hook] for item in taking}
            settled = LINES.get(need.kind, ()) if declared else _off(plan, hooks)
            found.append(Violation("needs", problem, settled))
    return found


def _off(plan: Plan, hooks: Mapping[str, Sequence[Implementation]]) -> tuple[str, ...]:
    """The line that drops these implementations, if a plugin brought each of them."""
    labels = []
    for hook, items in hooks.items():
        for item in items:
            claimants = [claim.by for claim in plan.claims if claim.same_as(item)]
            if not claimants and hook != "value_targets":  # which runs only where another hook takes the values
                return ()
            labels += [f"{by}.{hook}" for by in claimants]
    return () if not labels else (f"off: [{', '.join(dict.fromkeys(labels))}]",)


def _also(remedy: str) -> str:
    return f" ({remedy})" if remedy else ""


def _met(need: needs.Need, trainer: Trainer) -> bool:
    if need.kind == "one_rank":
        return trainer.ranks <= 1
    if need.kind == "column":
        return trainer.columns is None or need.value in trainer.columns
    return need.kind in trainer.provides or f"{need.kind}:{need.value}" in trainer.provides


def _facts(plan: Plan, allowed: set[str]) -> list[Violation]:
    found = []
    plugins = plan.active_plugins()
    for plugin in plugins:
        unknown = sorted((set(plugin.assumes) | set(plugin.breaks)) - set(FACTS))
        if unknown:
            found.append(Violation("facts", f"{plugin.name} names unknown facts: {', '.join(unknown)}"))
    for fact in FACTS:
        assuming = [plugin.name for plugin in plugins if fact in plugin.assumes]
        breaking = [(plugin.name, "") for plugin in plugins if fact in plugin.breaks]
        if plan.trainer and fact in plan.trainer.breaks:
            breaking.append((plan.trainer.name, f" ({plan.trainer.breaks[fact]})"))
        pairs = [(a, b + why) for a in assuming for b, why in breaking if a != b]
        if pairs and fact not in allowed:
            who = "; ".join(f"{a} assumes it, {b} breaks it" for a, b in pairs)
            found.append(Violation("facts", f"{fact} ({FACTS[fact]}): {who}", (f"allow: [{fact}]",)))
    return found


def explain(plan: Plan, found: Iterable[Violation], width: int = 110) -> str:
    """Who owns which hook, in which order chains run, what is required and provided, which facts are assumed."""
    console = Console(file=StringIO(), width=width, highlight=False)
    names = ", ".join(plugin.name for plugin in plan.plugins) or "empty"
    hooks = Table(title=f"stack: {names}" + (f" on {plan.trainer.name}" if plan.trainer else ""), title_justify="left")
    for header in ("hook", "combines", "who, in order"):
        hooks.add_column(header, overflow="fold")
    live = plan.live_hooks()
    for hook, spec in HOOKS.items():
        if (text := _who(plan, hook)) and (hook in live or plan.claimed(hook)):
            hooks.add_row(hook, spec.rule.value, Text(text))
    console.print(hooks)
    rows = [(str(need), ", ".join(who), _given(plan, need)) for need, who in plan.needs().items()]
    _print(console, "needs", ("what", "needed by", "given"), rows)
    facts = []
    for fact in FACTS:
        assuming = ", ".join(plugin.name for plugin in plan.active_plugins() if fact in plugin.assumes)
        breaking = [plugin.name for plugin in plan.active_plugins() if fact in plugin.breaks]
        if plan.trainer and fact in plan.trainer.breaks:
            breaking.append(f"{plan.trainer.name} ({plan.trainer.breaks[fact]})")
        if assuming or breaking:
            facts.append((fact, FACTS[fact], assuming, ", ".join(breaking)))
    _print(console, "facts", ("fact", "meaning", "assumed by", "broken by"), facts)
    problems = list(found)
    if problems:
        console.print(f"{len(problems)} violation(s):")
        console.print("\n".join(f"  {problem}" for problem in problems), markup=False)
    else:
        console.print("legal: this stack can run")
    assert isinstance(console.file, StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _print(console: Console, title: str, headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    if rows:
        table = Table(title=title, title_justify="left")
        for header in headers:
            table.add_column(header, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)


def _given(plan: Plan, need: needs.Need) -> str:
    trainer = plan.trainer
    if trainer is None:
        return "no trainer named"
    if need.kind == "group_size":
        return str(trainer.group_size) if trainer.group_size is not None else "yes, as the stack needs"
    if need.kind == "column" and trainer.columns is None:
        return "if the data has it"
    return "yes" if _met(need, trainer) else "no"


def _shares(owner: Owner) -> str:
    return " + ".join((f"{weight:g} x " if len(owner) > 1 else "") + claim.does for weight, claim in owner)


def _who(plan: Plan, hook: str) -> str:
    """One cell of the table: owners with weights, or the chain in its order."""
    wrapping = "".join(f", wrapped by {item.plugin.name}" for item in plan.wrappers.get(hook, []))
    if HOOKS[hook].rule is not Rule.OWNER:
        separator = " -> " if HOOKS[hook].rule is Rule.CHAIN else ", "
        return separator.join(item.plugin.name for item in plan.lists.get(hook, [])) + wrapping
    if hook in ADVANTAGE_HOOKS:
        parts = []
        for method in plan.methods:
            text = _shares(method.owners[hook])
            parts.append(f"{method.weight:g} x {method.name} ({text})" if len(plan.methods) > 1 else text)
        return "; ".join(parts) + (" (default)" if not plan.claimed(hook) else "") + wrapping
    cells = []
    for kind, owner in plan.owners.get(hook, {}).items():
        text = _shares(owner)
        text += " (default)" if not any(claim.by for _, claim in owner) else ""
        cells.append(text if kind == POLICY else f"{text} for kind {kind}")
    return "; ".join(cells) + wrapping
