#!/usr/bin/env bash
# Train on the machines of a Slurm job, one launcher per machine:
#
#   sbatch --nodes=2 --gpus-per-node=8 slurm.sh --plugins kure --out /shared/runs/mine
#
# Everything after the script's name goes to `qpipe launch`. Activate the Python environment before sbatch, or here.
#SBATCH --job-name=qpipe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=qpipe-%j.log
#SBATCH --signal=TERM@60
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# Two jobs may share a machine, so the port follows from the job's number.
rendezvous="$first:$((20000 + SLURM_JOB_ID % 20000))"

# Since Slurm 22.05 srun does not take the cores of the job over by itself.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

if [[ $SLURM_NNODES -eq 1 ]]; then
  exec srun --kill-on-bad-exit=1 qpipe launch "$@"
fi
# $SLURM_NODEID differs on each machine, so it is read there, not here.
export QPIPE_RENDEZVOUS=$rendezvous
exec srun --kill-on-bad-exit=1 bash -c \
  'exec qpipe launch --nodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rendezvous "$QPIPE_RENDEZVOUS" "$@"' qpipe "$@"
