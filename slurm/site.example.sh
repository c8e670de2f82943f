# shellcheck shell=bash
# This cluster's settings: copy to slurm/site.sh and fill in. The scripts beside it read it on the first node;
# what sbatch itself has to know (SBATCH_*) must be in the environment that sbatch is called from: `source slurm/site.sh` there.

# export SBATCH_PARTITION=h100 SBATCH_ACCOUNT=myproject SBATCH_TIMELIMIT=24:00:00

# module load cuda/13.0 nccl

# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network that nodes meet on
# export NCCL_IB_HCA=mlx5

# An image: of a registry or a .sqsh file with Pyxis, a .sif file with Apptainer. `bash install.sh` is run in it, since .venv has its
# Python. The repository, the environment, the folder that is submitted from and SPICE_SCRATCH are mounted; model, corpus and run.dir may
# need more, under the names that they have outside.
# export SPICE_CONTAINER=/images/pytorch.sqsh
# export SPICE_MOUNTS=/scratch:/scratch,/models:/models

# export SPICE_SCRATCH=/local/$USER   # a folder on each node for caches of compiled kernels; default: SLURM_TMPDIR, TMPDIR or /tmp
