#!/bin/sh
# Makes the virtual environment from requirements/cpu.lock.
# torch +cpu wheels are not on the package index: they come from the links pip is configured with, where those have them, and from
# PyTorch's CPU index otherwise.
set -eu
PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}

command -v "$PYTHON" >/dev/null || { echo "setup: $PYTHON is not installed; rayhf needs Python 3.11 (set PYTHON=...)" >&2; exit 2; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet "$(grep '^uv==' requirements/tools.txt)"

# uv reads none of pip's settings: hand the links and the certificates over.
links=${PIP_FIND_LINKS:-$("$VENV/bin/python" -m pip config get global.find-links 2>/dev/null || true)}
links=${UV_FIND_LINKS:-$(echo $links | tr ' ' ',')}
[ -n "$links" ] && export UV_FIND_LINKS="$links"
[ -n "${PIP_CERT:-}" ] && export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180}

torch=$(grep '^torch==' requirements/cpu.lock)
if "$VENV/bin/python" -m pip install --dry-run --ignore-installed --quiet --no-deps "$torch" >/dev/null 2>&1; then
    backend=""
else
    backend="--torch-backend=cpu"
fi
# shellcheck disable=SC2086
"$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --no-deps $backend -r requirements/cpu.lock
"$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --no-deps --no-build-isolation --editable .
