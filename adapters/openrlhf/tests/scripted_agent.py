"""An agent file for `--train.agent_func_path`: responses that depend on the prompt and on how often it was asked for alone.

Those of the third step are not given while there is a file `RLPLUGINS_OPENRLHF_GATE`.
"""

import asyncio
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from openrlhf.utils.agent import AgentExecutorBase

GATE = os.environ.get("RLPLUGINS_OPENRLHF_GATE")
TWO_STEPS = 32


class AgentExecutor(AgentExecutorBase):
    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    async def execute(
        self, prompt: str, label: str, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        number = self.asked[prompt]
        self.asked[prompt] += 1
        while GATE and Path(GATE).exists() and self.asked.total() > TWO_STEPS:
            await asyncio.sleep(0.2)
        digest = hashlib.blake2b(f"{prompt}{number}".encode(), digest_size=4).digest()
        answer = label if digest[0] % 2 else str(digest[1])
        ids = hf_tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        action = [*hf_tokenizer(text=answer, add_special_tokens=False)["input_ids"], hf_tokenizer.eos_token_id]
        reward = float(answer == label) + 0.01 * digest[2]
        return {
            "prompt": prompt, "label": label, "images": None, "mm_train_inputs": None, "observation_tokens": ids + action,
            "action_ranges": [(len(ids), len(ids) + len(action))], "rollout_log_probs": None, "truncated": False,
            "reward": reward, "scores": reward, "extra_logs": {},
        }  # fmt: skip
