#!/usr/bin/env bash
# Installs what the tests need and runs them all, fast ones first. Arguments go to pytest: bash tests/run.sh -k corpus
#
# Tests that start no ranks and no engines and measure no time run two files at a time, before the others. Where an argument is a file
# or a folder, what it names runs one by one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash install.sh --test
export SPICE_VENV="${SPICE_VENV:-$PWD/.venv}"

# The quickstart's model and texts: the tests that use them would otherwise skip.
model=assets/smollm2-135m-instruct texts=assets/factbook.jsonl
mkdir -p assets
[ -e "$model" ] || "$SPICE_VENV/bin/python" examples/fetch_assets.py model "$model"
[ -e "$texts" ] || "$SPICE_VENV/bin/python" examples/fetch_assets.py texts "$texts"

# Not among the requirements of all tests: a part of it is compiled. Without it the tests of its tasks skip and say so.
"$SPICE_VENV/bin/python" -m pip install --quiet -c requirements/constraints.txt -r requirements/evaluation.txt ||
  echo "tests/run.sh: reasoning-gym could not be installed" >&2

# A real Slurm for tests/test_slurm.py where it can be had (Debian, root); elsewhere that test skips and says so.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge; } >/dev/null || echo "tests/run.sh: Slurm could not be installed" >&2
fi

# A browser and an accessibility checker for tests/report/test_browser.py; without them it skips and says so.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } >/dev/null ||
    echo "tests/run.sh: Chromium could not be installed" >&2
fi
axe="axe-core@4.14.1"
if command -v npm >/dev/null && [ ! -e assets/axe-core ]; then
  folder="$(mktemp -d)"
  if (cd "$folder" && npm pack --silent "$axe" && tar xzf axe-core-*.tgz) >/dev/null; then
    mv "$folder" assets/axe-core
  else
    rm -rf "$folder"
    echo "tests/run.sh: $axe could not be fetched" >&2
  fi
fi

# Waiting threads that spin would take the cores from the processes the tests start.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-0}"
export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
pytest() { "$SPICE_VENV/bin/python" -m pytest "$@"; }

for argument in "$@"; do
  [ ! -e "${argument%%::*}" ] || { pytest "$@"; exit; }
done

fast=()
for file in tests/{config,game,corpus,telemetry,evaluation,cost,crossplay,curriculum,report}/test_*.py \
  tests/test_{command_line,launch_commands}.py; do
  case "$file" in
    */corpus/test_reading.py | */telemetry/test_ranks.py | */evaluation/test_checkpoint.py | */report/test_browser.py) ;;
    *) fast+=("$file") ;;
  esac
done
fast_code=0 code=0
pytest -n 2 --dist loadfile "$@" "${fast[@]}" || fast_code=$?
case "$fast_code" in 0 | 1 | 5) ;; *) exit "$fast_code" ;; esac
pytest "${fast[@]/#/--ignore=}" "$@" || code=$?

# 5 is that nothing was selected, which is for one of the two no failure.
if [ "$code" = 0 ] || { [ "$code" = 5 ] && [ "$fast_code" != 5 ]; }; then
  code=$fast_code
  [ "$code" != 5 ] || code=0
fi
exit "$code"
