#!/usr/bin/env bash
#SBATCH --job-name=spice
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=spice-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#
# The one way to start training:
#
#   bash slurm/spice.sh RECIPE [key.sub=value ...]                      on this machine
#   sbatch [--nodes=N --gpus-per-node=8 ...] slurm/spice.sh RECIPE ...  on an allocation, from the repository's folder
#   bash slurm/spice.sh --dry-run [--nodes=N] RECIPE ...                say what would be started, and whether it fits; also what to
#                                                                       start on each of several nodes where there is no Slurm
#
# Inside an allocation every node gets one task and torchrun starts the node's ranks; the first node is where they meet.
# The recipe is checked before anything starts: a wrong one ends with exit code 2 and says what to change.
# A job has its nodes with all their memory: a site's default with --exclusive may be less than `--dry-run` finds it to need.
#
# A job ends before its recipe does, and what happens then:
#   the time limit is near (SIGUSR1, 3 minutes before)     saved, requeued, goes on by itself; what takes longer than that and
#                                                          Slurm's KillWait is lost, so that the job goes on from an older checkpoint:
#                                                          --dry-run says how early a recipe wants to be told, and that is given to
#                                                          sbatch before the script: sbatch --signal=B:USR1@600 slurm/spice.sh ...
#   the third time limit at the same checkpoint            not requeued: it would be the same for ever
#   preempted with a GraceTime (SIGTERM to the ranks)      saved if that takes less, and requeued
#   preempted without, or `scontrol requeue` (SIGTERM)     saved if that takes less than Slurm's KillWait; Slurm requeues it
#   `scancel` (SIGTERM)                                    the same, not requeued
#   another run has taken its run.dir                      not requeued
#   a rank or a node fails                                 requeued if the run has come further since it was last started
#   killed from outside before it came further             requeued, once at the same checkpoint; so is one whose port was taken
# How that is found out: slurm/requeue.sh.
#
#   SPICE_ROOT         the repository, where it is not beside this script (sbatch runs a copy of it)
#   SPICE_VENV         the environment that install.sh made, when it is not .venv
#   SPICE_SITE         a file with this cluster's settings (slurm/site.example.sh), when it is not slurm/site.sh
#   SPICE_SCRATCH      a folder on each node for caches of compiled kernels (megatron_spice/cluster/scratch.py says what else may be)
#   SPICE_CONTAINER    run in this image: with Apptainer if it is a file, with Pyxis if it is a .sqsh file or a registry's name
#   SPICE_MOUNTS       more folders that are to be seen in it, such as /scratch:/scratch: model, corpus, run.dir
set -euo pipefail

fail() { printf 'spice.sh: %s\n' "$*" >&2; exit 1; }

find_root() {
  local candidate
  for candidate in "${SPICE_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${SLURM_SUBMIT_DIR:-}"; do
    if [ -n "$candidate" ] && [ -f "$candidate/megatron_spice/__main__.py" ]; then
      (cd "$candidate" && pwd)
      return
    fi
  done
  fail "the repository was not found; submit from its folder, or set SPICE_ROOT"
}

if [ $# -eq 0 ] || [ "$1" = "-h" ] || [ "$1" = "--help" ]; then
  echo "usage: bash slurm/spice.sh RECIPE [key.sub=value ...]     (recipes: examples/*.yaml)" >&2
  exit 2
fi

root="$(find_root)"
# shellcheck source=slurm/environment.sh
source "$root/slurm/environment.sh"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Megatron-Core calls collectives by names that this torch renames; a warning a rank and name would hide the progress.
# And torch's store warns of every wait that is shorter than what is waited for: a line a second in the logs of ranks that wait.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}"

if [ "$1" = "--dry-run" ]; then
  shift
  exec "${here[@]}" "$python" -m megatron_spice plan "$@"
fi

nodes=1 limit_is_near='' told_to_end='' woken='' srun=''
# Slurm wakes this shell alone; the ranks hear of it from here: by srun, which asks no controller (it may be just failing over),
# and by Slurm, which also knows of a step that srun has not begun yet.
tell_ranks() {
  [ -n "$srun" ] || return 0
  kill -USR1 "$srun" 2>/dev/null || true
  timeout 60 scancel --signal=USR1 "$SLURM_JOB_ID" || true
}
if [ -n "${SLURM_JOB_ID:-}" ]; then
  nodes="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}"
  trap 'woken=yes limit_is_near=yes; tell_ranks' USR1
  trap 'woken=yes told_to_end=yes' TERM # by then Slurm has told all processes of the job
fi

if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  # What this job has saved itself is gone on from, also where its recipe begins anew.
  set -- "$@" checkpoint.resume=auto
fi
# The check prints the assignments below, or says what is wrong and ends with 2, which is then our exit code too. Until it has ended
# no trap is run; what it reads may be on a file system that has died. In the foreground, where Ctrl-C comes to it.
environment="$(timeout --foreground -k 30 1800 "${here[@]}" "$python" -m megatron_spice launch-env --nodes "$nodes" "$@")" || {
  status=$?
  case "$status" in
    124 | 137) fail "the check of the recipe gave no answer ($status): is the file system dead of its model, corpus or run.dir?" ;;
  esac
  exit "$status"
}
SPICE_RANKS_PER_NODE='' SPICE_DEVICE_KIND='' SPICE_TUNABLES=''
eval "$environment"
export SPICE_RUN_DIR

if [ "$SPICE_DEVICE_KIND" = cpu ]; then
  # Ranks share the cores, and threads that spin while they wait take them from whoever has work: from the engine. They spin
  # for a tenth of a millisecond: without, every small operation wakes them, and an update takes a third longer.
  threads=$(($(nproc) / SPICE_RANKS_PER_NODE))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
  # Memory that ranks free is kept for their next tensors (megatron_spice/cluster/host_memory.py).
  export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$SPICE_TUNABLES}"
else
  # Megatron overlaps tensor-parallel communication correctly only when kernels are queued in one order.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
fi

if [ -z "${SLURM_JOB_ID:-}" ]; then
  # One machine talks to itself: by loopback, whatever its host name resolves to. `exec`, so that signals reach the launcher
  # itself, which passes them on, and its exit code is ours.
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
  exec "${here[@]}" "$python" -m megatron_spice.launch --standalone --local-addr=127.0.0.1 \
    --nproc-per-node="$SPICE_RANKS_PER_NODE" --module megatron_spice train "$@"
fi

command -v srun >/dev/null || fail "SLURM_JOB_ID is set but srun is not on PATH"

# A node's address as Slurm knows it, where its name means nothing to the resolver.
address_of() {
  local address=''
  getent hosts "$1" >/dev/null || address="$(timeout 60 scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
  echo "${address:-$1}"
}

# shellcheck source=slurm/requeue.sh
source "$root/slurm/requeue.sh"
first_node="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")"
first_node="${first_node%%$'\n'*}" # not by `head`, which may end before scontrol has told them all: that fails a pipe
first_address="$(address_of "$first_node")"
# Another one for each start: on a node that Slurm took for dead the last start's may still be held.
port=$((20000 + (SLURM_JOB_ID + 97 * ${SLURM_RESTART_COUNT:-0}) % 10000))
# All of the environment, also where `sbatch --export=...` was told to give this script less: srun would do the same.
step=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --export=ALL "${contained[@]}")

before="$(newest_checkpoint)" || fail "$SPICE_RUN_DIR/checkpoints gives no answer: is its file system dead?"
owner_before="$(folder_belongs_to)"
if [ -n "$told_to_end$limit_is_near" ]; then # before there was anything to save
  [ -n "$told_to_end" ] || is_limit_too_short || requeue
  exit 75
fi

# Such a signal must not end what is between this shell and the ranks, who get it from Slurm too; the launcher has a handler.
# shellcheck disable=SC2016  # SLURM_NODEID is known only inside each task.
"${step[@]}" bash -c 'trap "" TERM USR1; export PET_NODE_RANK="$SLURM_NODEID"; exec "$@"' -- \
  "${inside[@]}" "$python" -m megatron_spice.launch \
  --nnodes="$nodes" --nproc-per-node="$SPICE_RANKS_PER_NODE" --master-addr="$first_address" --master-port="$port" \
  --module megatron_spice train "$@" &
srun=$! requeued=''
[ -z "$limit_is_near" ] || tell_ranks # the trap came too early for it
while :; do
  woken=''
  if [ -n "$told_to_end" ] && [ -n "$limit_is_near" ] && [ -z "$requeued" ] && is_out_of_time; then
    # They save still. At once, for Slurm kills this shell with them when its KillWait is over.
    requeued=yes
    is_limit_too_short || requeue || true
  fi
  wait "$srun" && status=0 || status=$?
  [ -n "$woken" ] || break # a trap ends `wait` before its time
done

! has_ended_in_order || status=75
if [ "$status" -ne 0 ] && [ "$status" -ne 75 ]; then
  # Each node's launcher has spoken for its own ranks, in any order; this is the line to read.
  timeout 300 "${here[@]}" "$python" -m megatron_spice.telemetry.rank_logs "$SPICE_RUN_DIR" | sed 's/^/spice.sh: /' || true
fi
if [ -n "$told_to_end" ] || [ "$status" -eq 0 ]; then
  exit "$status"
elif [ -n "$limit_is_near" ] && is_limit_too_short; then
  exit "$status"
elif [ "$status" -eq 75 ] || [ -n "$limit_is_near" ] || has_come_further || is_killed_here_first; then
  requeue
fi
exit "$status"
