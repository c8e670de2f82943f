#!/usr/bin/env bash
#SBATCH --job-name=spice-benchmark
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=spice-benchmark-%j.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#
# Runs a recipe on one number of nodes after the other, each node with as many passages, and says how it scales:
#
#   sbatch --nodes=4 [--gpus-per-node=8 ...] slurm/benchmark.sh [--nodes-list 1,2,4] RECIPE [key.sub=value ...]
#   bash slurm/benchmark.sh [--ranks-list 1,2] RECIPE [key.sub=value ...]      on this machine, by ranks instead of nodes
#
#   --iterations N     timed iterations of each run, after one that is not (default 9); three or more of them follow a save, if N allows
#   --output DIR       where runs and results go (default runs/benchmark-DATE)
#
# Where a run fails, the others are made, there are results of those that are complete, and this ends with the failed one's exit code.
# The same call again, with --output, makes the runs that are missing.
#
# Every run is one of slurm/spice.sh. DIR/benchmark.json has the suites policy, sync, rollout, iteration and checkpoint for each
# number of nodes, with versions, machine, recipe, seed and revision; DIR/benchmark.png shows efficiency and seconds by phase.
# Two such files are compared by `tools/benchmark.py compare A.json B.json`.
#
#   SPICE_ROOT, SPICE_VENV, SPICE_SITE, SPICE_CONTAINER, SPICE_MOUNTS    as for slurm/spice.sh
set -euo pipefail

fail() { printf 'benchmark.sh: %s\n' "$*" >&2; exit "${code:-1}"; }

find_root() {
  local candidate
  for candidate in "${SPICE_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-}"; do
    if [ -n "$candidate" ] && [ -f "$candidate/tools/node_benchmark.py" ]; then
      (cd "$candidate" && pwd)
      return
    fi
  done
  fail "the repository was not found; submit from its folder, or set SPICE_ROOT"
}

unit=ranks counts='' iterations=9 output="runs/benchmark-$(date +%Y%m%d-%H%M%S)"
available="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}"
[ -z "${SLURM_JOB_ID:-}" ] || unit=nodes
while [[ "${1:-}" == --* ]]; do
  [ $# -ge 2 ] || code=2 fail "$1 needs a value"
  case "$1" in
    --"$unit"-list) counts="$2" ;;
    --iterations) iterations="$2" ;;
    --output) output="$2" ;;
    *) code=2 fail "unknown option $1; there are --$unit-list, --iterations and --output here" ;;
  esac
  shift 2
done
if [ $# -eq 0 ]; then
  echo "usage: bash slurm/benchmark.sh [--$unit-list 1,2] [--iterations N] [--output DIR] RECIPE [key.sub=value ...]" >&2
  exit 2
fi
if [ -z "$counts" ]; then
  counts=1
  most=$available
  [ "$unit" = nodes ] || most=2
  for ((count = 2; count <= most; count *= 2)); do counts+=",$count"; done
fi
[[ "$counts" =~ ^[1-9][0-9]*(,[1-9][0-9]*)*$ ]] || code=2 fail "--$unit-list $counts is not a list of numbers such as 1,2,4"
[[ "$iterations" =~ ^[1-9][0-9]*$ ]] || code=2 fail "--iterations $iterations is not a number above zero"

root="$(find_root)"
# shellcheck source=slurm/environment.sh
source "$root/slurm/environment.sh"
export SPICE_ROOT="$root"
tool=("${here[@]}" "$python" "$root/tools/node_benchmark.py")

IFS=, read -r -a numbers <<<"$counts"
for count in "${numbers[@]}"; do
  [ "$unit" = ranks ] || [ "$count" -le "$available" ] || code=2 fail "--nodes-list names $count nodes, the allocation has $available"
done
# What is wrong with the recipe for any of the numbers is said before the first run. There is nothing to override for one that is complete.
settings=()
for count in "${numbers[@]}"; do
  settings[count]="$("${tool[@]}" overrides --unit "$unit" --count "$count" --iterations "$iterations" --output "$output" "$@")" || exit $?
done
mkdir -p "$output"
failed=0
for count in "${numbers[@]}"; do
  if [ -z "${settings[count]}" ]; then
    printf 'benchmark.sh: %s %s: complete already\n' "$count" "$unit"
    continue
  fi
  mapfile -t overrides <<<"${settings[count]}"
  printf 'benchmark.sh: %s %s\n' "$count" "$unit"
  status=0 so_many=()
  [ "$unit" = ranks ] || so_many=(env SLURM_JOB_NUM_NODES="$count" SLURM_NNODES="$count") # of the allocation's nodes
  "${so_many[@]}" bash "$root/slurm/spice.sh" "$1" "${overrides[@]}" || status=$?
  [ "$status" -ne 0 ] || continue
  printf 'benchmark.sh: %s %s ended with %s\n' "$count" "$unit" "$status" >&2
  failed=$status
  [ "$status" -ne 75 ] && [ "$status" -lt 128 ] || break # told to end, or killed: nothing more is begun
done
"${tool[@]}" collect --unit "$unit" --counts "$counts" --iterations "$iterations" --output "$output" "$@" ||
  failed=$((failed ? failed : $?))
exit "$failed"
