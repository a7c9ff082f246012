#!/usr/bin/env bash
# Train under Slurm; GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS as in slurm_launch.sh.
set -euo pipefail

if (($# < 3)); then
    echo 'usage: bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [arguments of train.py]' >&2
    exit 1
fi
partition=$1
job_name=$2
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/slurm_launch.sh" "$partition" "$job_name" train.py "$@"
