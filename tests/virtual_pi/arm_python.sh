#!/bin/sh
# Python on an emulated board: CPU $BAPQ_ARM_CPU, system and packages from .cache/arm64.
# It is sys.executable there, so that tests can start processes of their own. $BAPQ_ARM_QEMU is
# another emulator, with options.
set -eu
script=$(readlink -f "$0")
arm64=$(dirname "$script")/../../.cache/arm64
map=""
if [ "$(id -u)" -ne 0 ]; then map=--map-root-user; fi
# onnxruntime reads /proc/cpuinfo, where this machine shows its own CPU.
exec unshare --mount $map sh -c 'mount --bind "$1" /proc/cpuinfo; shift; exec "$@"' sh \
    "$arm64/cpuinfo-$BAPQ_ARM_CPU" \
    ${BAPQ_ARM_QEMU:-qemu-aarch64-static} -cpu "$BAPQ_ARM_CPU" -L "$arm64/root" -0 "$script" \
    "$arm64/root/usr/bin/python3.11" "$@"
