#!/usr/bin/env bash
# An experiment as three Slurm jobs, each after the one before: D of each seed with its
# factorization, then an array with every arm at every rank and seed, then the report.
#
#   bash scripts/slurm_array.sh RANKS ARMS SEEDS [ARGUMENT...]
#   bash scripts/slurm_array.sh 64,128 pca,random,pca_finetune 1,2 --config.workdir=FOLDER
#
# Each task is scripts/slurm.sbatch, which says what a task gets. What tasks share is
# made once, because each folder has a lock. Give the same command again to go on: what
# is done is skipped. Arguments are passed to every task.

# shellcheck source=SCRIPTDIR/launch.sh
source "$(dirname -- "$0")/launch.sh"
require_ranks "${1-}" "pca,random 1,2"
[[ $# -ge 3 ]] ||
  refuse "give ranks, arms and seeds, for example: bash scripts/$script 64,128" \
    "pca,random 1,2"
IFS=, read -ra ranks <<<"$1"
IFS=, read -ra arms <<<"$2"
IFS=, read -ra seeds <<<"$3"
all_ranks=$1 all_arms=$2 all_seeds=$3
further=("${@:4}")

# experiment RANKS ARMS SEEDS: prints the arguments of a task, quoted.
experiment() {
  printf '%q ' --config=configs/experiment.py:"$1" --config.experiment.arms="$2" \
    --config.experiment.seeds="$3" "${further[@]}"
  echo
}

# submit FILE [OPTION...]: submits an array with a task for each line; prints its number.
submit() {
  sbatch --parsable --array=1-"$(wc -l <"$1")" "${@:2}" scripts/slurm.sbatch "$1"
}

folder=slurm/$(date +%Y%m%d-%H%M%S)
mkdir -p "$folder"
for seed in "${seeds[@]}"; do
  experiment "$all_ranks" '' "$seed"
done >"$folder/baselines"
for rank in "${ranks[@]}"; do
  for arm in "${arms[@]}"; do
    for seed in "${seeds[@]}"; do
      experiment "$rank" "$arm" "$seed"
    done
  done
done >"$folder/arms"
experiment "$all_ranks" "$all_arms" "$all_seeds" >"$folder/report"

job=$(submit "$folder/baselines")
job=$(submit "$folder/arms" --dependency=afterok:"${job%%;*}")
job=$(submit "$folder/report" --dependency=afterok:"${job%%;*}")
echo "$script: the report is the last job, ${job%%;*}; the tasks are in $folder"
