#!/usr/bin/env bash
# A Ray cluster started by hand, and campaigns on it. SHARED is a directory that every machine sees;
# it holds the token and the runs.
#
#   SHARED=/shared ray_start.sh head                                   on the first machine
#   SHARED=/shared ray_start.sh worker HEAD_IP                         on every other machine
#   SHARED=/shared ray_start.sh submit CONFIG NAME [KEY=VALUE ...]     on the first machine
#
# The run directory is SHARED/runs/NAME. Further arguments of head and worker are passed to
# `ray start`. Ray's ports belong in a private network: tokens are no encryption.
set -euo pipefail

: "${SHARED:?set it to a directory that every machine sees}"
port=${RAY_PORT:-6379}
dashboard=${RAY_DASHBOARD_PORT:-8265}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$SHARED/.rayhf/token"
role=${1:?head, worker or submit}
shift

case "$role" in
head)
    (
        umask 077 # only its owner may read the token
        mkdir -p "$SHARED/.rayhf"
        if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
            head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
        fi
    )
    exec ray start --head --block --port "$port" --dashboard-host 127.0.0.1 \
        --dashboard-port "$dashboard" --disable-usage-stats "$@"
    ;;
worker)
    head=${1:?the address of the first machine}
    shift
    exec ray start --block --address "$head:$port" --disable-usage-stats "$@"
    ;;
submit)
    config=${1:?a config}
    name=${2:?a name for the run}
    shift 2
    # A job ends with its node. Failures that may not happen again are submitted again, and continue
    # after the last commit.
    for pause_s in 30 60 120 240 0; do
        code=0
        rayhf submit "$config" run.dir="$SHARED/runs/$name" "$@" \
            --address "http://127.0.0.1:$dashboard" --supervise --follow || code=$?
        case "$code" in
        8 | 10 | 11 | 13) sleep "$pause_s" ;;
        *) exit "$code" ;;
        esac
    done
    exit "$code"
    ;;
*)
    echo "ray_start.sh: head, worker or submit, not $role" >&2
    exit 2
    ;;
esac
