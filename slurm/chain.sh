#!/usr/bin/env bash
# Submits a whole experiment: shards are made, a recipe is trained on them, samples are drawn and measured; each job starts when
# the one before has ended well, and is dropped if it has not. The end is SAMPLES/fid.json. From the repository's root:
#
#   MAKE=make_pairs MAKE_CONFIG=configs/digits/pairs.yaml OUT=data/pairs/digits OF=8 CONFIG=configs/digits/reflow.yaml \
#   REFERENCE=digits SAMPLE_WORDS="--steps 1 --num 1800" slurm/chain.sh
#
#   MAKE          make_pairs, encode or make_shards, with MAKE_CONFIG, OUT and OF; without it nothing is made
#   CONFIG, RUN   as for train.sbatch
#   REFERENCE     as for fid.sbatch, and SAMPLES
#   MAKE_WORDS, TRAIN_WORDS, SAMPLE_WORDS, FID_WORDS          what follows each script's name, split at spaces
#   MAKE_SBATCH, TRAIN_SBATCH, EVALUATE_SBATCH                options of sbatch, such as "--nodes=2 --gpus-per-node=8"
set -euo pipefail

: "${CONFIG:?give the recipe to train: CONFIG=configs/digits/reflow.yaml}" "${REFERENCE:?give what to measure against: REFERENCE=digits}"
[ -f slurm/chain.sh ] || { echo "error: start it in the repository's root: slurm/chain.sh" >&2; exit 1; }
source slurm/run_of.sh
RUN=${RUN:-$(run_of "$CONFIG")}
SAMPLES=${SAMPLES:-$RUN/samples}
export RUN SAMPLES REFERENCE

previous=
submit() { # NAME, then options and words: a job after the one before
    local name=$1 number
    shift
    number=$(sbatch --parsable ${previous:+--dependency=afterok:$previous --kill-on-invalid-dep=yes} "$@")
    previous=${number%%;*}
    echo "$name: job $previous"
}

# The options and words are lists in one variable: they are to be split.
# shellcheck disable=SC2086
{
    if [ -n "${MAKE:-}" ]; then
        : "${OUT:?give the folder of the shards: OUT=data/pairs/digits}" "${OF:?give how many shards: OF=8}"
        export OUT OF
        CONFIG=${MAKE_CONFIG:-} submit "$MAKE" --array="0-$((OF - 1))" ${MAKE_SBATCH:-} "slurm/$MAKE.sbatch" ${MAKE_WORDS:-}
    fi
    export CONFIG
    submit train ${TRAIN_SBATCH:-} slurm/train.sbatch ${TRAIN_WORDS:-}
    submit sample ${EVALUATE_SBATCH:-} slurm/sample.sbatch --overwrite ${SAMPLE_WORDS:-} # trained anew, sampled anew
    submit fid ${EVALUATE_SBATCH:-} slurm/fid.sbatch ${FID_WORDS:-}
}
echo "the result will be $SAMPLES/fid.json"
