"""The environment and the command line of a run of OpenRLHF on two cores."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlplugins_openrlhf.cpu import tiny

SITE = Path(__file__).parent / "site"
PROMPTS = 4
"""Of a step."""


def environment(base: Mapping[str, str] | None = None, gpus: int = 3) -> dict[str, str]:
    """What every process of the run inherits; `gpus` devices are made up for Ray, which counts them."""
    given = dict(os.environ if base is None else base)
    paths = [str(SITE), *filter(None, [given.get("PYTHONPATH")])]
    resources = {"CPU": 16, "GPU": gpus, "object_store_memory": 268435456}
    return {
        **given,
        "PYTHONPATH": os.pathsep.join(paths),
        "RLPLUGINS_OPENRLHF_CPU": "1",
        "DS_ACCELERATOR": "cpu",
        "RAY_OVERRIDE_RESOURCES": json.dumps(resources),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",
        "RAY_raylet_start_wait_time_s": "240",  # a busy machine takes more than the 30 s that Ray waits
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


def flags(folder: Path, *, ranks: int = 1, steps: int = 3) -> list[str]:
    """GRPO on the tiny model: what `train_ppo_ray` needs on a machine without GPU.

    Args:
        folder: with the model and the data (`tiny.write`); the checkpoints go to `folder/checkpoints`.
        ranks: processes of the update.
        steps: training steps, of 4 prompts with 4 responses each; more than an episode has must be whole episodes.

    Raises:
        ValueError: if they are not.
    """
    episodes = -(-PROMPTS * steps // tiny.TRAIN)
    prompts = PROMPTS * steps // episodes
    if PROMPTS * steps != prompts * episodes or (episodes > 1 and prompts != tiny.TRAIN):
        raise ValueError(f"{steps} steps of {PROMPTS} prompts are no whole number of episodes of {tiny.TRAIN}")
    return [
        "--actor.model_name_or_path", str(folder / "model"),
        "--reward.remote_url", tiny.__file__,
        "--data.prompt_dataset", str(folder / "train.jsonl"),
        "--data.input_key", "input", "--data.label_key", "label", "--data.apply_chat_template",
        "--data.max_samples", str(prompts), "--train.num_episodes", str(episodes), "--data.max_len", "64",
        "--rollout.batch_size", str(PROMPTS), "--rollout.n_samples_per_prompt", "4",
        "--rollout.micro_batch_size", "4", "--rollout.max_new_tokens", "16",
        "--train.batch_size", "8", "--train.micro_batch_size", "4",
        "--actor.adam.lr", "1e-4", "--actor.lr_warmup_ratio", "0",
        "--actor.num_nodes", "1", "--actor.num_gpus_per_node", str(ranks),
        "--ref.num_nodes", "1", "--ref.num_gpus_per_node", str(ranks),
        "--critic.num_nodes", "1", "--critic.num_gpus_per_node", str(ranks),
        "--train.colocate_actor_ref",
        "--ds.zero_stage", "2", "--ds.attn_implementation", "sdpa",
        "--vllm.num_engines", "1", "--vllm.tensor_parallel_size", "1", "--vllm.enforce_eager",
        "--vllm.sync_backend", "gloo", "--vllm.gpu_memory_utilization", "0.05",
        "--algo.advantage.estimator", "group_norm", "--algo.kl.init_coef", "0",
        "--ckpt.output_dir", str(folder / "output"), "--ckpt.path", str(folder / "checkpoints"),
    ]  # fmt: skip


def command(
    folder: Path, stack: str | None = None, further: Sequence[str] = (), *, ranks: int = 1, steps: int = 3
) -> list[str]:
    """The whole command line; without a stack it is OpenRLHF's alone.

    Args:
        folder: as for `flags`.
        stack: as `--rlplugins` takes it.
        further: flags of OpenRLHF, which go last.
        ranks: processes of the update.
        steps: training steps.
    """
    given = [*flags(folder, ranks=ranks, steps=steps), *further]
    if stack is None:
        return [sys.executable, "-m", "openrlhf.cli.train_ppo_ray", *given]
    return [sys.executable, "-m", "rlplugins_openrlhf", "train_ppo_ray", "--rlplugins", stack, *given]


def main() -> None:
    """`python -m rlplugins_openrlhf.cpu FOLDER [flags]`: write the tiny model and data where they are missing, and train."""
    from rlplugins_openrlhf.launch import FLAG

    folder, words = tiny.write(Path(sys.argv[1]).absolute()), sys.argv[2:]
    stack = None
    if FLAG in words:
        place = words.index(FLAG)
        stack, words = words[place + 1], [*words[:place], *words[place + 2 :]]
    arguments = command(folder, stack, words)
    os.execvpe(arguments[0], arguments, environment())
