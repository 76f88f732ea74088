#!/usr/bin/env bash
# GRPO on one node of 8 GPUs, with a stack: one_node.sh MODEL PROMPTS.jsonl REWARD.py OUTPUT [flags of OpenRLHF]
# Without the first line's `rlplugins openrlhf` and the flag `--rlplugins` it is the usual `python -m openrlhf.cli.train_ppo_ray`.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$1 prompts=$2 reward=$3 output=$4
shift 4

exec rlplugins openrlhf train_ppo_ray --rlplugins "$here/stack.yaml" \
    --actor.model_name_or_path "$model" \
    --reward.remote_url "$reward" \
    --data.prompt_dataset "$prompts" \
    --data.input_key prompt \
    --data.label_key answer \
    --data.apply_chat_template \
    --data.max_len 5120 \
    --rollout.batch_size 128 \
    --rollout.n_samples_per_prompt 8 \
    --rollout.micro_batch_size 8 \
    --rollout.max_new_tokens 4096 \
    --train.batch_size 256 \
    --train.micro_batch_size 4 \
    --train.num_episodes 3 \
    --train.colocate_all \
    --actor.num_nodes "${NODES:-1}" \
    --actor.num_gpus_per_node 8 \
    --actor.adam.lr 1e-6 \
    --actor.gradient_checkpointing_enable \
    --vllm.num_engines "$((${NODES:-1} * 4))" \
    --vllm.tensor_parallel_size 2 \
    --vllm.gpu_memory_utilization 0.6 \
    --vllm.enable_sleep \
    --ds.enable_sleep \
    --ds.zero_stage 3 \
    --ds.packing_samples \
    --algo.advantage.estimator group_norm \
    --algo.kl.init_coef 0 \
    --ckpt.path "$output/checkpoints" \
    --ckpt.output_dir "$output/model" \
    --ckpt.save_steps 20 \
    --ckpt.load_enable \
    --logger.tensorboard_dir "$output/logs" \
    "$@"
