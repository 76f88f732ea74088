"""A plugin that has something to do in every phase and writes down what it saw, and in which process."""

import json
import os
import time
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
BEGINNING = [30, 31]
"""A beginning of a response that is given as tokens."""


class OpenRLHFProbe(Plugin):
    """Draws from the first half of the pool, 2 and 6 responses in turn; adds two expert rows, drops two rows.

    It stops in its third step where a file `gate` lies beside its notes.
    """

    name = "openrlhf-probe"
    kinds = frozenset({"expert"})
    needs = (
        needs.ENGINE, needs.RESPONSE_PREFIX, needs.GRADIENTS, needs.TRAINABLE_MODEL, needs.together("prompt").optional(),
        needs.column("entropy"), needs.column("rollout_log_probs"), needs.column("difficulty"), needs.column("label"),
        needs.column("ref_log_probs"), needs.column("components"),
    )  # fmt: skip

    log_file: str
    """Where to write."""
    demonstrations: str
    """A file of them."""

    def note(self, hook: str, **seen: Any) -> None:
        with Path(self.log_file).open("a") as log:
            log.write(json.dumps({"hook": hook, "pid": os.getpid(), **seen}) + "\n")

    def init_state(self, run: Any) -> dict[str, Any]:
        run.table.add_column("seen", torch.int64, 0)
        return {"steps": 0, "validations": 0, "model": LinearModel(features=1, learning_rate=0.1)}

    @hookimpl
    def prompt_weights(self, prompts: Any) -> Tensor:
        return (torch.arange(len(prompts)) < HALF).float()

    @hookimpl
    def allocate_rollouts(self, prompts: Any, budget: int) -> Tensor:
        seen = self.table["seen"][prompts.rows].tolist()
        self.note("allocate_rollouts", keys=prompts.keys.tolist(), budget=budget, seen=seen)
        counts = torch.full((len(prompts),), 2)
        counts[1::2] = 6
        return counts

    @hookimpl
    def rewrite_prompts(self, requests: Requests) -> Requests:
        for row, draw in enumerate(requests.draw.tolist()):
            if draw == 0:
                requests.texts[row] = [{"role": "user", "content": "hint " + requests.texts[row][0]["content"]}]
            elif draw == 1:
                requests.prefixes[row] = "12"
            elif draw == 3:
                requests.prefixes[row] = BEGINNING
        requests.columns["drawn"] = requests.draw.clone()
        return requests

    @hookimpl
    def sampling_params(self, sampling: Sampling, requests: Requests, step: Any) -> Sampling:
        if step.number == 2 and (Path(self.log_file).parent / "gate").exists():
            self.note("gate")
            time.sleep(1000)
        short = replace(sampling, max_tokens=torch.where(requests.draw == 0, 3, sampling.max_tokens))
        return replace(short, numbers={"only": torch.where(requests.draw == 2, ONLY, -1)})

    @hookimpl
    def process_logits(self, logits: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        if "only" not in numbers:
            return logits
        only = numbers["only"][:, None]
        others = torch.arange(logits.shape[1], device=logits.device) != only
        return logits.masked_fill((only >= 0) & others, -torch.inf)

    @hookimpl
    def reference_policy(self, step: Any) -> str:
        return "current" if step.number else "initial"

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Any, engine: Any) -> Rollouts:
        prefix = rollouts.prefix.sum(1).tolist() if rollouts.prefix is not None else None
        self.note(
            "extend_rollouts", drawn=torch.as_tensor(rollouts["drawn"]).tolist(), groups=rollouts.groups.tolist(),
            lengths=rollouts.mask.sum(1).tolist(), hinted=[len(prompt) for prompt in rollouts.prompts], prefix=prefix,
            start=rollouts.responses[:, :2].tolist(), keys=rollouts.prompt_keys.tolist(), version=rollouts.version.tolist(),
            steered=((rollouts.responses == ONLY) | ~rollouts.mask).all(1).tolist(), names=list(rollouts.component_names),
            difficulty=torch.as_tensor(rollouts["difficulty"]).tolist(),
        )  # fmt: skip
        given = engine.log_probs(rollouts.prompts[:3], rollouts.responses[:3], rollouts.mask[:3])
        free = rollouts.mask[:3] & ~rollouts.prefix[:3]
        difference = float(((given - rollouts.rollout_log_probs[:3]) * free).abs().max())
        self.note("engine.log_probs", difference=difference)
        self.ask(prompts, engine)
        self.state.steps = self.state.steps + 1
        return concatenate([rollouts, self.experts(rollouts, prompts, engine)])

    def ask(self, prompts: Any, engine: Any) -> None:
        """Two responses to one prompt of the pool and one, with a given beginning, to another; twice the likeliest ones."""
        requests = Requests.of(prompts.select(torch.tensor([5, 9])), torch.tensor([2, 1]))
        greedy = engine.generate(requests, greedy=True, score=False)
        requests.prefixes[2] = BEGINNING
        made = engine.generate(requests, replace(engine.sampling(3), max_tokens=torch.tensor([4, 5, 7])))
        given = engine.log_probs(made.prompts, made.responses, made.mask)
        self.note(
            "engine.generate", keys=made.prompt_keys.tolist(), wanted=prompts.keys[torch.tensor([5, 5, 9])].tolist(),
            groups=made.groups.tolist(), lengths=made.mask.sum(1).tolist(), kind=made.kind.tolist(),
            version=made.version.tolist(), scores=made.scores.flatten().tolist(), prefix=made.prefix.sum(1).tolist(),
            difference=float(((given - made.rollout_log_probs) * (made.mask & ~made.prefix)).abs().max()),
            greedy=greedy.responses.tolist(), unscored=bool(greedy.scores.isnan().all()),
            beginning=made.responses[2, :2].tolist(),
        )  # fmt: skip

    def experts(self, rollouts: Rollouts, prompts: Any, engine: Any) -> Rollouts:
        """The right answer to the first prompt of the step, and an answer to a prompt that is not of the pool."""
        own = prompts.select(prompts.positions(rollouts.prompt_rows[:1]).repeat(2))
        requests = Requests.of(own, torch.tensor([1, 1]))
        made = engine.given(requests, [own["label"][0], "7" * 40])
        unscored = engine.given(requests, ["1", "2"], score=False)
        self.note(
            "engine.given", label=own["label"][0], responses=made.responses.tolist(), lengths=made.mask.sum(1).tolist(),
            keys=made.prompt_keys.tolist(), wanted=own.keys.tolist(), scores=made.scores.flatten().tolist(),
            components=made.components.tolist(), drawn=float(made.rollout_log_probs.abs().sum()),
            unscored=bool(unscored.scores.isnan().all()), tokens=unscored.mask.sum(1).tolist(),
        )  # fmt: skip
        right = replace(
            made.select(torch.tensor([0])), kinds=("policy", "expert"), kind=torch.ones(1, dtype=torch.int8),
            groups=torch.tensor([-1]),
        )  # fmt: skip
        foreign = Demonstrations.from_file(self.demonstrations).rows(torch.tensor([0]), engine, rollouts, "expert")
        return concatenate([completed(right, rollouts), foreign])

    @hookimpl
    def filter_rollouts(self, scores: Tensor) -> Tensor:
        keep = torch.ones_like(scores)
        keep[3:5] = 0
        return keep

    @hookimpl
    def combine_rewards(self, scores: Tensor, engine: Any, rollouts: Rollouts) -> Tensor:
        whole = engine.gradient_products(rollouts, [scores, 2 - scores])
        part = engine.gradient_products(rollouts, [scores], parameters=r"layers\.0\.")
        self.note(
            "engine.gradient_products", products=whole.products.tolist(), norms=whole.norms.tolist(),
            learning_rate=whole.learning_rate, part=part.products.item(), length=part.norms.item(),
        )  # fmt: skip
        return scores

    @hookimpl
    def shape_advantages(self, advantages: Tensor, entropy: Tensor, rollouts: Rollouts) -> Tensor:
        self.note(
            "shape_advantages", rows=len(rollouts), groups=rollouts.groups.tolist(), kind=rollouts.kind.tolist(),
            old=float(rollouts.old_log_probs.sum()), entropy=float(entropy.sum()),
            reference=float((rollouts.ref_log_probs - rollouts.old_log_probs).abs().max()),
        )  # fmt: skip
        return advantages

    @hookimpl
    def forward(self, model: Any, batch: Any, temperature: float) -> tuple[Tensor, Tensor | None]:
        training = getattr(model, "module", model).training
        self.note("forward", model=type(model).__name__, backward=torch.is_grad_enabled(), training=training)
        tokens = batch.mask.shape[1]
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
        log_probs = torch.log_softmax(output.logits[:, -tokens - 1 : -1].float() / temperature, -1)
        chosen = torch.where(batch.mask, log_probs.gather(-1, batch.responses[..., None])[..., 0], 0.0)
        entropy = -(log_probs.exp() * log_probs).sum(-1) * batch.mask if batch.entropy else None
        return chosen, entropy

    @hookimpl
    def prepare_mini_batch(self, batch: Any) -> None:
        rows = float(batch.sum(batch.weights.new_tensor(float(len(batch)))))
        batch.share("rows", rows)
        self.note("prepare_mini_batch", rows=rows, old=float(batch["old_log_probs"].sum()))

    @hookimpl
    def adapt_advantages(self, advantages: Tensor, ratio: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum().clamp(min=1)
        mean = float((ratio * mask).sum() / count)
        self.note("adapt_advantages", entropy=float((entropy * mask).sum() / count), ratio=mean)
        return advantages

    @hookimpl(kind="expert")
    def policy_loss(self, log_probs: Tensor, log: Callable[..., None]) -> Tensor:
        log("expert_rows", float(len(log_probs)))
        return -log_probs

    @hookimpl
    def auxiliary_loss(self, log_probs: Tensor, batch: Any, log: Callable[..., None]) -> Tensor:
        self.note("auxiliary_loss", rows=batch.shared["rows"], part=len(batch))
        log("log_prob", float(log_probs.detach().mean()))
        return 0.0 * log_probs.sum()

    @hookimpl
    def on_step_end(
        self, rollouts: Rollouts, rewards: Tensor, weights: Tensor, engine: Any, step: Any, log: Callable[..., None]
    ) -> None:
        rows = rollouts.prompt_rows[rollouts.prompt_rows >= 0]
        self.table["seen"][rows.unique()] += 1
        after = engine.log_probs(rollouts.prompts[:3], rollouts.responses[:3], rollouts.mask[:3])
        moved = float((after - rollouts.old_log_probs[:3]).abs().max())
        missed = self.state.model.fit(torch.ones(1, 1), torch.ones(1))
        self.note("on_step_end", rows=len(rollouts), missing=int(rewards.isnan().any(1).sum()), moved=moved, missed=missed,
                  weights=weights.flatten().tolist(), step=step.number, steps=self.state.steps)  # fmt: skip
        log("rows", float(len(rollouts)))

    @hookimpl
    def on_validation(self, metrics: Any, engine: Any) -> None:
        self.state.validations = self.state.validations + 1
        self.note("on_validation", names=sorted(metrics), validations=self.state.validations)
