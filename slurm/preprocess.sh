#!/usr/bin/env bash
#SBATCH --job-name=spice-corpus
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=spice-corpus-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# A corpus from many inputs, by many machines. The arguments are those of tools/preprocess_corpus.py:
#
#   sbatch --array=0-63 slurm/preprocess.sh INPUT... --tokenizer HF_DIR --output DIR    from the repository's folder
#   sbatch --output=spice-corpus-%j.log slurm/preprocess.sh INPUT... --tokenizer HF_DIR --output DIR      on one node
#   bash slurm/preprocess.sh INPUT... --tokenizer HF_DIR --output DIR                   on this machine
#
# Each task of the array makes its run of the inputs in DIR.tasks/00000, 00001, ...; the one that ends last joins them to DIR by
# their tables, so DIR.tasks stays. A task that was ended (preempted, out of time, out of memory) keeps its finished parts and goes
# on with them: `scontrol requeue JOB_TASK`, or the same sbatch again, which passes by what is there.
# With --dedup an array is submitted twice: the first time its tasks read their shares, the second time, knowing all of them, they
# make the corpus (what they share is in DIR.tasks/stages).
# To finish on one machine what an array has begun, or to do all its tasks there one after the other, say how many they are:
#
#   SPICE_TASKS=64 bash slurm/preprocess.sh INPUT... --tokenizer HF_DIR --output DIR
#
#   SPICE_TASKS        how many tasks there are, when they are not all tasks of this array
#   SPICE_ROOT, SPICE_VENV, SPICE_SITE, SPICE_CONTAINER, SPICE_MOUNTS    as for slurm/spice.sh
set -euo pipefail

fail() { printf 'preprocess.sh: %s\n' "$*" >&2; exit 1; }

find_root() {
  local candidate
  for candidate in "${SPICE_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-}"; do
    if [ -n "$candidate" ] && [ -f "$candidate/tools/preprocess_corpus.py" ]; then
      (cd "$candidate" && pwd)
      return
    fi
  done
  fail "the repository was not found; submit from its folder, or set SPICE_ROOT"
}

output=''
for ((place = 1; place <= $#; place++)); do
  case "${!place}" in
    --output) after=$((place + 1)) && output="${!after:-}" ;;
    --output=*) output="${!place#--output=}" ;;
    --task | --task=*) fail "tasks are numbered here: leave out --task" ;;
  esac
done
while [[ "$output" == ?*/ ]]; do output="${output%/}"; done # as the tool does: it names DIR.tasks so
if [ -z "$output" ]; then
  echo "usage: bash slurm/preprocess.sh INPUT... --tokenizer HF_DIR --output DIR [options of tools/preprocess_corpus.py]" >&2
  exit 2
fi

root="$(find_root)"
# shellcheck source=slurm/environment.sh
source "$root/slurm/environment.sh"
export PYTHONUNBUFFERED=1

tool=("${here[@]}" "$python" "$root/tools/preprocess_corpus.py")
task="${SLURM_ARRAY_TASK_ID:-}"
tasks="${SPICE_TASKS:-${SLURM_ARRAY_TASK_COUNT:-1}}"
[[ "$tasks" =~ ^[1-9][0-9]*$ ]] || fail "SPICE_TASKS=$tasks is not a number of tasks"
if [ -n "$task" ] && [ -z "${SPICE_TASKS:-}" ] && [ "$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" != "0-$((tasks - 1))" ]; then
  fail "an array of $tasks tasks numbered $SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX: begin with 0 and leave none out," \
    "or say with SPICE_TASKS how many there are in all"
fi
[ "$tasks" -gt 1 ] || exec "${tool[@]}" "$@"

for ((number = ${task:-0}; number <= ${task:-$((tasks - 1))}; number++)); do
  "${tool[@]}" "$@" --task "$number/$tasks"
done

made=()
for ((number = 0; number < tasks; number++)); do
  folder="$output.tasks/$(printf %05d "$number")"
  [ ! -f "$folder/manifest.json" ] || made+=("$folder")
done
if [ "${#made[@]}" -lt "$tasks" ]; then
  echo "preprocess.sh: ${#made[@]} of $tasks tasks are done; the last one joins them to $output"
else
  exec "${tool[@]}" merge "$output" "${made[@]}" # two that end at once may both do this: the result is the same
fi
