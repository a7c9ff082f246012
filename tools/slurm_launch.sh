#!/usr/bin/env bash
# Run one of the tools in this folder under Slurm: what slurm_train.sh and slurm_test.sh share.
#
# Environment: GPUS (8 in all), GPUS_PER_NODE (8, or GPUS when fewer), CPUS_PER_TASK (5),
# SRUN_ARGS (more arguments for srun, split at spaces), PORT (29500).
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 1
}

(($# >= 3)) || fail 'usage: bash tools/slurm_launch.sh PARTITION JOB_NAME TOOL [ARGUMENTS...]'
partition=$1
job_name=$2
tool=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$3
shift 3

gpus=${GPUS:-8}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS must be a positive integer, not '$gpus'."
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
command -v srun > /dev/null || fail 'srun is not on PATH: run this on a machine of the Slurm cluster.'
python=$(command -v python || command -v python3) || fail 'no python on PATH: activate the environment first.'
read -r -a srun_args <<< "${SRUN_ARGS:-}"
export MASTER_PORT=${PORT:-29500}

exec srun -p "$partition" --job-name="$job_name" \
    --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" --gres="gpu:$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    "$python" -u "$tool" "$@" --launcher slurm
