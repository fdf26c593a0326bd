#!/usr/bin/env bash
# Train on two machines with torchrun. Run it on both, the first machine with 0 and the second with 1:
#
#   two-nodes.sh 0 node0:29500 [arguments of qpipe launch]
#   two-nodes.sh 1 node0:29500 [the same arguments]
#
# node0 is the first machine's name as the second one knows it, and 29500 a free port there. Both machines need the same
# Python environment, and --out on a disk that they share. NODES=M takes more than two machines.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[0-9]+$ ]]; then
  echo "usage: $0 NODE_RANK HOST:PORT [arguments of qpipe launch]" >&2
  exit 2
fi
node_rank=$1
rendezvous=$2
shift 2

exec qpipe launch --nodes "${NODES:-2}" --node-rank "$node_rank" --rendezvous "$rendezvous" "$@"
