"""A plugin that has something to do in every phase and writes down what it saw."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs
from rlplugins.demonstrations import Demonstrations
from rlplugins.models import LinearModel
from rlplugins.rollouts import Requests, Rollouts, Sampling, completed, concatenate

HALF = 16
ONLY = 60
"""The token that steered requests draw."""


class Noting(Plugin):
    """Writes down what its hooks saw."""

    log_file: str
    """Where to write."""

    def note(self, hook: str, **seen: Any) -> None:
        with Path(self.log_file).open("a") as log:
            log.write(json.dumps({"hook": hook, **seen}) + "\n")


class Steer(Noting):
    """Draws the second response to each prompt from one token only, and asks the engine for responses of its own."""

    name = "steer"
    needs = (needs.ENGINE, needs.RESPONSE_PREFIX, needs.column("rollout_log_probs"))

    @hookimpl
    def sampling_params(self, sampling: Sampling, requests: Requests) -> Sampling:
        return steered(sampling, requests.draw == 1)

    @hookimpl
    def process_logits(self, logits: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        return drawn_from_one(logits, numbers)

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Any, engine: Any) -> Rollouts:
        free = ~forced(rollouts)
        given = engine.log_probs(rollouts.prompts, rollouts.responses, rollouts.mask)
        difference = ((given - rollouts.rollout_log_probs) * rollouts.mask).abs().amax(1)
        self.note(
            "extend_rollouts", forced=(~free).tolist(), groups=rollouts.groups.tolist(),
            difference=float(difference[free].max()),
        )  # fmt: skip
        self.probe(prompts, engine)
        return rollouts

    def probe(self, prompts: Any, engine: Any) -> None:
        chosen = prompts.select(torch.tensor([5, 9]))
        requests = Requests.of(chosen, torch.tensor([2, 1]))
        sampling = engine.sampling(3)
        short = replace(sampling, max_tokens=torch.tensor([4, 4, 7]))
        made = engine.generate(requests, steered(short, requests.draw == 0))
        greedy = engine.generate(requests, greedy=True, score=False)
        continued = engine.generate(replace(requests, prefixes=[[20, 21], "", [5]]), short)
        given = engine.given(requests, ["7", "", "8" * 40])
        self.note(
            "engine.given", start=continued.responses[:, :2].tolist(), prefix=continued.prefix.sum(1).tolist(),
            lengths=continued.mask.sum(1).tolist(), given=given.mask.sum(1).tolist(),
            first=given.responses[:, 0].tolist(), scores=given.scores.flatten().tolist(),
            same=given.prompts == made.prompts, log_probs=float(given.rollout_log_probs.abs().sum()),
        )  # fmt: skip
        self.note(
            "engine.generate", keys=made.prompt_keys.tolist(), wanted=chosen.keys[requests.prompt].tolist(),
            lengths=made.mask.sum(1).tolist(), forced=forced(made).tolist(),
            scores=made.scores.flatten().tolist(), greedy=greedy.responses.tolist(),
            unscored=bool(greedy.scores.isnan().all()), kinds=made.kind.tolist(),
        )  # fmt: skip


def forced(rollouts: Rollouts) -> Tensor:
    """(B,) bool, the responses that consist of the one token."""
    return ((rollouts.responses == ONLY) | ~rollouts.mask).all(1)


def steered(sampling: Sampling, which: Tensor) -> Sampling:
    """The sampling with the one token for the rows `which` (B,), and none for the others."""
    return replace(sampling, numbers={"only": torch.where(which, ONLY, -1)})


def drawn_from_one(logits: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """Logits (N, V) that leave each request its one token, where it has one."""
    if "only" not in numbers:
        return logits
    only = numbers["only"][:, None]
    others = torch.arange(logits.shape[1], device=logits.device) != only
    return logits.masked_fill((only >= 0) & others, -torch.inf)


class Asking(Noting):
    """Asks in every credit phase for the gradients of three advantages that lie on a line."""

    name = "asking"
    needs = (needs.GRADIENTS,)

    @hookimpl
    def combine_rewards(self, scores: Tensor, rollouts: Rollouts, engine: Any, step: Any) -> Tensor:
        self.ask(rollouts, engine, step)
        return scores

    def ask(self, rollouts: Rollouts, engine: Any, step: Any) -> None:
        advantages = torch.randn(len(rollouts), 1, generator=step.generator(self))
        asked = [0 * advantages, advantages, 2 * advantages]
        whole, part = (engine.gradient_products(rollouts, asked, parameters=name) for name in (None, "layers"))
        line = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)  # the loss is linear in them before the update
        self.note(
            "engine.gradient_products", rate=whole.learning_rate, longest=float(whole.norms.max()),
            norms=float((whole.norms.square() - whole.products.diagonal()).abs().max()),
            bend=float((line @ whole.products @ line).abs() / whole.products.abs().max()),
            part=float(part.products.diagonal().max() / whole.products.diagonal().max()),
        )  # fmt: skip


class Probe(Asking):
    """Draws from the first half of the pool, 2 and 6 responses in turn; adds two expert rows, drops two rows."""

    name = "probe"
    kinds = frozenset({"expert"})
    needs = (
        needs.ENGINE, needs.RESPONSE_PREFIX, needs.GRADIENTS, needs.TRAINABLE_MODEL, needs.together("prompt").optional(),
        needs.column("entropy"), needs.column("rollout_log_probs"), needs.column("difficulty"),
        needs.column("ref_log_probs"), needs.column("components"),
    )  # fmt: skip

    demonstrations: str
    """A file of them."""

    def init_state(self, run: Any) -> dict[str, Any]:
        run.table.add_column("seen", torch.int64, 0)
        return {"steps": 0, "validations": 0, "V": LinearModel(features=1, learning_rate=0.01)}

    @hookimpl
    def prompt_weights(self, prompts: Any) -> Tensor:
        return (torch.arange(len(prompts)) < HALF).float()

    @hookimpl
    def allocate_rollouts(self, prompts: Any, budget: int) -> Tensor:
        self.note(
            "allocate_rollouts",
            keys=prompts.keys.tolist(),
            budget=budget,
            seen=self.table["seen"][prompts.rows].tolist(),
        )
        counts = torch.full((len(prompts),), 2)
        counts[1::2] = 6
        return counts

    @hookimpl
    def rewrite_prompts(self, requests: Requests) -> Requests:
        first = (requests.draw == 0).tolist()
        for row, own in enumerate(first):
            if own:
                requests.texts[row] = [{"role": "user", "content": "hint " + requests.texts[row][0]["content"]}]
            elif int(requests.draw[row]) == 1:
                requests.prefixes[row] = "12"
            elif int(requests.draw[row]) == 3:
                requests.prefixes[row] = [20, 21, 22]
        requests.columns["drawn"] = requests.draw.clone()
        return requests

    @hookimpl
    def sampling_params(self, sampling: Sampling, requests: Requests) -> Sampling:
        short = replace(sampling, max_tokens=torch.where(requests.draw == 0, 3, sampling.max_tokens))
        return steered(short, requests.draw == 2)

    @hookimpl
    def process_logits(self, logits: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        return drawn_from_one(logits, numbers)

    @hookimpl
    def reference_policy(self, step: Any) -> str:
        return "current" if step.number else "initial"

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Any, engine: Any, step: Any) -> Rollouts:
        drawn = torch.as_tensor(rollouts["drawn"])
        lengths = rollouts.mask.sum(1)
        self.note(
            "extend_rollouts", drawn=drawn.tolist(), lengths=lengths.tolist(), groups=rollouts.groups.tolist(),
            hinted=[len(prompt) for prompt in rollouts.prompts], kinds=list(rollouts.kinds),
            prefix=rollouts.prefix.sum(1).tolist() if rollouts.prefix is not None else None,
            start=rollouts.responses[:, :3].tolist(), steered=forced(rollouts).tolist(),
            difficulty=torch.as_tensor(rollouts["difficulty"]).tolist(),
            keys=rollouts.prompt_keys.tolist(), version=rollouts.version.tolist(), names=list(rollouts.component_names),
        )  # fmt: skip
        foreign = Demonstrations.from_file(self.demonstrations).rows(torch.tensor([1]), engine, rollouts, "expert")
        own = prompts.select(prompts.positions(rollouts.prompt_rows[:1]))
        answer = str(own["ground_truth"][0])
        right = engine.given(Requests.of(own, torch.tensor([1])), [answer])
        self.note("engine.given", scores=right.scores.tolist(), tokens=right.mask.sum(1).tolist(), answer=answer,
                  lengths=foreign.mask.sum(1).tolist(), rows=foreign.prompt_rows.tolist(),
                  log_probs=float(right.rollout_log_probs.abs().sum()))  # fmt: skip
        kind = {"kinds": ("policy", "expert"), "kind": torch.ones(1, dtype=torch.int8), "groups": torch.tensor([-1])}
        expert = concatenate([completed(replace(right, **kind), rollouts), foreign])
        given = engine.log_probs(rollouts.prompts[:3], rollouts.responses[:3], rollouts.mask[:3])
        own = rollouts.rollout_log_probs[:3]
        free = rollouts.mask[:3] if rollouts.prefix is None else rollouts.mask[:3] & ~rollouts.prefix[:3]
        self.note("engine.log_probs", difference=float(((given - own) * free).abs().max()))
        self.state.steps = self.state.steps + 1
        return concatenate([rollouts, expert])

    @hookimpl
    def filter_rollouts(self, scores: Tensor, rollouts: Rollouts) -> Tensor:
        keep = torch.ones_like(scores)
        keep[3] = keep[30] = 0
        return keep

    @hookimpl
    def forward(self, model: Any, batch: Any, temperature: float) -> tuple[Tensor, Tensor | None]:
        tokens = batch.mask.shape[1]
        given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        output = model(input_ids=batch.input_ids, use_cache=False, **given)
        log_probs = torch.log_softmax(output.logits[:, -tokens - 1 : -1].float() / temperature, -1)
        chosen = log_probs.gather(-1, batch.responses[..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1) if batch.entropy else None
        sizes = Counter(tuple(row) for row in batch.input_ids[:, :-tokens].tolist())
        self.note("forward", model=type(model).__name__, backward=torch.is_grad_enabled(), rows=len(batch.mask),
                  largest=sorted(sizes.values()))  # fmt: skip
        return torch.where(batch.mask, chosen, 0.0), None if entropy is None else torch.where(batch.mask, entropy, 0.0)

    @hookimpl
    def shape_advantages(self, advantages: Tensor, entropy: Tensor, rollouts: Rollouts) -> Tensor:
        self.note(
            "shape_advantages", rows=len(rollouts), groups=rollouts.groups.tolist(), kind=rollouts.kind.tolist(),
            old=float(rollouts.old_log_probs.sum()), entropy=float(entropy.sum()),
            reference=float((rollouts.ref_log_probs - rollouts.old_log_probs).abs().max()),
        )  # fmt: skip
        return advantages

    @hookimpl(kind="expert")
    def policy_loss(self, log_probs: Tensor, log: Callable[..., None]) -> Tensor:
        log("expert_rows", float(len(log_probs)))
        return -log_probs

    @hookimpl
    def on_step_end(
        self, rollouts: Rollouts, rewards: Tensor, weights: Tensor, engine: Any, step: Any, log: Callable[..., None]
    ) -> None:
        rows = rollouts.prompt_rows[rollouts.prompt_rows >= 0]
        self.table["seen"][rows.unique()] += 1
        loss = self.state.V.fit(torch.ones(1, 1), torch.ones(1))
        after = engine.log_probs(rollouts.prompts[:3], rollouts.responses[:3], rollouts.mask[:3])
        before = rollouts.old_log_probs[:3]
        self.note("on_step_end", rows=len(rollouts), missing=int(rewards.isnan().any(1).sum()),
                  weights=weights.flatten().tolist(),
                  moved=float((after - before).abs().max()), step=step.number, steps=self.state.steps,
                  loss=loss)  # fmt: skip
        log("rows", float(len(rollouts)))

    @hookimpl
    def on_validation(self, metrics: Any, engine: Any) -> None:
        self.state.validations = self.state.validations + 1
        self.note("on_validation", names=sorted(metrics), validations=self.state.validations)
