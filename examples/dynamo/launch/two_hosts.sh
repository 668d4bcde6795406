#!/usr/bin/env bash
# Several hosts that find one another by etcd (Debian: apt install etcd-server). HOST is the address by which the others reach this one.
#   HOST=10.0.0.1 two_hosts.sh first [-- FLAG OF stepwell worker…]            etcd, a frontend on port 8000, a worker
#   HOST=10.0.0.2 two_hosts.sh second 10.0.0.1 [-- FLAG OF stepwell worker…]  another worker
# A dead host is out of rotation once its lease has ended: ETCD_LEASE_TTL seconds. Ports between hosts must be open both ways, as
# workers connect back to the frontend with their answers.
role=${1:-} && first=${2:-}
case $role-$first in
  first-* | second-[!-]*) ;;
  *) echo "usage: HOST=ADDRESS $(basename "$0") first | second ADDRESS_OF_THE_FIRST [-- FLAG…]" >&2 && exit 2 ;;
esac
[ -n "${HOST:-}" ] || {
  echo "$(basename "$0"): HOST is not set: the address by which the other hosts reach this one, such as HOST=10.0.0.1" >&2
  exit 2
}
. "$(dirname "$0")/common.sh"
export DYN_DISCOVERY_BACKEND=etcd ETCD_LEASE_TTL=${ETCD_LEASE_TTL:-5} DYN_SELF_HOST_METADATA=1
rest "$@"
case $role in
  first)
    export ETCD_ENDPOINTS=http://$HOST:2379
    etcd --data-dir "$RUN/etcd" --listen-client-urls "$ETCD_ENDPOINTS" --advertise-client-urls "$ETCD_ENDPOINTS" \
      --listen-peer-urls "http://$HOST:2380" --initial-advertise-peer-urls "http://$HOST:2380" \
      --initial-cluster "default=http://$HOST:2380" &
    frontend 8000
    ;;
  second) export ETCD_ENDPOINTS=http://$first:2379 ;;
esac
worker "${SYSTEM_PORT:-9082}" "${REST[@]}"
wait -n
