#!/usr/bin/env bash
# Opens a shell on a node, for debugging: slurm/interactive.sh [options of srun, such as --gpus=1 --cpus-per-task=8 --time=1:00:00]
#
# Under the job names "bash" and "interactive" Lightning takes no notice of SLURM: `python -m distill fit` then starts its ranks
# itself, as on a workstation (--trainer.devices=2), and nothing of preemption, requeue or several nodes is tried out. Do not put
# srun before it there: each task would train alone, in the same folder. For that, submit train.sbatch.
set -euo pipefail
exec srun --pty --nodes=1 --ntasks=1 --job-name=interactive "$@" bash -c '
    site=slurm/env.d/${DISTILL_SITE:-$SLURM_CLUSTER_NAME}.sh
    [ ! -f "$site" ] || source "$site"
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
    exec bash -i'
