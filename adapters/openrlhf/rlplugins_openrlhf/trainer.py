"""The trainer's process with a stack: it owns the plugins' state.

`bind` is called by the `fit` that `install` sends with the actor class, before OpenRLHF's own. It replaces methods of this one
trainer and of the objects that it holds; every replacement calls the original. The order of a step is

    generate_samples                   the step opens; prompts are chosen, rewritten, sent; rows are added and dropped
    make_experience_batch              rows that fill mini-batches; columns and shared values go to the ranks
    compute_advantages_and_returns     credit, when all log-prob passes are there
    train_step                         the update; afterwards the engine has the new weights, and plugins change their state
    save_logs_and_checkpoints          the checkpoint, plugin state first: OpenRLHF's note of the latest one makes it whole
    save_best_checkpoint               on_validation
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from torch import Tensor

from rlplugins import ops
from rlplugins.errors import ConfigurationError, DataError
from rlplugins.rollouts import Prompts, Requests, Rollouts, Sampling
from rlplugins.services import Gradients
from rlplugins.stack import Credit, Stack, StackConfig
from rlplugins.steps import Run
from rlplugins.table import PromptTable
from rlplugins.together import packed
from rlplugins_openrlhf import columns as rows_of_openrlhf
from rlplugins_openrlhf import gradients, rollout, settings, worker
from rlplugins_openrlhf.columns import FRAME, REAL
from rlplugins_openrlhf.engine import OpenRLHFEngine
from rlplugins_openrlhf.pool import Pool, PoolPrompt, Request

logger = logging.getLogger("rlplugins.openrlhf")

TAGS = ("global_step", "best_global_step")
GENERATOR = "openrlhf.trainer.ppo_utils.samples_generator"


def bind(name: str, trainer: Any, given: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Bind the stack to the object of class `name`, whose `fit` is about to run in this process.

    Args:
        name: of the class.
        trainer: the object.
        given: the user's stack.
        options: what `fit` is called with.
    """
    settings.check_version()
    config = StackConfig.model_validate(dict(given))
    kinds = {"PPOTrainer": TrainingRun, "TrainingActor": TrainingBehind, "GenerateSamplesActor": GenerationAhead}
    kinds[name](trainer, config).bind(options)


class Generation:
    """The hooks of the prompts, in the process that generates.

    Args:
        trainer: OpenRLHF's object that holds the samples generator.
        config: the user's stack.
    """

    def __init__(self, trainer: Any, config: StackConfig) -> None:
        self.trainer = trainer
        generator = getattr(trainer, "samples_generator", None)
        self.strategy = generator.strategy if generator is not None else trainer.strategy
        self.tokenizer = generator.tokenizer if generator is not None else trainer.tokenizer
        self.args = self.strategy.args
        self.pool = self._read_pool()
        self.stack: Stack = settings.build_stack(self.args, config, self.pool.prompts.columns)
        stack = self.stack
        self.chooses = stack.claims("choose_prompts") or stack.claims("prompt_weights")
        self.rewrites = stack.claims("rewrite_prompts") or stack.claims("sampling_params")
        self.allocates = stack.claims("allocate_rollouts")
        self.keeps_log_probs = stack.needs("column", "rollout_log_probs")
        self.total_steps = self.planned_steps()
        self.seed = int(self.args.train.seed)
        self.done = self.places = 0
        self.training = False
        self.options: Mapping[str, Any] = getattr(trainer, "generate_kwargs", {})
        size = settings.group_size(self.args)
        self.stack.start(
            Run(self.total_steps, size, settings.budget(self.args), self.pool.prompts, self.seed, self.tokenizer)
        )

    def planned_steps(self) -> int:
        """Training steps that the flags plan."""
        return settings.total_steps(self.args, len(self.pool.prompts))

    def _read_pool(self) -> Pool:
        loader = getattr(self.trainer, "prompts_dataloader", None)
        if loader is None:  # this process only trains, on prompts that another has read
            from openrlhf.trainer.ppo_trainer import prepare_datasets

            loader = prepare_datasets(self.strategy, self.tokenizer)[0]
        pool = Pool.of(loader.dataset, self.strategy, PromptTable())
        pool.tag()
        return pool

    def bind_generator(self) -> None:
        """Take over what the samples generator asks for."""
        generator, module = self.trainer.samples_generator, sys.modules[GENERATOR]
        self.dispatch_all = generator._dispatch_prompts_to_vllm
        generator._dispatch_prompts_to_vllm = self.send
        generator.generate_samples = functools.partial(self.generate, generator.generate_samples)
        module._collect_prompt_batch = functools.partial(  # type: ignore[attr-defined]
            self.collect, module._collect_prompt_batch
        )

    def engine_calls(self) -> dict[str, Any]:
        """The handshake with every engine."""
        generator = getattr(self.trainer, "samples_generator", self.trainer)
        return {
            f"rollout engine {number}": engine.__ray_call__.remote(rollout.bind, self.keeps_log_probs)
            for number, engine in enumerate(generator.vllm_engines or [])
        }

    def generate(self, original: Callable[..., Any], **options: Any) -> Any:
        """A step's responses, in the order of its prompts and draws."""
        self.places, self.options = 0, options
        self.training = True
        samples, *rest = original(**options)
        self.training = False
        return rows_of_openrlhf.in_order(samples), *rest

    def collect(self, original: Callable[..., Any], items: Any, count: int) -> Any:
        """The prompts that come next, or as many that the stack chooses; OpenRLHF's loader keeps pace."""
        prompts, labels, images, exhausted = original(items, count)
        if not self.training or not prompts:
            return prompts, labels, images, exhausted
        positions = [prompt.position for prompt in prompts]
        if self.chooses:
            positions = self.stack.choose_prompts(self.pool.prompts, len(prompts)).tolist()
            prompts, labels, images = map(list, zip(*map(self.pool.item, positions), strict=True))
        requests: Sequence[Sequence[Request]] = [()] * len(positions)
        if self.rewrites or self.allocates:
            requests = self.chosen_requests(self.pool.prompts.select(torch.tensor(positions)))
        prompts = [
            PoolPrompt.of(text, position, self.places + number, requests[number])
            for number, (text, position) in enumerate(zip(prompts, positions, strict=True))
        ]
        self.places += len(prompts)
        return prompts, labels, images, exhausted

    def chosen_requests(self, prompts: Prompts) -> list[list[Request]]:
        """What hooks make of the requests of the step's prompts."""
        each = settings.group_size(self.args)
        counts = torch.full((len(prompts),), each)
        if self.allocates:
            counts = self.stack.allocate_rollouts(prompts, len(prompts) * each)
        requests = Requests.of(prompts, counts)
        sampling = None
        if self.rewrites:
            requests = self.stack.rewrite_prompts(requests)
            drawn = self.stack.sampling_params(requests, self.sampling(len(requests)))
            sampling = drawn if self.stack.claims("sampling_params") else None
        return self.requests(requests, sampling, Requests.of(prompts, counts))

    def requests(self, requests: Requests, sampling: Sampling | None, plain: Requests) -> list[list[Request]]:
        """Per prompt its requests as they are sent; `plain` are those before any hook."""
        texts = {row: self.templated(requests.texts[row]) for row in rollout.rewritten(plain, requests)}
        return rollout.requests_of(requests, sampling, texts, numbers=self.stack.claims("process_logits"))

    def templated(self, text: Any) -> str:
        """A prompt as OpenRLHF's data set makes it of the file's."""
        from openrlhf.datasets.prompts_dataset import preprocess_data

        data = self.args.data
        template = self.tokenizer.apply_chat_template if data.apply_chat_template else None
        made: str = preprocess_data({"prompt": text}, data.input_template, "prompt", None, template)[0]
        return made

    def encoded(self, texts: Sequence[Any], responses: Sequence[str]) -> list[list[int]]:
        """Token ids of responses to prompts, as the policy would have drawn them: with an end token."""
        written = [self.answer(text, response) for text, response in zip(texts, responses, strict=True)]
        ids = self.tokenizer(text=written, add_special_tokens=False)["input_ids"] if written else []
        end = self.tokenizer.eos_token_id
        return [row if end is None or (row and row[-1] in self.end_tokens) else [*row, end] for row in ids]

    def answer(self, prompt: Any, response: str) -> str:
        """What a response adds to its prompt; with a chat template, what that makes of it.

        Raises:
            DataError: if the template changes the prompt when a response follows.
        """
        if not self.args.data.apply_chat_template:
            return response
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        start = self.templated(prompt)
        whole = self.tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": response}], tokenize=False)
        if not whole.startswith(start):
            raise DataError("the chat template of the tokenizer changes the prompt when a response follows: leave out "
                            "--data.apply_chat_template, and give prompts and responses as texts")  # fmt: skip
        return str(whole[len(start) :]).rstrip("\n")

    @functools.cached_property
    def end_tokens(self) -> frozenset[int]:
        """Every token at which the engine ends a response: the tokenizer's, and those that the model's folder names."""
        from transformers import GenerationConfig

        found: list[int] = [self.tokenizer.eos_token_id]
        with contextlib.suppress(OSError):
            named = GenerationConfig.from_pretrained(self.args.actor.model_name_or_path).eos_token_id
            found += [named] if isinstance(named, int) else named or []
        return frozenset(found)

    def answered(self, prompts: Sequence[PoolPrompt]) -> list[dict[str, Any]]:
        """OpenRLHF's responses to prompts whose requests hold an answer, made here: without engine and reward."""
        from openrlhf.utils.agent import SingleTurnAgentExecutor

        executor = rollout.RequestExecutor(SingleTurnAgentExecutor(), self.keeps_log_probs)
        sampling = SimpleNamespace(max_tokens=self.options.get("max_new_tokens"), logprobs=None)
        same = {"sampling_params": sampling, "max_length": int(self.args.data.max_len), "hf_tokenizer": self.tokenizer}

        async def execute() -> list[dict[str, Any]]:
            return [await executor.execute(prompt, "", llm_engine=None, **same) for prompt in prompts]

        return asyncio.run(execute())

    def sampling(self, rows: int) -> Sampling:
        """The user's own parameters for so many requests."""
        limit = self.options.get("max_new_tokens") or int(self.args.data.max_len)
        rollout_args = self.args.rollout
        return Sampling.of(rows, float(rollout_args.temperature), int(limit), float(rollout_args.top_p))

    def send(self, prompts: Sequence[Any], labels: Sequence[Any], *, images: Any = None, **options: Any) -> list[Any]:
        """Send prompts to the engines; each with as many responses as its requests, where hooks had a say in them."""
        if not self.training or not any(prompt.requests for prompt in prompts):
            return self.dispatch_all(prompts, labels, images=images, **options)  # type: ignore[no-any-return]
        return self.dispatch(prompts, labels, images if images is not None else [None] * len(prompts), **options)

    def dispatch(self, prompts: Sequence[Any], labels: Any, images: Any, **options: Any) -> list[Any]:
        """OpenRLHF's own dispatch of as many responses to every prompt as it has requests."""
        counts = [len(prompt.requests) for prompt in prompts]
        refs: list[Any] = [None] * len(prompts)
        for count in sorted(set(counts)):
            rows = [row for row, own in enumerate(counts) if own == count]
            columns = ([column[row] for row in rows] for column in (prompts, labels, images))
            given = dict(zip(("prompts", "labels", "images"), columns, strict=True))
            sent = self.dispatch_all(**given, **{**(options or self.options), "n_samples_per_prompt": count})
            for row, ref in zip(rows, sent, strict=True):
                refs[row] = ref
        return refs

    def sample(self, response: Any) -> Any:
        """OpenRLHF's sample of an engine's response."""
        return self.trainer.samples_generator._process_response_into_experience(response, **self.options)


class GenerationAhead(Generation):
    """Generation in a process apart (`--train.async_enable`), whose steps are ahead of the updates."""

    def bind(self, options: Mapping[str, Any]) -> None:
        """Take over the generator, from where the run stands."""
        self.bind_generator()
        shake_hands(self.engine_calls(), self.stack)
        self.done = int(options["total_consumed_prompts"]) // int(self.args.rollout.batch_size)

    def generate(self, original: Callable[..., Any], **options: Any) -> Any:
        """A step to come."""
        self.stack.begin_step(self.done, self.total_steps, self.seed)
        self.done += 1
        return super().generate(original, **options)


class TrainingRun(Generation):
    """The whole loop in one process: OpenRLHF's `PPOTrainer`."""

    def __init__(self, trainer: Any, config: StackConfig) -> None:
        super().__init__(trainer, config)
        stack = self.stack
        self.owns_credit, self.owns_loss = settings.owns_credit(stack), settings.owns_loss(stack)
        self.owns_critic = settings.owns_critic(self.args, stack)
        self.keeps_entropy = stack.needs("column", "entropy") or stack.takes("entropy", "credit")
        self.keeps_together = settings.keeps_together(self.args, stack)
        self.must_keep_together = settings.must_keep_together(stack)
        self.engine: OpenRLHFEngine | None = None
        self.rollouts: Rollouts | None = None
        self.credit: Credit | None = None
        self.postponed: tuple[Any, ...] | None = None

    def bind(self, options: Mapping[str, Any]) -> None:
        """Take over generation, credit, update and life."""
        trainer, maker = self.trainer, self.trainer.experience_maker
        self.bind_generation()
        maker.make_experience_batch = functools.partial(self.make_experiences, maker.make_experience_batch)
        maker.make_experience = functools.partial(self.make_passes, maker.make_experience)
        maker.compute_advantages_and_returns = functools.partial(self.give_credit, maker.compute_advantages_and_returns)
        for name, replacement in {
            "init_checkpoint_states": self.restore, "train_step": self.train, "_compute_rollout_stats": self.measure,
            "save_logs_and_checkpoints": self.save, "save_best_checkpoint": self.validate,
        }.items():  # fmt: skip
            setattr(trainer, name, functools.partial(replacement, getattr(trainer, name)))

    def bind_generation(self) -> None:
        """Take over the generator, and give hooks the engine."""
        self.bind_generator()
        self.engine = OpenRLHFEngine(self)

    # making

    def shake_hands(self) -> None:
        """Bind every process that trains or generates, and compare what is installed there."""
        specification, forward = self.stack.specification(), self.stack.claims("forward")
        size = settings.micro_batch(self.args) if self.keeps_together else 0
        update = worker.Binding(
            specification, loss=self.owns_loss, entropy=self.keeps_entropy, forward=forward, whole=size
        )
        clip = settings.at(self.args, "critic.value_clip")
        critic = worker.Binding(specification, critic=self.owns_critic, clip=clip)
        reference = worker.Binding(specification, forward=forward)
        groups = (
            ("actor", self.trainer.actor_model_group, update),
            ("critic", self.trainer.critic_model_group, critic),
            ("reference", self.trainer.reference_model_group if forward else None, reference),
        )
        calls = {
            f"{who} {number}": handle.__ray_call__.remote(worker.bind, binding)
            for who, group, binding in groups if group is not None
            for number, handle in enumerate(group._actor_handlers)
        }  # fmt: skip
        shake_hands(calls | self.engine_calls(), self.stack)

    def restore(self, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The first call of OpenRLHF's loop: shake hands, and take the plugins' state of the checkpoint, if there is one."""
        self.shake_hands()
        states = original()
        self.done = int(states["global_step"])
        if self.done:
            self.load()
        print(f"rlplugins: {', '.join(map(repr, self.stack.plugins))}", flush=True)
        return states

    # rollouts

    def generate(self, original: Callable[..., Any], **options: Any) -> Any:
        """The rollouts of a step, extended and filtered."""
        self.begin()
        samples, *rest = super().generate(original, **options)
        if samples:
            samples = self.after_generation(samples)
        return samples, *rest

    def begin(self) -> None:
        """Open the step."""
        self.stack.begin_step(self.done, self.total_steps, self.seed)
        self.rollouts = self.credit = None
        renews = self.stack.claims("reference_policy") and self.trainer.reference_model_group is not None
        if renews and self.stack.reference_policy() == "current":
            self.copy_reference()

    def copy_reference(self) -> None:
        """Give every reference model the policy's present weights."""
        weights = self.trainer.actor_model_group._actor_handlers[0].__ray_call__.remote(worker.weights_of)
        group = self.trainer.reference_model_group
        ray.get([item.__ray_call__.remote(worker.copy_reference, weights) for item in group._actor_handlers])

    def after_generation(self, samples: list[Any]) -> list[Any]:
        """The samples of a step after the hooks of the rollouts; `self.rollouts` are its rows."""
        if not isinstance(samples[0].prompts[0], PoolPrompt):
            raise ConfigurationError("the process that generates was not bound; start the run by `rlplugins openrlhf`")
        if self.owns_credit and not settings.scores_late(self.args):
            rows_of_openrlhf.complete(samples)
        known = self.pool.known([sample.prompts[0] for sample in samples])
        drawn = rows_of_openrlhf.to_rollouts(samples, known, self.done, keep_log_probs=self.keeps_log_probs)
        rollouts = drawn
        if self.stack.claims("extend_rollouts"):
            rollouts = self.stack.extend_rollouts(drawn, self.engine)  # type: ignore[arg-type]
        rollouts = self.stack.filter_rollouts(rollouts) if len(rollouts) else rollouts
        self.rollouts = rollouts
        if rollouts is drawn:
            return samples
        if not len(rollouts):
            logger.warning("step %d: every response was dropped, there is no update", self.done)
            self.end(None)
            return []
        return rows_of_openrlhf.samples_of(rollouts, drawn, samples)

    # credit

    def make_experiences(self, original: Callable[..., Any], samples: list[Any]) -> list[Any]:
        """OpenRLHF's experiences of the rows, with rows that fill the last mini-batch and what the ranks need."""
        assert self.rollouts is not None
        size = settings.micro_batch(self.args)
        if not self.owns_loss:
            experiences = original(samples)
            units = self.units(self.rollouts)
            if units is None or len(samples) % (size * settings.ranks(self.args)):
                return experiences  # type: ignore[no-any-return]
            return recut(experiences, size, side_by_side(units, len(samples)))
        least = int(self.args.rollout.micro_batch_size) * (settings.ranks(self.args) - 1) + 1  # something for each rank
        units = self.units(self.rollouts)
        if units is not None and self.must_keep_together:
            least = max(least, size * len(packed(units, torch.ones_like(units), size)))
        samples = rows_of_openrlhf.filled(samples, int(self.args.train.batch_size), least)
        experiences = original(samples)
        assert self.credit is not None
        columns = self.stack.update_columns(self.rollouts, self.credit)
        packing = rows_of_openrlhf.Packing.of(columns)
        frame = worker.Frame(self.done, self.rollouts.kinds, self.stack.step.shared_by_all(), packing)
        starts = torch.tensor([len(prompt) for prompt in self.rollouts.prompts])
        for experience in experiences:
            rows = torch.tensor(experience.index)
            first = starts[rows.clamp(max=len(starts) - 1)]
            experience.info |= rows_of_openrlhf.packed(columns, packing, rows, first)
            experience.info[FRAME] = [[frame]] * len(rows)  # one object, and sent as one
        rows_of_openrlhf.level(experiences)
        if units is None:
            return self.dealt(experiences)
        ordered = whole(units, len(samples), size) if self.must_keep_together else side_by_side(units, len(samples))
        return recut(experiences, size, ordered)

    def units(self, rollouts: Rollouts) -> Tensor | None:
        """(B,) int64, equal for rows that are to be in one micro-batch; None: they lie as they lie.

        Where some plugin cannot do without, those that others would merely like are left out: they may be larger.
        """
        if not self.keeps_together:
            return None
        by = {need.value for need in settings.together(self.stack) if need.required >= self.must_keep_together}
        alone = torch.full_like(rollouts.groups, -1)
        return ops.joined(
            rollouts.prompt_rows if "prompt" in by else alone, rollouts.groups if "group" in by else alone
        )

    def micro_batches(self, rollouts: Rollouts) -> list[list[int]]:
        """The rows of each micro-batch of a mini-batch that they make up alone."""
        size, units = settings.micro_batch(self.args), self.units(rollouts)
        if units is not None and self.must_keep_together:
            return packed(units, torch.ones_like(units), size)
        order = list(range(len(rollouts))) if units is None else side_by_side(units, len(rollouts))
        return [order[first : first + size] for first in range(0, len(order), size)]

    def gradients(self, asked: Sequence[gradients.Asked]) -> Gradients:
        """What the actor's ranks, each with its own part of the rows, say together."""
        handles = self.trainer.actor_model_group._actor_handlers
        calls = [
            handle.__ray_call__.remote(worker.gradient_products, own)
            for handle, own in zip(handles, asked, strict=True)
        ]
        return ray.get(calls)[0]  # type: ignore[no-any-return]

    def dealt(self, experiences: list[Any]) -> list[Any]:
        """The experiences, as many rows of them for every rank."""
        counts = [len(experience.sequences) for experience in experiences]
        share = settings.ranks(self.args)
        if len(counts) % share == 0 and len(set(counts)) == 1:
            return experiences
        return recut(experiences, sum(counts) // share)

    def make_passes(self, original: Callable[..., Any], samples_list: list[Any]) -> list[Any]:
        """The log-prob passes over the rows; their entropies, where the stack reads them, become a column of `info`."""
        if not self.keeps_entropy:
            return original(samples_list)  # type: ignore[no-any-return]
        handles = self.trainer.actor_model_group._actor_handlers
        ray.get([handle.__ray_call__.remote(worker.take_entropies) for handle in handles])  # of other passes
        made = original(samples_list)
        kept = ray.get([handle.__ray_call__.remote(worker.take_entropies) for handle in handles])
        found = [entropy for rank in kept[:: settings.duplicates(self.args)] for entropy in rank]
        self.entropies = dict(zip(map(id, made), found, strict=True))
        return made  # type: ignore[no-any-return]

    @torch.no_grad()
    def give_credit(self, original: Callable[..., Any], experiences: list[Any]) -> list[Any]:
        """The step's advantages: the stack's, or OpenRLHF's own as hooks of the life phase see them."""
        assert self.rollouts is not None
        if not self.owns_credit:
            experiences = original(experiences)
        else:
            self.penalise(experiences)
        rows = Rows.of(experiences, self.rollouts)
        self.rollouts = self.with_passes(rows)
        if not self.owns_credit:
            advantages = rows.column([experience.advantages for experience in experiences])
            scores, groups = self.rollouts.scores, self.rollouts.groups
            self.credit = Credit(scores, groups, None, advantages, None, None, None)
            return experiences
        self.credit = self.stack.credit(self.rollouts, self.engine)
        rows.write(self.credit, excluded=not self.owns_loss)
        return experiences

    def penalise(self, experiences: list[Any]) -> None:
        """OpenRLHF's penalties for long and for cut responses, as its flags say."""
        from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

        for experience in experiences:
            experience.rewards = experience.rewards.float()
        apply_length_penalties(experiences, self.args)
        assert self.rollouts is not None
        scores = self.rollouts.scores.clone()
        for experience in experiences:
            rows = torch.tensor(experience.index)
            real = rows < len(scores)
            scores[rows[real], 0] = experience.rewards[real]
        self.rollouts = replace(self.rollouts, scores=scores)

    def with_passes(self, rows: Rows) -> Rollouts:
        """The rollouts with what OpenRLHF's passes over them gave, as far as the stack reads it."""
        assert self.rollouts is not None
        found: dict[str, Tensor | None] = {
            "old_log_probs": rows.column([item.action_log_probs for item in rows.experiences])
        }
        sources = {"ref_log_probs": "base_action_log_probs", "values": "values"}
        for name, source in sources.items():
            given = [getattr(item, source) for item in rows.experiences]
            if (self.stack.needs("column", name) or self.stack.takes(name)) and given[0] is not None:
                found[name] = rows.column(given)
        if self.keeps_entropy:
            found["entropy"] = rows.column([self.entropies[id(item)] for item in rows.experiences])
        return replace(self.rollouts, **found)  # type: ignore[arg-type]

    # life

    def train(self, original: Callable[..., Any], samples: list[Any], global_step: int) -> Any:
        """One step of OpenRLHF on these rows; afterwards plugins change their state."""
        status, after = original(samples, global_step)
        skipped = status.get("rlplugins/update_skipped") == 1.0
        if skipped:
            logger.warning("step %d: no response counts, the update is skipped", global_step)
        self.end(self.credit)
        self.done = after
        return status | self.stack.metrics.as_dict(), after

    def end(self, credit: Credit | None) -> None:
        """The plugins' end of step."""
        assert self.rollouts is not None
        self.stack.end_step(self.rollouts, credit, self.engine)
        self.rollouts = self.credit = None

    def measure(self, original: Callable[..., Any], experiences: list[Any]) -> dict[str, Any]:
        """OpenRLHF's statistics of a step, over the rows that do not only fill it."""
        real = [item.info.get(REAL, torch.ones(len(item.sequences), dtype=torch.bool)) for item in experiences]
        return original([  # type: ignore[no-any-return]
            SimpleNamespace(
                info={"reward": item.info["reward"][rows]}, response_length=item.response_length[rows],
                truncated=item.truncated[rows],
            )
            for item, rows in zip(experiences, real, strict=True)
        ])  # fmt: skip

    # checkpoints

    def save(
        self, original: Callable[..., None], global_step: int, logs_dict: Any = None, client_states: Any = None
    ) -> None:
        """OpenRLHF's logs and checkpoint; one of a step with a validation that changes a state waits for it."""
        due = global_step % self.args.ckpt.save_steps == 0
        if due and self.validates(global_step):
            with self.setting("ckpt", "save_steps"):
                original(global_step, logs_dict, client_states)
            self.postponed = original, global_step, client_states
            return
        if due:
            self.save_state(global_step)
        original(global_step, logs_dict, client_states)

    def validates(self, global_step: int) -> bool:
        """Whether OpenRLHF validates after this step and a plugin changes its state then."""
        loader = getattr(self.trainer, "eval_dataloader", None)
        every = self.args.eval.steps
        return loader is not None and self.stack.claims("on_validation") and global_step % every == 0

    def validate(
        self, original: Callable[..., None], eval_metrics: dict[str, Any], global_step: int, client_states: Any = None
    ) -> None:
        """After a validation: plugins see its metrics; then the checkpoints."""
        self.stack.validated({name: float(value) for name, value in eval_metrics.items()}, self.engine)
        if self.trainer.tensorboard_logger:
            self.trainer.tensorboard_logger.log_eval(global_step, self.stack.metrics.as_dict())
        self.save_state(global_step)
        if self.postponed is not None:
            save, step, states = self.postponed
            self.postponed = None
            with self.setting("logger", "logging_steps"):
                save(step, None, states)
        original(eval_metrics, global_step, client_states)

    @contextlib.contextmanager
    def setting(self, group: str, name: str) -> Iterator[None]:
        """OpenRLHF with one of its intervals set to never."""
        namespace = getattr(self.args, group)
        before = getattr(namespace, name)
        setattr(namespace, name, inf)
        yield
        setattr(namespace, name, before)

    def save_state(self, step: int) -> None:
        """Write the plugins' state, and remove that of checkpoints which are gone."""
        if self.args.ckpt.disable_ds:
            return
        folder = settings.state_folder(self.args, step)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.stack.save(folder, step)
        actor = Path(self.args.ckpt.path) / settings.ACTOR
        for other in folder.parent.iterdir():
            number = other.name.removeprefix(TAGS[0])
            if other != folder and not any((actor / f"{tag}{number}").exists() for tag in TAGS):
                shutil.rmtree(other, ignore_errors=True)

    def load(self) -> None:
        """The plugins' state of the checkpoint that OpenRLHF goes on from; none, if it was written without rlplugins."""
        folder = settings.state_folder(self.args, self.done)
        if not folder.exists():
            logger.warning("%s is missing: the plugins start anew from this checkpoint", folder)
            return
        self.stack.load(folder)


class TrainingBehind(TrainingRun):
    """The process that trains while another generates (`--train.async_enable`)."""

    def bind(self, options: Mapping[str, Any]) -> None:
        """Take over credit, update and life; OpenRLHF has read its checkpoint before."""
        super().bind(options)
        self.shake_hands()
        self.done = int(options["global_step"])
        if self.done:
            self.load()

    def bind_generation(self) -> None:
        """Nothing to generate with here: hooks get no engine."""

    def train(self, original: Callable[..., Any], samples: list[Any], global_step: int) -> Any:
        """One step on rows that another process has drawn."""
        self.done = global_step
        self.begin()
        rows = self.after_generation(samples)
        if not rows:
            return {"rlplugins/update_skipped": 1.0}, global_step + 1
        return super().train(original, rows, global_step)


def shake_hands(calls: Mapping[str, Any], stack: Stack) -> None:
    """Wait for the answers of other processes.

    Args:
        calls: by process the call that binds it.
        stack: that of this process.

    Raises:
        ConfigurationError: naming the process that cannot load rlplugins, or has another installation.
    """
    expected = {"fingerprint": stack.fingerprint, **worker.versions()}
    for who, call in calls.items():
        try:
            answer = ray.get(call)
        except Exception as error:
            raise ConfigurationError(
                f"{who} cannot load rlplugins as this process does; install the same distributions of rlplugins and of the "
                f"stack's plugins on every node: {error}"
            ) from error
        different = sorted(name for name in answer if answer[name] != expected[name])
        if different:
            text = "; ".join(f"{name}: {answer[name]} there, {expected[name]} here" for name in different)
            raise ConfigurationError(f"{who} runs another installation: {text}")


class Rows:
    """Where the rows of a step lie in OpenRLHF's experiences.

    Args:
        experiences: after the passes.
        rollouts: the step's rows.
    """

    def __init__(self, experiences: list[Any], rollouts: Rollouts) -> None:
        self.experiences = experiences
        self.mask = rollouts.mask
        self.starts = torch.tensor([len(prompt) for prompt in rollouts.prompts])
        self.places = [torch.tensor(experience.index) for experience in experiences]

    @classmethod
    def of(cls, experiences: list[Any], rollouts: Rollouts) -> Rows:
        """The rows of these experiences."""
        return cls(experiences, rollouts)

    def column(self, parts: Sequence[Tensor]) -> Tensor:
        """(B, T) from a column (b, A) of each experience."""
        rows, width = self.mask.shape
        found = torch.zeros(rows, width)
        for place, part in zip(self.places, parts, strict=True):
            real = place < rows
            own = place[real]
            found[own] = rows_of_openrlhf.to_responses(part[real].float(), self.starts[own], width)
        return found * self.mask

    def write(self, credit: Credit, *, excluded: bool) -> None:
        """Advantages and returns as OpenRLHF's own estimators leave them.

        Args:
            credit: what the stack made of the rows.
            excluded: take rows of weight 0 (no finite reward) out of the masks, for OpenRLHF's own loss.
        """
        rows, width = self.mask.shape
        advantages = (credit.advantages.float() * self.mask).expand(rows, width)
        targets = advantages if credit.value_targets is None else credit.value_targets[0].float()
        for experience, place in zip(self.experiences, self.places, strict=True):
            real = place < rows
            own = place.clamp(max=rows - 1)
            wide = experience.action_mask.shape[1]
            for name, column in (("advantages", advantages), ("returns", targets)):
                values = rows_of_openrlhf.to_sequences(column[own] * real[:, None], self.starts[own], wide)
                setattr(experience, name, values * experience.action_mask)
            if excluded and credit.weights is not None:
                kept = (credit.weights[own] > 0) & real[:, None]
                experience.action_mask = experience.action_mask * kept
            count = experience.action_mask.sum(1).clamp(min=1)
            experience.info["return"] = experience.advantages.sum(1) / count
            experience.kl = None


def whole(units: Tensor, rows: int, size: int) -> list[int]:
    """The order of the rows in which every micro-batch holds whole units.

    Args:
        units: (B,) int64, of the rows that count; those beyond B fill.
        rows: of the step.
        size: rows of a micro-batch.

    Raises:
        ConfigurationError: if a unit is larger than a micro-batch.
    """
    units = torch.cat([units, -1 - torch.arange(rows - len(units))])
    parts = packed(units, torch.ones_like(units), size)
    if any(len(part) != size for part in parts):
        raise ConfigurationError(
            f"a step has {max(map(len, parts))} rows that must stay whole in one micro-batch of {size}: raise "
            "--train.micro_batch_size (one prompt may stand in the prompt file several times)"
        )
    return [row for part in parts for row in part]


def side_by_side(units: Tensor, rows: int) -> list[int]:
    """The order of the rows in which those of a unit lie side by side, as far as micro-batches let them; `units` as above."""
    units = torch.cat([units, units.new_full((rows - len(units),), 2**62)])
    return torch.argsort(units, stable=True).tolist()


def recut(experiences: list[Any], size: int, order: Sequence[int] | None = None) -> list[Any]:
    """The rows of the experiences in experiences of another size, in their order or in the order of these rows."""
    from openrlhf.trainer.ppo_utils.experience import make_experience_batch, split_experience_batch

    rows = [row for experience in experiences for row in experience.index]  # splitting forgets them
    items = [item for experience in experiences for item in split_experience_batch(experience)]
    if order is not None:
        by_row = dict(zip(rows, items, strict=True))
        items = [by_row[row] for row in order]
    made = [make_experience_batch(items[first : first + size]) for first in range(0, len(items), size)]
    for experience in made:
        experience.info = {name: _joined(values) for name, values in experience.info.items()}
    return made


def _joined(values: Any) -> Any:
    """Numbers per row as one tensor, as OpenRLHF's own experiences have them."""
    single = isinstance(values, list) and all(isinstance(value, Tensor) and value.dim() == 0 for value in values)
    return torch.stack(values) if single else values
