"""The probe of verl's tests, which has something to do in every phase of the driver, with hooks of the update."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlplugins import hookimpl
from rlplugins.rollouts import Requests, Rollouts
from rlplugins_probe import Probe


class OpenRLHFProbe(Probe):
    """Writes down what it saw, and in which process; stops in its third step where a file `gate` lies beside its notes."""

    name = "openrlhf-probe"

    def note(self, hook: str, **seen: Any) -> None:
        super().note(hook, pid=os.getpid(), **seen)

    @hookimpl
    def sampling_params(self, sampling: Any, requests: Any, step: Any) -> Any:
        if step.number == 2 and (Path(self.log_file).parent / "gate").exists():
            self.note("gate")
            time.sleep(1000)
        return super().sampling_params(sampling, requests)

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Any, engine: Any, step: Any) -> Rollouts:
        self.ask(prompts, engine)
        return super().extend_rollouts(rollouts, engine, step)

    def ask(self, prompts: Any, engine: Any) -> None:
        """Two responses to one prompt of the pool and one, with a forced beginning, to another; twice the likeliest ones."""
        requests = Requests.of(prompts.select(torch.tensor([5, 9])), torch.tensor([2, 1]))
        greedy = engine.generate(requests, greedy=True, score=False)
        requests.prefixes[2] = "12"
        made = engine.generate(requests, replace(engine.sampling(3), max_tokens=torch.tensor([4, 5, 7])))
        given = engine.log_probs(made.prompts, made.responses, made.mask)
        self.note(
            "engine.generate", keys=made.prompt_keys.tolist(), wanted=prompts.keys[torch.tensor([5, 5, 9])].tolist(),
            groups=made.groups.tolist(), lengths=made.mask.sum(1).tolist(), kind=made.kind.tolist(),
            version=made.version.tolist(), scores=made.scores.flatten().tolist(), prefix=made.prefix.sum(1).tolist(),
            difference=float(((given - made.rollout_log_probs) * (made.mask & ~made.prefix)).abs().max()),
            greedy=greedy.responses.tolist(), unscored=bool(greedy.scores.isnan().all()),
        )  # fmt: skip

    @hookimpl
    def prepare_mini_batch(self, batch: Any) -> None:
        rows = float(batch.sum(batch.weights.new_tensor(float(len(batch)))))
        batch.share("rows", rows)
        self.note(
            "prepare_mini_batch", rows=rows, weight=float(batch.token_weight), old=float(batch["old_log_probs"].sum())
        )

    @hookimpl
    def adapt_advantages(self, advantages: Tensor, ratio: Tensor, entropy: Tensor, mask: Tensor) -> Tensor:
        spread = (entropy * mask).sum() / mask.sum().clamp(min=1)
        self.note(
            "adapt_advantages", entropy=float(spread), ratio=float((ratio * mask).sum() / mask.sum().clamp(min=1))
        )
        return advantages

    @hookimpl
    def auxiliary_loss(self, log_probs: Tensor, batch: Any, log: Callable[..., None]) -> Tensor:
        self.note("auxiliary_loss", rows=batch.shared["rows"], part=len(batch))
        log("log_prob", float(log_probs.detach().mean()))
        return 0.0 * log_probs.sum()
