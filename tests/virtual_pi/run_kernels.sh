#!/bin/sh
# Run the kernels' self test on the CPUs of three Raspberry Pis (3, 4, 5), each emulated. Checks
# that the dot product instructions stay in their own family, that only the CPU that has them uses
# them, and that all CPUs compute the same bits.
# Needs aarch64-linux-gnu-gcc and qemu-aarch64-static.
set -eu
selftest=$("$(dirname "$0")/../native/build.sh" aarch64 kernels_selftest)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

find "$(dirname "$selftest")" -name '*.c.o' >"$work/objects"
while read -r object; do
    name=$(basename "$object" .c.o)
    dots=$(aarch64-linux-gnu-objdump -d "$object" | grep -cE '\s[su]dot\s' || true)
    if [ "$name" = neondot ] && [ "$dots" -eq 0 ]; then
        echo "neondot.o holds no dot product instruction; check its flags in CMakeLists.txt" >&2
        exit 1
    elif [ "$name" != neondot ] && [ "$dots" -ne 0 ]; then
        echo "$name.o holds $dots dot product instructions, expected 0" >&2
        exit 1
    fi
done <"$work/objects"
grep -q /neondot "$work/objects" || { echo "there is no neondot.o" >&2; exit 1; }

digests=""
for pair in cortex-a53:neon cortex-a72:neon cortex-a76:neondot; do
    cpu=${pair%:*}
    expected=${pair#*:}
    echo "== $cpu"
    qemu-aarch64-static -cpu "$cpu" "$selftest" >"$work/out" || { cat "$work/out"; exit 1; }
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
