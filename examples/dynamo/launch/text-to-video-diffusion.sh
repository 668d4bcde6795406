#!/usr/bin/env bash
# Videos: a frontend on port 8000 and a worker. --wan-size 1b or 14b takes Wan 2.1 of that size from the hub; without it, and without
# --model-path, the model is the bundled one.
#   text-to-video-diffusion.sh [--wan-size 1b|14b | --model-path MODEL] [--served-model-name NAME] [--fs-url URL] [--http-url URL]
#                              [--http-port 8000] [-- FLAG OF stepwell worker…]
. "$(dirname "$0")/common.sh"
known "wan-size model-path served-model-name fs-url http-url http-port" "$@"
rest "$@"
case $(option wan-size "" "$@") in
  1b) model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers ;;
  14b) model=Wan-AI/Wan2.1-T2V-14B-Diffusers ;;
  "") model=$(option model-path stepwell/tiny-wan "$@") ;;
  *) echo "$(basename "$0"): --wan-size is 1b or 14b" >&2 && exit 2 ;;
esac
http_url=$(option http-url "" "$@")
frontend "$(option http-port 8000 "$@")"
worker "${SYSTEM_PORT:-9083}" --video-generation-worker --model-path "$model" \
  --served-model-name "$(option served-model-name "$model" "$@")" \
  --media-output-fs-url "$(option fs-url "file://$RUN/media" "$@")" ${http_url:+--media-output-http-url "$http_url"} "${REST[@]}"
wait -n
