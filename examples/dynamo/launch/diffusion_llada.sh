#!/usr/bin/env bash
# Text: a frontend on port 8001 and a worker for the bundled LLaDA2, or with --model-path inclusionAI/LLaDA2.0-mini-preview a large one.
#   diffusion_llada.sh [--model-path MODEL] [--served-model-name NAME] [--http-port 8001] [-- FLAG OF stepwell worker…]
. "$(dirname "$0")/common.sh"
known "model-path served-model-name http-port" "$@"
rest "$@"
model=$(option model-path stepwell/tiny-llada "$@")
frontend "$(option http-port 8001 "$@")"
worker "${SYSTEM_PORT:-9081}" --model-path "$model" --served-model-name "$(option served-model-name "$model" "$@")" \
  --dllm-algorithm LowConfidence "${REST[@]}"
wait -n
