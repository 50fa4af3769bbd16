#!/bin/sh
# Cross-build the kernels' self test and run it on the CPUs of three Raspberry Pis (3, 4, 5), each
# emulated. Checks that the dot product instructions stay in their own family, that only the CPU
# that has them uses them, and that all CPUs compute the same bits.
# Needs aarch64-linux-gnu-gcc and qemu-aarch64-static.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
kernels=$root/native/src/kernels
cross=aarch64-linux-gnu-
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags="-std=c11 -O3 -ffp-contract=off -fno-fast-math -Wall -Wextra -Werror"

for file in "$kernels"/*.c "$root/native/tests/kernels_selftest.c"; do
    name=$(basename "$file" .c)
    case $name in
    neon) extra="-fno-schedule-insns" ;;
    neondot) extra="-fno-schedule-insns -march=armv8.2-a+dotprod" ;;
    *) extra="" ;;
    esac
    # shellcheck disable=SC2086
    ${cross}gcc $flags $extra -c "$file" -o "$work/$name.o"
    dots=$(${cross}objdump -d "$work/$name.o" | grep -cE '\s[su]dot\s' || true)
    if [ "$name" = neondot ] && [ "$dots" -eq 0 ]; then
        echo "neondot.o holds no dot product instruction; check its -march flag" >&2
        exit 1
    elif [ "$name" != neondot ] && [ "$dots" -ne 0 ]; then
        echo "$name.o holds $dots dot product instructions, expected 0" >&2
        exit 1
    fi
done
${cross}gcc -static "$work"/*.o -lm -o "$work/selftest"

digests=""
for pair in cortex-a53:neon cortex-a72:neon cortex-a76:neondot; do
    cpu=${pair%:*}
    expected=${pair#*:}
    echo "== $cpu"
    qemu-aarch64-static -cpu "$cpu" "$work/selftest" >"$work/out" || { cat "$work/out"; exit 1; }
    cat "$work/out"
    chosen=$(awk '/\(chosen\)/ { print $1 }' "$work/out")
    if [ "$chosen" != "$expected" ]; then
        echo "$cpu chose family $chosen, expected $expected" >&2
        exit 1
    fi
    digests="$digests$(awk '/^digest/ { print $2 }' "$work/out")
"
done
if [ "$(printf '%s' "$digests" | sort -u | wc -l)" -ne 1 ]; then
    echo "the CPUs computed different bits; see the digests above" >&2
    exit 1
fi
