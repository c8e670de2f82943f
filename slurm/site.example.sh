# shellcheck shell=bash
# This cluster's settings: copy to slurm/site.sh and fill in. slurm/spice.sh and slurm/preprocess.sh read it on the first node;
# what sbatch itself has to know (SBATCH_*) must be in the environment that sbatch is called from: `source slurm/site.sh` there.

# export SBATCH_PARTITION=h100 SBATCH_ACCOUNT=myproject SBATCH_TIMELIMIT=24:00:00

# module load cuda/13.0 nccl

# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network that nodes meet on
# export NCCL_IB_HCA=mlx5

# export SPICE_CONTAINER=nvcr.io/nvidia/pytorch:26.05-py3   # with Pyxis; a .sif file with Apptainer
# export SPICE_MOUNTS=/scratch:/scratch                     # more folders for a Pyxis container

# export SPICE_SCRATCH=/local/$USER   # a folder on each node for caches of compiled kernels; default: SLURM_TMPDIR, TMPDIR or /tmp
