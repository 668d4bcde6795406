#!/usr/bin/env bash
# One model on several ranks behind one worker: a frontend on port 8000, and a worker whose ranks torchrun starts on this host.
#   ranks.sh [--ranks 2] [--model-path MODEL] [--served-model-name NAME] [--http-port 8000] [-- FLAG OF stepwell worker…]
. "$(dirname "$0")/common.sh"
known "ranks model-path served-model-name http-port" "$@"
rest "$@"
model=$(option model-path stepwell/tiny-wan "$@")
frontend "$(option http-port 8000 "$@")"
DYN_SYSTEM_PORT="${SYSTEM_PORT:-9085}" "$BIN/python" -m torch.distributed.run --standalone --nproc-per-node "$(option ranks 2 "$@")" \
  --shutdown-timeout 180 -m stepwell.dynamo --model-path "$model" --served-model-name "$(option served-model-name "$model" "$@")" \
  --media-output-fs-url "file://$RUN/media" --enable-cfg-parallel "${REST[@]}" &
wait -n
