#!/usr/bin/env bash
# The same run on a Ray cluster of several nodes of 8 GPUs, submitted as a job from anywhere that reaches the head:
#
#   NODES=4 RAY_ADDRESS=http://HEAD:8265 ray_cluster.sh MODEL PROMPTS.jsonl REWARD.py OUTPUT [flags of OpenRLHF]
#
# Every node needs the same distributions (openrlhf, rlplugins-openrlhf, the stack's plugins) and sees the paths: the run shakes
# hands with every process that trains or generates, and says which one differs. Instead of an installation on every
# node, `pip` or `py_modules` in --runtime-env-json may bring rlplugins and the plugins.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export NODES=${NODES:?number of nodes}

ray job submit --address "${RAY_ADDRESS:?http://HEAD:8265}" --working-dir "$here" \
    --runtime-env-json "{\"env_vars\": {\"NODES\": \"$NODES\"}}" \
    -- bash one_node.sh "$@"
