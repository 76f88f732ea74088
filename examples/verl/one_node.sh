#!/usr/bin/env bash
# GRPO on one node of 8 GPUs, with a stack: one_node.sh MODEL TRAIN.parquet VALIDATION.parquet OUTPUT [settings of verl]
# Everything but the last two settings is a usual verl run; leave those two out and it is verl alone.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$1 train=$2 validation=$3 output=$4
shift 4

exec python -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_files="$train" \
    data.val_files="$validation" \
    data.train_batch_size=256 \
    data.max_prompt_length=1024 \
    data.max_response_length=4096 \
    actor_rollout_ref.model.path="$model" \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.strategy=fsdp2 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.6 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    trainer.nnodes="${NODES:-1}" \
    trainer.n_gpus_per_node=8 \
    trainer.total_epochs=3 \
    trainer.save_freq=20 \
    trainer.test_freq=20 \
    trainer.default_local_dir="$output" \
    trainer.logger='["console","tensorboard"]' \
    trainer.v1.trainer_mode=rlplugins_sync \
    +rlplugins.stack="$here/stack.yaml" \
    "$@"
