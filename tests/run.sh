#!/usr/bin/env bash
# Installs what the tests need and runs them all, fast ones first. Arguments go to pytest: bash tests/run.sh -k corpus
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash install.sh --test
export SPICE_VENV="${SPICE_VENV:-$PWD/.venv}"

# Waiting threads that spin would take the cores from the processes the tests start.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-0}"
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "$SPICE_VENV/bin/python" -m pytest "$@"
