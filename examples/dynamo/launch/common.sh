# For the scripts beside it: one host, found by file; a frontend, workers, and an end to all of them together.
set -euo pipefail

BIN=${BIN:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)/.venv/bin}
[ -x "$BIN/python" ] || BIN=$(dirname "$(command -v python3)")
RUN=${RUN:-${TMPDIR:-/tmp}/stepwell-dynamo-$(id -u)}
mkdir -p "$RUN" && chmod 700 "$RUN"

export DYN_DISCOVERY_BACKEND=${DYN_DISCOVERY_BACKEND:-file} DYN_FILE_KV=${DYN_FILE_KV:-$RUN/kv}
export DYN_REQUEST_PLANE=${DYN_REQUEST_PLANE:-tcp} DYN_EVENT_PLANE=${DYN_EVENT_PLANE:-zmq}
HOST=${HOST:-127.0.0.1} # of this machine, as frontends and workers elsewhere reach it
export DYN_TCP_RPC_HOST=${DYN_TCP_RPC_HOST:-$HOST} DYN_TCP_RESPONSE_STREAM_HOST=${DYN_TCP_RESPONSE_STREAM_HOST:-$HOST}
export DYN_EVENT_PLANE_HOST=${DYN_EVENT_PLANE_HOST:-$HOST} DYN_SYSTEM_HOST=${DYN_SYSTEM_HOST:-$HOST}

finish() {
  trap - EXIT INT TERM
  jobs -pr | xargs -r kill 2>/dev/null || true # SIGTERM: workers finish what they have begun
  wait
}
trap finish EXIT
trap 'exit 0' INT TERM

# frontend PORT
frontend() {
  "$BIN/python" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("stepwell", "dynamo", "uvloop"))))' || {
    echo "$(basename "$0"): $BIN/python has no Stepwell with NVIDIA Dynamo: make setup-dynamo, or set BIN" >&2
    exit 1
  }
  "$BIN/python" -m dynamo.frontend --http-host "$HOST" --http-port "$1" &
}

# worker SYSTEM_PORT FLAG…: health and metrics at that port, which is also where frontends elsewhere read a tokenizer
worker() {
  local port=$1
  shift
  DYN_SYSTEM_PORT=$port "$BIN/python" -m stepwell.dynamo "$@" &
}

# option NAME DEFAULT ARGUMENT…: the value of --NAME among the arguments
option() {
  local name=--$1 value=$2
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      "$name") value=$2 && shift ;;
      "$name="*) value=${1#*=} ;;
    esac
    shift
  done
  echo "$value"
}

# known "NAME…" ARGUMENT…: refuse options that the script does not have, before the first --
known() {
  local names=" $1 "
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    local name=${1%%=*}
    name=${name#--}
    case $names in
      *" $name "*) [ "$1" = "--$name" ] && shift ;;
      *) echo "$(basename "$0"): unknown option $1; there are:$names; what follows -- goes to the worker" >&2 && exit 2 ;;
    esac
    shift || { echo "$(basename "$0"): --$name needs a value" >&2 && exit 2; }
  done
}

# rest ARGUMENT…: fills REST with what follows --
rest() {
  REST=()
  while [ $# -gt 0 ]; do
    [ "$1" = -- ] && shift && REST=("$@") && return
    shift
  done
}
