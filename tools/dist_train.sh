#!/usr/bin/env bash
# Train on several GPUs, or on several CPU processes where there is no GPU (see dist_launch.sh).
set -euo pipefail

if (($# < 2)); then
    echo 'usage: bash tools/dist_train.sh CONFIG GPUS [arguments of train.py]' >&2
    exit 1
fi
config=$1
gpus=$2
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_launch.sh" "$gpus" train.py "$config" "$@"
