"""The environment and the command line of a run of verl on two cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlplugins_verl.cpu import tiny

MODULES = "rlplugins_verl.cpu.platform,rlplugins_verl.cpu.rollout"

AGENTS = {"light": "light", "vllm": "single_turn_agent"}
"""The agent loop of each engine."""


def environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every process of the run inherits."""
    return {
        **(os.environ if base is None else base),
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "VERL_USE_EXTERNAL_MODULES": MODULES,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "HF_HUB_OFFLINE": "1",
        "HYDRA_FULL_ERROR": "1",
    }


def command(
    folder: Path, overrides: Sequence[str] = (), *, ranks: int = 1, engine: str = "light", steps: int = 3
) -> list[str]:
    """GRPO on the tiny model: `python -m verl.trainer.main_ppo` with everything that a machine without GPU needs.

    Args:
        folder: with the model and the data (`tiny.write`); the checkpoints go to `folder/checkpoints`.
        overrides: further settings of verl, which go last.
        ranks: processes of the update.
        engine: `light` or `vllm`.
        steps: training steps.
    """
    model = "actor_rollout_ref.model"
    actor = "actor_rollout_ref.actor"
    rollout = "actor_rollout_ref.rollout"
    settings = [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder / 'train.parquet'}",
        f"data.val_files={folder / 'validation.parquet'}",
        "data.train_batch_size=8",
        "data.val_batch_size=16",
        "data.dataloader_num_workers=0",
        "data.max_prompt_length=40",
        "data.max_response_length=16",
        "data.filter_overlong_prompts=False",
        f"{model}.path={folder / 'model'}",
        f"{model}.use_remove_padding=False",
        f"{model}.enable_gradient_checkpointing=False",
        f"+{model}.override_config.attn_implementation=sdpa",
        f"{actor}.strategy=fsdp2",
        f"{actor}.fsdp_config.strategy=fsdp2",
        f"{actor}.fsdp_config.use_torch_compile=False",
        f"+{actor}.fsdp_config.mixed_precision.param_dtype=fp32",
        f"{actor}.use_torch_compile=False",
        f"{actor}.optim.lr=1e-3",
        f"{actor}.ppo_mini_batch_size=8",
        f"{actor}.ppo_micro_batch_size_per_gpu=16",
        "actor_rollout_ref.ref.fsdp_config.strategy=fsdp2",
        "+actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16",
        f"{rollout}.name={engine}",
        f"{rollout}.n=4",
        f"{rollout}.dtype=float32",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.n_gpus_per_node={ranks}",
        f"{rollout}.enforce_eager=True",
        f"{rollout}.free_cache_engine=False",
        f"+{rollout}.enable_sleep_mode=False",
        f"{rollout}.gpu_memory_utilization=0.1",
        f"{rollout}.max_model_len=128",
        f"{rollout}.max_num_seqs=32",
        f"{rollout}.max_num_batched_tokens=512",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=16",
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes=64",
        f"{rollout}.agent.num_workers=1",
        f"{rollout}.agent.default_agent_loop={AGENTS[engine]}",
        "critic.strategy=fsdp2",
        "critic.fsdp.strategy=fsdp2",
        "critic.fsdp.use_torch_compile=False",
        "+critic.fsdp.mixed_precision.param_dtype=fp32",
        f"critic.model.path={folder / 'model'}",
        "critic.model.use_remove_padding=False",
        "critic.model.enable_gradient_checkpointing=False",
        "+critic.model.override_config.attn_implementation=sdpa",
        "critic.ppo_micro_batch_size_per_gpu=16",
        "reward.num_workers=1",
        f"reward.custom_reward_function.path={tiny.__file__}",
        "reward.custom_reward_function.name=score",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        "trainer.device=cpu",
        "trainer.nnodes=1",
        f"trainer.n_gpus_per_node={ranks}",
        'trainer.logger=["console","file"]',
        "trainer.project_name=rlplugins",
        "trainer.experiment_name=tiny",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=100",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.val_before_train=False",
        "ray_kwargs.ray_init.num_cpus=16",
        f"+ray_kwargs.ray_init.num_gpus={ranks}",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "+ray_kwargs.ray_init.object_store_memory=400000000",
    ]
    return [sys.executable, "-m", "verl.trainer.main_ppo", *settings, *overrides]


def main() -> None:
    """`python -m rlplugins_verl.cpu FOLDER [overrides]`: write the tiny model and data where they are missing, and train."""
    folder = tiny.write(Path(sys.argv[1]).absolute())
    arguments = command(folder, sys.argv[2:])
    os.chdir(folder)
    os.execvpe(arguments[0], arguments, environment())
