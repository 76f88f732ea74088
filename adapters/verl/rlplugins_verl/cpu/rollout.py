"""The rollout engine `light`: transformers in one process, the same tokens whatever order requests come in.

Chosen by `actor_rollout_ref.rollout.name=light` where `VERL_USE_EXTERNAL_MODULES` names this module. It speaks verl's server
interface (token ids in, token ids and log-probs out, new weights after each step). Every response is a function of the
weights' version, the prompt, the number of the draw, which the agent loop `light` hands on, and how often it was asked
for, so two runs draw the same, whatever order their requests come in.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from types import ModuleType
from typing import Any

import torch

from rlplugins.imports import after_import
from rlplugins.logits import KEY, Rule, numbers_of, parts_of

NAME = "light"
DRAW = "draw"
"""Sampling parameter: the number of the response among those to its prompt."""
QUIET = 0.25  # seconds without a request after which those that wait are one batch
APART = 0.02  # seconds between answers, so that they are stored in the order in which they are given


class LightServer:
    """The Ray actor."""

    def __init__(
        self, model_path: str, response_length: int, max_model_len: int, seed: int, options: dict[str, Any]
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.end, self.words = tokenizer.eos_token_id, len(tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
        self.response_length, self.max_model_len, self.seed = response_length, max_model_len, seed
        self.rule = Rule(options["additional_config"][KEY]) if options else None
        self.version: int | None = None
        self.asked: Counter[Any] = Counter()
        self.waiting: list[tuple[tuple[int, ...], int, dict[str, Any], asyncio.Future[Any]]] = []
        self.serving: asyncio.Task[None] | None = None

    async def ready(self) -> bool:
        """Whether the model is loaded."""
        return True

    async def generate(self, prompt_ids: Any, sampling_params: dict[str, Any], request_id: str, **unused: Any) -> Any:
        """One response, as verl's servers give it."""
        from verl.workers.rollout.replica import TokenOutput

        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.waiting.append((tuple(prompt_ids), int(sampling_params.get(DRAW, 0)), dict(sampling_params), answer))
        if self.serving is None or self.serving.done():
            self.serving = asyncio.ensure_future(self._serve())
        tokens, log_probs = await answer
        return TokenOutput(
            token_ids=tokens,
            log_probs=log_probs if sampling_params.get("logprobs") else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.version},
        )

    async def _serve(self) -> None:
        while self.waiting:
            number = -1
            while number != len(self.waiting):
                number = len(self.waiting)
                await asyncio.sleep(QUIET)
            batch, self.waiting = sorted(self.waiting, key=lambda request: request[:2]), []
            for prompt, draw, params, answer in batch:
                try:
                    result = await asyncio.to_thread(self._draw, prompt, draw, params)
                    answer.set_result(result)
                except Exception as error:
                    answer.set_exception(error)
                await asyncio.sleep(APART)

    @torch.inference_mode()
    def _draw(self, prompt: tuple[int, ...], draw: int, params: dict[str, Any]) -> tuple[list[int], list[float]]:
        """One response to one prompt: tokens and their log-probs."""
        limit = params.get("max_tokens") or params.get("max_new_tokens") or self.response_length
        limit = max(1, min(int(limit), self.max_model_len - len(prompt)))
        temperature = float(params.get("temperature", 1.0))
        times = self.asked[self.version, prompt, draw]
        self.asked[self.version, prompt, draw] += 1
        digest = hashlib.blake2b(repr((self.seed, self.version, prompt, draw, times)).encode(), digest_size=7).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        ids, cache, parts = torch.tensor([prompt]), None, parts_of([numbers_of(params)], "cpu")
        tokens: list[int] = []
        log_probs: list[float] = []
        while len(tokens) < limit and (not tokens or tokens[-1] != self.end):
            output = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1, : self.words].float()
            if self.rule is not None:
                logits = self.rule(logits[None], parts)[0]
            log_prob = _narrowed(logits / (temperature or 1.0), params).log_softmax(-1)
            token = log_prob.argmax() if temperature == 0 else torch.multinomial(log_prob.exp(), 1, generator=source)[0]
            tokens.append(int(token))
            log_probs.append(float(log_prob[token]))
            ids = token.view(1, 1)
        return tokens, log_probs

    async def load_weights(self, weights: dict[str, torch.Tensor], version: int | None) -> None:
        """The trainer's weights after a step."""
        missing, unknown = self.model.load_state_dict(weights, strict=False)
        if unknown or set(missing) - {"lm_head.weight"}:  # tied weights are sent once
            raise RuntimeError(f"weights that do not fit: missing {missing}, unknown {unknown}")
        self.version = version

    async def nothing(self, *args: Any, **kwargs: Any) -> None:
        """What a server without a cache of its own has nothing to do for."""

    sleep = wake_up = abort_all_requests = resume_generation = clear_kv_cache = wait_for_requests_to_drain = nothing
    release_kv_cache = resume_kv_cache = start_profile = stop_profile = nothing


def _narrowed(logits: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
    """Logits (V,) of the tokens that top-k and top-p leave."""
    k, p = int(params.get("top_k", -1)), float(params.get("top_p", 1.0))
    if 0 < k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)
    if p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        logits = logits.masked_fill(
            torch.zeros_like(ordered).scatter(0, order, ordered.cumsum(0) - ordered) >= p, -torch.inf
        )
    return logits


def server_name(rank: int) -> str:
    """Under which a replica's server is found within one job."""
    import ray

    return f"{NAME}_{ray.get_runtime_context().get_job_id()}_{rank}"


def register_replica(module: ModuleType) -> None:
    """The server's side, through verl's registry."""

    def load() -> type:
        import ray

        class LightReplica(module.RolloutReplica):  # type: ignore[name-defined, misc]
            async def launch_servers(self) -> None:
                options = {
                    "name": server_name(self.replica_rank),
                    "num_cpus": 0,
                    "max_concurrency": self.max_concurrency,
                }
                server = ray.remote(LightServer).options(**options).remote(
                    self.model_config.path, self.config.response_length, self.config.max_model_len or 512,
                    self.config.seed + self.replica_rank, dict(self.config.engine_kwargs.get(NAME) or {}),
                )  # fmt: skip
                await server.ready.remote()
                self.servers, self._server_handle = [server], server
                self._server_address = server_name(self.replica_rank)

        return LightReplica

    module.RolloutReplicaRegistry.register(NAME, load)


def register_sender(module: ModuleType) -> None:
    """The worker's side; verl has no registry for it, only a table."""

    class LightSender(module.BaseRollout):  # type: ignore[name-defined, misc]
        def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
            super().__init__(config, model_config, device_mesh)
            self.replica_rank = replica_rank if replica_rank >= 0 else int(os.environ.get("RANK", 0))

        is_leader_rank = True

        async def resume(self, tags: Any) -> None:
            pass

        async def release(self) -> None:
            pass

        async def update_weights(self, weights: Any, global_steps: int | None = None, **kwargs: Any) -> None:
            import ray
            from verl.workers.rollout.utils import ensure_async_iterator

            state = {
                name: tensor.detach().float().cpu().clone() async for name, tensor in ensure_async_iterator(weights)
            }
            await ray.get_actor(server_name(self.replica_rank)).load_weights.remote(state, global_steps)

    globals()["LightSender"] = LightSender
    module._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.LightSender"


def register_loop(module: ModuleType) -> None:
    """verl's agent loop for one turn, which says which draw it is."""
    from verl.experimental.agent_loop.agent_loop import register

    class LightAgentLoop(module.SingleTurnAgentLoop):  # type: ignore[name-defined, misc]
        async def run(self, sampling_params: dict[str, Any], **row: Any) -> Any:
            return await super().run({**sampling_params, DRAW: row["session_id"]}, **row)

    globals()["LightAgentLoop"] = LightAgentLoop
    LightAgentLoop.__qualname__ = "LightAgentLoop"
    register(NAME)(LightAgentLoop)


after_import("verl.experimental.agent_loop.single_turn_agent_loop", register_loop)
after_import("verl.workers.rollout.replica", register_replica)
after_import("verl.workers.rollout.base", register_sender)
