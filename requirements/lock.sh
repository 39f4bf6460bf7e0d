#!/bin/sh
# Resolves pyproject.toml into requirements/cpu.lock, without the media wheels (requirements/overrides.txt).
set -eu
VENV=${VENV:-.venv}
UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
[ -n "$UV_FIND_LINKS" ] && export UV_FIND_LINKS || backend="--torch-backend=cpu"
# shellcheck disable=SC2086
"$VENV/bin/uv" pip compile pyproject.toml --extra cpu --extra dev --extra bench --extra gguf \
    --extra reasoning-gym --extra ifeval --extra tensorboard --override requirements/overrides.txt \
    --python-version 3.11 --no-emit-find-links --no-annotate --no-header ${backend:-} -o requirements/cpu.lock
