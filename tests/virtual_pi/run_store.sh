#!/bin/sh
# Run the chunk store's stress test on an emulated CPU.
# Needs aarch64-linux-gnu-gcc and qemu-aarch64-static. Usage: run_store.sh CPU [SECONDS] [SEED]
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stress=$("$(dirname "$0")/../native/build.sh" aarch64 store_stress)
qemu-aarch64-static -cpu "$1" "$stress" "$work" "${2:-10}" "${3:-1}"
