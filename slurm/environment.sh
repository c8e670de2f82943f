# shellcheck shell=bash
# What slurm/*.sh have in common, sourced with `root` set and `fail` defined: this cluster's settings, the environment that install.sh
# made, and the container around it, if there is one. Sets
#
#   python      the environment's
#   here        what a command is put behind to run on this node as the ranks do: in the container
#   inside      the same for a command that is a task of srun already
#   contained   what srun is told for it
site="${SPICE_SITE:-$root/slurm/site.sh}"
if [ -f "$site" ]; then
  # shellcheck source=/dev/null
  source "$site"
elif [ -n "${SPICE_SITE:-}" ]; then
  fail "SPICE_SITE=$SPICE_SITE is not a file"
fi

venv="${SPICE_VENV:-$root/.venv}"
[ ! -d "$venv" ] || venv="$(cd "$venv" && pwd)"
python="$venv/bin/python"

# What there must be in a container under the name it has outside; what else it needs is SPICE_MOUNTS.
mounts="$root:$root"
for folder in "$PWD" "$venv"; do
  [[ ! -d "$folder" || "$folder/" == "$root/"* ]] || mounts+=",$folder:$folder"
done
mounts+="${SPICE_MOUNTS:+,$SPICE_MOUNTS}"
if [ -n "${SPICE_CONTAINER:-}" ] && [ -n "${SPICE_SCRATCH:-}" ]; then
  # It is each node's own, and what is mounted has to be there.
  nodes="${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}" everywhere=()
  [ -z "${SLURM_JOB_ID:-}" ] || everywhere=(srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --export=ALL)
  if "${everywhere[@]}" mkdir -p "$SPICE_SCRATCH"; then
    mounts+=",$SPICE_SCRATCH:$SPICE_SCRATCH"
  else
    echo "SPICE_SCRATCH=$SPICE_SCRATCH is not in the container: it cannot be made on each node" >&2
  fi
fi

here=() inside=() contained=()
if [ -f "${SPICE_CONTAINER:-}" ] && [[ "$SPICE_CONTAINER" != *.sqsh ]]; then
  inside=(apptainer exec --nv --bind "$mounts" "$SPICE_CONTAINER")
  here=("${inside[@]}")
elif [ -n "${SPICE_CONTAINER:-}" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  contained=(--container-image="$SPICE_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
  here=(srun --nodes=1 --ntasks=1 --export=ALL "${contained[@]}")
elif [ -n "${SPICE_CONTAINER:-}" ]; then
  echo "without SPICE_CONTAINER=$SPICE_CONTAINER: Pyxis runs it in a Slurm job only" >&2
fi
# In a container this Python may be one that is not there outside.
[ "${#here[@]}" -gt 0 ] || [ -x "$python" ] || fail "$python is not there; run \`bash $root/install.sh\` first"
