#!/usr/bin/env bash
# Several machines without a scheduler. Type the same on each, with the first machine's name or address as HEAD:
#
#   HOSTS=2 HEAD=node1 launch/several_hosts.sh train_configs/train_lora.yaml output_dir=/shared/runs/mine
#
# Needed: the same versions and config on all (a run refuses to start otherwise, and says what differs); model, data,
# cache and output_dir on paths that are the same on all, output_dir and cache on a file system that all of them share;
# and the ports of HEAD open to the others: PORT, and one that process 0 chooses.
set -euo pipefail
cd "$(dirname "$0")/.."

config=${1:?usage: HOSTS=N HEAD=HOST launch/several_hosts.sh CONFIG [key=value ...]}
shift
hosts=${HOSTS:?HOSTS: the number of machines}
head=${HEAD:?HEAD: the name or address of one of the machines, the same on all}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

# Without a range such as 1:4 for the number of machines: another number of processes trains on other batches, which a
# run that is resumed refuses.
exec torchrun --nnodes "$hosts" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-id "${RUN:-pixtune}" --rdzv-endpoint "$head:${PORT:-29500}" \
  "${SCRIPT:-train.py}" --config "$config" "$@"
