# What one site needs, sourced by every job here. Copy it to env.d/NAME.sh: NAME is the cluster's (SLURM_CLUSTER_NAME, which
# `scontrol show config | grep ClusterName` says) and is then found by itself, or any other, chosen by DISTILL_SITE=NAME.
# MASTER_ADDR and the rest of what slurm/common.sh has set may be changed here.

# The software: a module, then the virtual environment, on a file system that all nodes see.
# module load python/3.11 cuda/12.4
# source "$HOME/distill/.venv/bin/activate"

# Weights that were fetched on the login node by `python tools/fetch.py --config ...`; jobs fetch nothing (HF_HUB_OFFLINE=1).
# export HF_HOME=/scratch/$USER/huggingface

# The network between nodes, where the first one found is the wrong one (`ip -brief address` names them).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# What torch.compile makes, on a disk of the node's own: ranks of all nodes would write to one folder of a home directory.
# export TORCHINDUCTOR_CACHE_DIR=/tmp/$USER/inductor TRITON_CACHE_DIR=/tmp/$USER/triton

# Threads of each rank; by default each would take all cores of the node.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
