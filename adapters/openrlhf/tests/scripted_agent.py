"""An agent file for `--train.agent_func_path`: responses that are written beforehand, given prompt by prompt.

They depend on the prompt and on how often it was asked for alone, and those to one prompt are given some time after those to
another, so two runs draw the same, in the same order, whatever order requests come in.
"""

import asyncio
import hashlib
from collections import Counter
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase

QUIET = 1.0  # seconds without a request after which those that wait are a step's
APART = 0.5  # seconds between the answers to two prompts


class AgentExecutor(AgentExecutorBase):
    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.waiting: dict[str, list[asyncio.Future[None]]] = {}
        self.serving: asyncio.Task[None] | None = None

    async def turn(self, prompt: str) -> None:
        """Wait until it is this prompt's turn."""
        own: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(prompt, []).append(own)
        if self.serving is None or self.serving.done():
            self.serving = asyncio.ensure_future(self.serve())
        await own

    async def serve(self) -> None:
        """Let the prompts that wait go on, one after the other."""
        count = -1
        while count != sum(map(len, self.waiting.values())):
            count = sum(map(len, self.waiting.values()))
            await asyncio.sleep(QUIET)
        waiting, self.waiting = self.waiting, {}
        for prompt in sorted(waiting):
            for own in waiting[prompt]:
                own.set_result(None)
            await asyncio.sleep(APART)

    async def execute(
        self, prompt: str, label: str, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        number = self.asked[prompt]
        self.asked[prompt] += 1
        digest = hashlib.blake2b(f"{prompt}{number}".encode(), digest_size=4).digest()
        answer = label if digest[0] % 2 else str(digest[1])
        await self.turn(prompt)
        ids = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        action = [*hf_tokenizer(text=answer, add_special_tokens=False)["input_ids"], hf_tokenizer.eos_token_id]
        reward = float(answer == label) + 0.01 * digest[2]
        return {
            "prompt": prompt, "label": label, "images": None, "mm_train_inputs": None, "observation_tokens": ids + action,
            "action_ranges": [(len(ids), len(ids) + len(action))], "rollout_log_probs": None, "truncated": False,
            "reward": reward, "scores": reward, "extra_logs": {},
        }  # fmt: skip
