#!/usr/bin/env bash
# A campaign on its own Ray cluster, as a Slurm job: sbatch slurm.sh CONFIG NAME [KEY=VALUE ...]
#
# SHARED is a directory that every node sees; the run directory is SHARED/runs/NAME. Five minutes
# before the time limit the campaign stops after its iteration; then, or when a node is lost, the
# job is requeued and continues.
#SBATCH --job-name=rayhf
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

: "${SHARED:?set it to a directory that every node sees}"
config=${1:?a config}
name=${2:?a name for the run}
shift 2
run="$SHARED/runs/$name"
port=6379

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SHARED/.rayhf/token-$SLURM_JOB_ID"
(
    umask 077 # only its owner may read the token
    mkdir -p "$SHARED/.rayhf"
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
)
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 -w "$first" hostname -I | awk '{print $1}')
srun --overlap --nodes=1 --ntasks=1 -w "$first" \
    ray start --head --block --node-ip-address "$address" --port "$port" \
    --dashboard-host 127.0.0.1 --disable-usage-stats &
until ray status --address "$address:$port" >/dev/null 2>&1; do sleep 2; done
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$first" \
        ray start --block --address "$address:$port" --disable-usage-stats &
fi

signaled=0
rayhf run "$config" run.dir="$run" cluster.address="$address:$port" "$@" --supervise &
campaign=$!
trap 'signaled=1; rayhf stop "$run"' TERM

code=0
wait "$campaign" || code=$?
if [ "$signaled" = 1 ]; then # the signal ended the first wait
    code=0
    wait "$campaign" || code=$?
fi
if { [ "$signaled" = 1 ] && [ "$code" = 75 ]; } || [ "$code" = 10 ] || [ "$code" = 11 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
