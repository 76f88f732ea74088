#!/usr/bin/env bash
# OpenRLHF without a GPU: a model of 0.1 M parameters, three steps, some minutes: cpu.sh [FOLDER] [flags of OpenRLHF]
# In the environment that `make setup-openrlhf` builds: PYTHON=.venv-openrlhf/bin/python examples/openrlhf/cpu.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-runs/openrlhf}
[ $# -gt 0 ] && shift

exec "${PYTHON:-python}" -m rlplugins_openrlhf.cpu "$folder" --rlplugins "$here/stack.yaml" "$@"
