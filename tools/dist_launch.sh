#!/usr/bin/env bash
# Run one of the tools in this folder in GPUS processes: what dist_train.sh and dist_test.sh share.
#
# Environment, for more than one machine: NNODES (1), NODE_RANK (0), MASTER_ADDR (127.0.0.1) and
# PORT (29500; on one machine any free port). Start it once on each machine. A process that fails ends
# the others.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 1
}

(($# >= 2)) || fail 'usage: bash tools/dist_launch.sh GPUS TOOL [ARGUMENTS...]'
gpus=$1
tool=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$2
shift 2

nnodes=${NNODES:-1}
[[ $gpus =~ ^[1-9][0-9]*$ ]] || fail "GPUS, the number of processes, must be a positive integer, not '$gpus'."
[[ $nnodes =~ ^[1-9][0-9]*$ ]] || fail "NNODES must be a positive integer, not '$nnodes'."
if ((nnodes > 1)) && [[ -z ${MASTER_ADDR:-} || -z ${NODE_RANK:-} ]]; then
    fail "NNODES=$nnodes needs MASTER_ADDR (the first machine's address) and NODE_RANK (0 to $((nnodes - 1)))."
fi

python=$(command -v python || command -v python3) || fail 'no python on PATH: activate the environment first.'
# Prints the port if it can be listened at, and a free one for 0; else the system's reason.
probe='
import socket, sys
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    server.bind(("", int(sys.argv[1])))
except OSError as error:
    sys.exit(print(error.strerror) or 1)
print(server.getsockname()[1])'
port=${PORT:-$((nnodes > 1 ? 29500 : 0))}
[[ $port =~ ^[0-9]+$ ]] && ((10#$port < 65536)) || fail "PORT must be a number below 65536, not '$port'."
if [[ ${NODE_RANK:-0} == 0 ]]; then # the first machine listens
    answer=$("$python" -c "$probe" "$port") ||
        fail "port $port cannot be used ($answer): name another with PORT, on all machines the same one; on a single machine, without PORT, a free one is taken."
    port=$answer
fi

# torchrun would give each process one thread; without a GPU that leaves cores idle.
threads=$(($(getconf _NPROCESSORS_ONLN) / gpus))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

exec "$python" -m torch.distributed.run \
    --nnodes="$nnodes" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$gpus" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port" \
    "$tool" "$@" --launcher pytorch
