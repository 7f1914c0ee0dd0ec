#!/bin/bash
# sbatch pipelines/slurm_array.sh: one task of the array is one share of the blocks; the last job puts the end to it.
# OUT and the cache are on a file system that all nodes see. A task that failed is run again with the same command:
# sbatch --array=3 pipelines/slurm_array.sh, then dpo-score finish OUT. What is committed is not computed again.
#SBATCH --job-name=dpo-score
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
set -euo pipefail

PIPELINE=${PIPELINE:-pipelines/quickstart.yaml}
OUT=${OUT:-runs/array}
SHARES=${SHARES:-8}

if [[ ${1:-} == finish ]]; then
  exec dpo-score finish "$OUT"
fi
if [[ ${SLURM_ARRAY_TASK_ID} == 0 && ${SLURM_RESTART_COUNT:-0} == 0 && ${SLURM_ARRAY_TASK_COUNT} == "$SHARES" ]]; then
  sbatch --dependency="afterok:${SLURM_ARRAY_JOB_ID}" --array=0 --gpus-per-task=0 --time=00:30:00 "$0" finish
fi
exec dpo-score run "$PIPELINE" --out "$OUT" --threads "${SLURM_CPUS_PER_TASK}" \
  --blocks "${SLURM_ARRAY_TASK_ID}/$SHARES"
