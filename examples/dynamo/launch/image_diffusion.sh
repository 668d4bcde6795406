#!/usr/bin/env bash
# Pictures: a frontend on port 8000 and a worker for the bundled model. Files go to --fs-url; --http-url is where clients find them,
# which serve_media.py makes true for a local folder.
#   image_diffusion.sh [--model-path MODEL] [--served-model-name NAME] [--fs-url URL] [--http-url URL] [--http-port 8000] [-- FLAG…]
. "$(dirname "$0")/common.sh"
known "model-path served-model-name fs-url http-url http-port" "$@"
rest "$@"
model=$(option model-path stepwell/tiny-flux "$@")
http_url=$(option http-url "" "$@")
frontend "$(option http-port 8000 "$@")"
worker "${SYSTEM_PORT:-9082}" --image-diffusion-worker --model-path "$model" \
  --served-model-name "$(option served-model-name "$model" "$@")" \
  --media-output-fs-url "$(option fs-url "file://$RUN/media" "$@")" ${http_url:+--media-output-http-url "$http_url"} "${REST[@]}"
wait -n
