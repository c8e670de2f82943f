#!/usr/bin/env bash
#SBATCH --job-name=spice
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=spice-%j.log
#SBATCH --open-mode=append
#
# The one way to start training:
#
#   bash slurm/spice.sh RECIPE [key.sub=value ...]                      on this machine
#   sbatch [--nodes=N --gpus-per-node=8 ...] slurm/spice.sh RECIPE ...  on an allocation, from the repository's folder
#
# Inside an allocation every node gets one task and torchrun starts the node's ranks; the first node is where they meet.
# The recipe is checked before anything starts: a wrong one ends with exit code 2 and says what to change.
#
#   SPICE_ROOT    the repository, where it is not beside this script (sbatch runs a copy of it)
#   SPICE_VENV    the environment that install.sh made, when it is not .venv
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
python="${SPICE_VENV:-$root/.venv}/bin/python"
[ -x "$python" ] || fail "$python is not there; run \`bash $root/install.sh\` first"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
# Megatron-Core calls collectives by names that this torch renames; a warning a rank and name would hide the progress.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}"

nodes=1
if [ -n "${SLURM_JOB_ID:-}" ]; then
  nodes="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}"
fi

# The check prints the assignments below, or says what is wrong and ends with 2, which is then our exit code too.
environment="$("$python" -m megatron_spice launch-env --nodes "$nodes" "$@")" || exit $?
SPICE_RANKS_PER_NODE='' SPICE_DEVICE_KIND=''
eval "$environment"

if [ "$SPICE_DEVICE_KIND" = cpu ]; then
  # Ranks share the cores, and threads that spin while they wait take them from whoever has work: from the engine. They spin
  # for a tenth of a millisecond: without, every small operation wakes them, and an update takes a third longer.
  threads=$(($(nproc) / SPICE_RANKS_PER_NODE))
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
  # Memory that ranks free is kept for their next tensors (megatron_spice/cluster/host_memory.py).
  [ -n "${GLIBC_TUNABLES:-}" ] || GLIBC_TUNABLES="$("$python" -c 'from megatron_spice.cluster import host_memory as m; print(m.TUNABLES)')"
  export GLIBC_TUNABLES
else
  # Megatron overlaps tensor-parallel communication correctly only when kernels are queued in one order.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
fi

# `exec` from here on: signals reach torchrun (or srun, which passes them on) itself, and its exit code is ours.
if [ -z "${SLURM_JOB_ID:-}" ]; then
  # One machine talks to itself: by loopback, whatever its host name resolves to.
  export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
  exec "$python" -m torch.distributed.run --standalone --local-addr=127.0.0.1 \
    --nproc-per-node="$SPICE_RANKS_PER_NODE" --module megatron_spice train "$@"
fi

command -v srun >/dev/null || fail "SLURM_JOB_ID is set but srun is not on PATH"
first_node="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)"
port=$((20000 + SLURM_JOB_ID % 10000))
# shellcheck disable=SC2016  # SLURM_NODEID is known only inside each task.
exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c 'exec "$0" -m torch.distributed.run --node-rank="$SLURM_NODEID" "$@"' "$python" \
  --nnodes="$nodes" --nproc-per-node="$SPICE_RANKS_PER_NODE" --master-addr="$first_node" --master-port="$port" \
  --module megatron_spice train "$@"
