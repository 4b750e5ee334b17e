#!/bin/sh
# The Redis of the journal and the stripe index, with the cluster's token as its password.
set -eu
umask 077
[ -z "${GHOST_TOKEN_FILE:-}" ] || GHOST_TOKEN=$(cat "$GHOST_TOKEN_FILE")
printf 'requirepass %s\n' "${GHOST_TOKEN:?}" > /tmp/valkey.conf
exec valkey-server /tmp/valkey.conf --bind '*' --port 6379 --dir /data --save '' \
  --appendonly yes --appendfsync everysec --maxmemory-policy noeviction "$@"
