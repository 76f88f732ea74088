#!/usr/bin/env bash
# verl without a GPU: a model of 0.1 M parameters, three steps, about two minutes: cpu.sh [FOLDER] [settings of verl]
# In the environment that `make setup-verl` builds: PYTHON=.venv-verl/bin/python examples/verl/cpu.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/verl}
[ $# -gt 0 ] && shift

exec "${PYTHON:-python}" -m rlplugins_verl.cpu "$folder" \
    trainer.v1.trainer_mode=rlplugins_sync \
    +rlplugins.stack="$here/stack.yaml" \
    "$@"
