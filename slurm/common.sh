# What every job script here begins with. Sourced, not run. It stands in the repository that the job was submitted from.

fail() { # ends the job with a line in its output
    echo "error: $*" >&2
    exit 1
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "not in a job; start this script by sbatch"
cd "${SLURM_SUBMIT_DIR:?}" # absolute in a job
command -v python >/dev/null || [ -n "${DISTILL_SITE:-}" ] || [ -f "slurm/env.d/$SLURM_CLUSTER_NAME.sh" ] ||
    fail "no python on PATH and no slurm/env.d/$SLURM_CLUSTER_NAME.sh; see slurm/env.d/example.sh"

# Nothing is fetched in a job: nodes that compute have no network, and many tasks would ask at once.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
# srun does not take this over from sbatch since SLURM 22.05; without it a task and its workers share one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# The first node as the others know it: its NodeAddr, which is its name almost everywhere, but not where names do not resolve.
node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol -o show node "$node" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
export MASTER_ADDR=${MASTER_ADDR:-$node}
# Never that of the shell that submitted: Lightning makes one of the job's number.
unset MASTER_PORT

# What differs from site to site: DISTILL_SITE names a file of env.d/; without it, the one named as the cluster, if there is one.
site=slurm/env.d/${DISTILL_SITE:-$SLURM_CLUSTER_NAME}.sh
if [ -f "$site" ]; then
    # shellcheck disable=SC1090
    source "$site"
elif [ -n "${DISTILL_SITE:-}" ]; then
    fail "DISTILL_SITE=$DISTILL_SITE: there is no $site; copy slurm/env.d/example.sh to it"
fi

array_of_shards() { # checks what scripts that make one shard a task are given
    local usage="sbatch --array=0-63 with OF=64: a task makes one of OF shards"
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "not an array; start it by $usage"
    [[ ${OF:-} =~ ^[1-9][0-9]*$ ]] || fail "OF=${OF:-}: how many shards there are in all; $usage"
    [ "$SLURM_ARRAY_TASK_ID" -lt "$OF" ] || fail "task $SLURM_ARRAY_TASK_ID of OF=$OF shards; $usage"
    [ -n "${OUT:-}" ] || fail "OUT is not set: the folder of the shards"
}

finished_run() { # checks that RUN is a run that has been trained to its end
    [ -n "${RUN:-}" ] || fail "RUN is not set: the folder of the run to evaluate"
    [ -f "$RUN/DONE" ] || [ "${UNFINISHED:-0}" = 1 ] ||
        fail "RUN=$RUN: there is no DONE in it, so its training is not complete; UNFINISHED=1 takes it as it is"
}
