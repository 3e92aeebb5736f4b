#!/bin/sh
# Make .venv from requirements.lock with uv (fast), or with pip where uv is not to be had. Idempotent.
set -eu
cd "$(dirname "$0")/.."

find_python() {
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$candidate"; return; fi
  done
  echo "mlops-nb needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12 $*" >&2
  return 1
}

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  python=$(find_python)
  echo "Creating .venv with $("$python" --version)"
  rm -rf .venv
  "$python" -m venv .venv || {
    rm -rf .venv
    echo "$python cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv" >&2
    exit 1
  }
fi

# uv does not read pip's configuration, so hand it the mirror that this machine is set up for.
index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null || true)
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"

echo "Installing the locked environment into .venv (about 400 packages; a few minutes the first time)"
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv || true
if [ -x .venv/bin/uv ]; then
  .venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes -r requirements.lock
else
  echo "uv could not be installed; pip does it too, more slowly" >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
fi
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
touch .venv/.installed
