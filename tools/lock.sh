#!/bin/sh
# Resolve pyproject.toml into requirements.lock: every extra but feast (which pins pandas 2), every Python, hashed, no addresses.
set -eu
cd "$(dirname "$0")/.."
exec .venv/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
  --no-annotate --no-header --no-emit-index-url --quiet "$@" \
  --extra pipeline --extra serve --extra features --extra rollout --extra alerts --extra drift-extra --extra postgres --extra trace --extra dev \
  --output-file requirements.lock
