#!/usr/bin/env bash
# All GPUs of this machine:   launch/one_host.sh train_configs/train_lora.yaml output_dir=runs/mine
# Some of them:               GPUS=2 launch/one_host.sh ...
# Another script than train.py, for another model: SCRIPT=train_flux_lora.py launch/one_host.sh ...
#
# A process that fails ends all of them within a minute; they are started again up to RESTARTS times, and go on from the
# last checkpoint. Ctrl-C or SIGTERM ends the run with a checkpoint, and starts nothing again.
set -euo pipefail
cd "$(dirname "$0")/.."

config=${1:?usage: launch/one_host.sh CONFIG [key=value ...]}
shift
# Seconds in which a run that is asked to stop saves; torchrun's own 30 are short for all weights of a large model.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
  "${SCRIPT:-train.py}" --config "$config" "$@"
