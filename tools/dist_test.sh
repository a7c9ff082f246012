#!/usr/bin/env bash
# Test on several GPUs, or on several CPU processes where there is no GPU (see dist_launch.sh).
set -euo pipefail

if (($# < 3)); then
    echo 'usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of test.py]' >&2
    exit 1
fi
config=$1
checkpoint=$2
gpus=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_launch.sh" "$gpus" test.py "$config" "$checkpoint" "$@"
