"""Critique-GRPO: Advancing LLM Reasoning with Natural Language and Numerical Feedback (Zhang et al., 2025, arXiv 2506.03106).

Loss, choice and place of the refined rows and kinds of critiques as in the official code, zhangxy-2019/critique-GRPO,
`verl/verl/critique_grpo/critique_core_algos.py` and `critique_vllm_rollout_spmd.py`; one refined row per prompt and no
division by the standard deviation from the paper. The prompts are worded anew.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import Log
from rlplugins.judge import PluginJudge
from rlplugins.needs import Need
from rlplugins.rollouts import POLICY, Column, Prompts, Requests, Rollouts, exchanged
from rlplugins.services import Engine
from rlplugins.update import Batch

KIND = "refined"
CORRECT = 1.0  # the score of a correct answer

TEMPLATE = (
    "Problem:\n{question}\n\nProposed solution:\n{solution}\n\nCritique of it:\n{critique}\n\n"
    "Solve the problem once more, step by step. Put right what the critique finds fault with, and give the final answer "
    "in \\boxed{{}}."
)
JUDGING = """A student's solution to the problem below is wrong. Compare it step by step with the reference solution. Name \
each mistake and say why it is one; do not write out a solution of your own. End with this line and nothing after it:
Conclusion: wrong

Problem:
{question}

Reference solution:
{reference}

Student's solution:
{solution}

Critique:
"""
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
CONCLUSION = re.compile(
    r"^[^\w\n]*conclusion\b\W*[^\n]*?\b(wrong|incorrect|right|correct)\b", re.IGNORECASE | re.MULTILINE
)
WORDS = 5  # different ones, of the shortest critique

FIELDS = ("question", "solution", "critique")
Count = Annotated[int, Field(ge=0)]


class CritiqueGrpo(Plugin):
    """Lets the policy rewrite its answers given critiques, and trains on the best rewritten one under the plain prompt.

    Critique-GRPO (arXiv 2506.03106): the rewritten answer takes the place of a sampled one; its tokens weigh p / (p + gamma)
    instead of a ratio, which teaches most where the policy found them unlikely.
    """

    name = "critique-grpo"
    kinds = frozenset({KIND})

    k: Count = 1
    """Refinements of each prompt that are trained, in the places of its first k answers; 0: none is made."""
    gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.1
    """Probability at which a refined token learns fastest; None: it weighs p instead (ablation without shaping)."""
    critique: Literal["simple_gt", "indicative", "CoT"] = "simple_gt"
    """Verdict and right answer (released script), verdict alone, or a judge's words on a wrong answer (best in the paper)."""
    refine_when: Literal["always", "all_failed"] = "always"
    """Refine every prompt's answers, or only where none of them is correct (version 6 of the paper)."""
    clip: bool = False
    """Clip the ratio of the sampled answers by the stack's clip range."""
    norm_std: bool = False
    """Divide advantages by the group's standard deviation (n - 1) plus 1e-6; the released run does so against its script."""
    norm: Literal["constant", "token_mean"] = "constant"
    """The loss is the sum over all tokens divided by T, or their mean."""
    T: Annotated[int, Field(ge=1)] = 6144
    """The constant of the loss: the longest response, in tokens."""
    answer: str = "answer"
    """Column of the prompt file with the right answer; not read by `indicative`."""
    solution: str = "solution"
    """Column with the reference solution that the judge sees (`CoT`); may be that of the answer."""
    template: str = TEMPLATE
    """Text of the prompt for a refinement, or of its last message by the user."""

    @model_validator(mode="after")
    def _check_template(self) -> CritiqueGrpo:
        marks = {name: f"\0{name}" for name in FIELDS}
        try:
            made = self.template.format(**marks)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"template takes {{question}}, {{solution}} and {{critique}} only: {error!r}") from None
        if missing := [name for name, mark in marks.items() if mark not in made]:
            raise ValueError(f"template must hold {{{missing[0]}}}")
        return self

    @property
    def uses(self) -> dict[str, str]:
        """The group's mean without division, and what takes the place of the method's own loss and reduction."""
        used = {"baseline": "group_mean"}
        if not self.norm_std:
            used["advantage_scale"] = "one"
        if self.clip:
            used["policy_loss"] = "ppo_clip"
        if self.norm == "token_mean":
            used["reduce_loss"] = "token_mean"
        return used

    @property
    def needs(self) -> tuple[Need, ...]:
        """Groups; for refinements an engine, and what the critiques are made of."""
        needed = [needs.group_size(at_least=2)]
        if self.k:
            needed.append(needs.ENGINE)
        if self.k and self.critique != "indicative":
            needed.append(needs.column(self.answer))
        if self.k and self.critique == "CoT":
            needed += [needs.column(self.solution), needs.JUDGE]
        return tuple(needed)

    @property
    def breaks(self) -> frozenset[str]:
        """Sampled rows go before credit sees them, and refined ones are not compared with the old policy."""
        refined = {"whole_groups", "complete_groups", "token_ratio"} if self.k else set()
        return frozenset(refined | ({"reward_scale"} if self.norm_std else set()))

    # refinements

    @hookimpl(when=lambda self: self.k > 0)
    def extend_rollouts(
        self, rollouts: Rollouts, prompts: Prompts, engine: Engine, judge: PluginJudge, log: Log
    ) -> Rollouts:
        """The groups with k refinements in the places of their first k answers."""
        number, count = ops.dense_groups(torch.where(self._to_refine(rollouts, prompts), rollouts.groups, -1))
        log("refined", count / max(1, ops.dense_groups(rollouts.groups)[1]))
        if not count:
            return rollouts
        rows = (number >= 0).nonzero().flatten()
        rows = rows[torch.argsort(number[rows], stable=True)]  # by prompt and draw
        group, answers = number[rows], rollouts.select(rows)
        sizes = torch.bincount(group, minlength=count)
        starts = sizes.cumsum(0) - sizes
        asked = prompts.select(prompts.positions(answers.prompt_rows[starts]))
        refined, empty = self._refinements(answers, Requests.of(asked, sizes.cpu()), engine, judge, log)
        scores = refined.scores.to(rows.device)
        self._report(answers.scores == CORRECT, scores == CORRECT, group, starts, log)
        best = best_first(scores, group)
        chosen = torch.arange(len(rows), device=rows.device) - starts[group] < self.k
        chosen &= ~empty.to(rows.device)[best]  # nothing to train on: the sampled answer stays
        return exchanged(rollouts, rows[chosen], refined.select(best[chosen]), KIND)

    def _to_refine(self, rollouts: Rollouts, prompts: Prompts) -> Tensor:
        """Which answers are refined, if they are in a group, (B,) bool: what the policy drew for prompts of the pool."""
        known = (prompts.positions(rollouts.prompt_rows) >= 0).to(rollouts.groups.device)
        drawn = rollouts.of_kind(POLICY) & known
        if self.refine_when == "always":
            return drawn
        correct = drawn[:, None] & (rollouts.scores == CORRECT)
        return drawn & (ops.group_extreme(correct.float(), rollouts.groups).flatten() == 0)

    def _refinements(
        self, answers: Rollouts, requests: Requests, engine: Engine, judge: PluginJudge, log: Log
    ) -> tuple[Rollouts, Tensor]:
        """One refinement of each of n answers, as a response to the plain prompt and scored as such; which are empty, (n,).

        Args:
            answers: n rows.
            requests: their plain prompts.
            engine: draws and tokenises.
            judge: for critiques.
            log: for metrics.
        """
        solutions = engine.texts(answers)
        critiques = self._critiques(answers, requests.texts, solutions, judge, log)
        asked = [
            with_critique(text, solution, critique, self.template)
            for text, solution, critique in zip(requests.texts, solutions, critiques, strict=True)
        ]
        drawn = engine.generate(replace(requests, texts=asked), score=False)
        texts = engine.texts(drawn)
        made = engine.given(requests, texts)
        scores = torch.where(made.scores.isfinite(), made.scores, 0.0)
        return replace(made, scores=scores), torch.tensor([not text for text in texts])

    def _critiques(
        self, answers: Rollouts, prompts: Sequence[Any], solutions: Sequence[str], judge: PluginJudge, log: Log
    ) -> list[str]:
        """A critique of each of n answers, which are given as rows and as texts."""
        correct = (answers.scores.flatten() == CORRECT).tolist()
        if self.critique == "indicative":
            return [verdict(right) for right in correct]
        right_answers = entries(answers[self.answer])
        critiques = [verdict(right, answer) for right, answer in zip(correct, right_answers, strict=True)]
        if self.critique == "simple_gt":
            return critiques
        references = entries(answers[self.solution])
        wrong = [row for row, right in enumerate(correct) if not right]
        questions = [
            JUDGING.format(
                question=question_of(prompts[row]), reference=references[row] or right_answers[row] or "(there is none)",
                solution=solutions[row],
            ) for row in wrong
        ]  # fmt: skip
        found = judge.ask(questions, read_critique)
        for row, text in zip(wrong, found, strict=True):
            critiques[row] = text or critiques[row]
        if wrong:
            log("fallback", found.count(None) / len(wrong), len(wrong))
        return critiques

    def _report(self, before: Tensor, after: Tensor, group: Tensor, starts: Tensor, log: Log) -> None:
        """Shares of correct refinements and of prompts that only a refinement solves; `before` and `after` are (n, 1) bool."""
        log("correct", after.float().mean(), len(after))
        solved = [ops.group_extreme(rows.float(), group)[starts] > 0 for rows in (before, after)]
        log("rescued", (solved[1] & ~solved[0]).float().mean(), len(starts))

    # advantages

    @hookimpl(wrapper=True)
    def baseline(self, rewards: Tensor, groups: Tensor) -> Generator[None, Tensor, Tensor]:
        """0 in a group of one."""
        mean = yield
        return torch.where(ops.group_count(rewards, groups) > 1, mean, 0.0)

    @hookimpl(when=lambda self: self.norm_std)
    def advantage_scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Std + 1e-6; 1 in a group of one."""
        return torch.where(ops.group_count(rewards, groups) > 1, ops.group_std(rewards, groups) + 1e-6, 1.0)

    # update

    @hookimpl(when=lambda self: not self.clip)
    def policy_loss(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return -advantages * ratio

    @hookimpl(hook="policy_loss", kind=KIND, when=lambda self: self.k > 0)
    def refined_loss(self, log_probs: Tensor, advantages: Tensor) -> Tensor:
        """-A f, f = p / (p + gamma)."""
        p = log_probs.exp()
        return -advantages * (p if self.gamma is None else p / (p + self.gamma))

    @hookimpl(when=lambda self: self.norm == "constant")
    def prepare_mini_batch(self, batch: Batch) -> None:
        batch.share("n", batch.sum((batch.weights > 0).sum(dtype=torch.float64)))

    @hookimpl(when=lambda self: self.norm == "constant")
    def reduce_loss(self, loss: Tensor, loss_weights: Tensor, batch: Batch) -> Tensor:
        """n sum W x / (T sum w), n the number of rows with weight: sum x / T where all weights are 1."""
        return batch.shared["n"] * (loss * loss_weights).sum() / (self.T * batch.sample_weight)


def best_first(scores: Tensor, groups: Tensor) -> Tensor:
    """Positions by group; within it first those with the score 1, then the others from the highest score down, (n,) int64.

    Args:
        scores: (n, 1), finite.
        groups: (n,) int64, from 0.
    """
    values = scores.flatten()
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort((values[order] != CORRECT).byte(), stable=True)]
    return order[torch.argsort(groups[order], stable=True)]


# texts


def verdict(correct: bool, answer: str | None = None) -> str:
    """The critique that is made by rule; with the right answer if there is one."""
    judged = f"The proposed solution is {'correct' if correct else 'wrong'}."
    return judged if answer is None else f"{judged} The right answer is {answer}."


def read_critique(reply: str) -> str | None:
    """The critique in the judge's reply, up to its conclusion; None if it does not say that the solution is wrong, and why."""
    text = THOUGHT.sub("", reply).rpartition("</think>")[2]
    found = CONCLUSION.search(text)
    if found is None or found[1].lower() not in ("wrong", "incorrect"):
        return None
    reasons = text[: found.start()].strip()
    if "<think>" in reasons or len(set(re.findall(r"\w+", reasons.lower()))) < WORDS:
        return None
    return f"{reasons}\nConclusion: wrong"


def with_critique(prompt: Any, solution: str, critique: str, template: str) -> Any:
    """The prompt for a refinement: a text, or chat messages of which the last one by the user is changed."""
    question = question_of(prompt)
    text = template.format(question=question, solution=solution, critique=critique)
    if isinstance(prompt, str):
        return text
    messages = list(prompt)
    messages[last_question(messages)] = {**messages[last_question(messages)], "content": text}
    return messages


def question_of(prompt: Any) -> str:
    """A prompt that is a text, or the last message by the user."""
    return prompt if isinstance(prompt, str) else str(prompt[last_question(prompt)]["content"])


def last_question(messages: Sequence[Any]) -> int:
    """The place of the last message by the user.

    Raises:
        ConfigurationError: if there is none that is a text.
    """
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not asked or not isinstance(messages[asked[-1]]["content"], str):
        raise ConfigurationError(
            f"critique-grpo: a refinement needs a message by the user that is a text, got {messages!r}"
        )
    return asked[-1]


def entries(column: Column) -> list[str | None]:
    """The entries of a data column as texts; None where there is none."""
    values = column.tolist() if isinstance(column, Tensor) else column
    return [None if value is None else f"{value:.7g}" if isinstance(value, float) else str(value) for value in values]
