#!/bin/sh
# Cross-build the chunk store's stress test and run it on an emulated CPU.
# Needs aarch64-linux-gnu-gcc and qemu-aarch64-static. Usage: run_store.sh CPU [SECONDS] [SEED]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
src=$root/native/src
gcc=aarch64-linux-gnu-gcc
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags="-std=gnu11 -O2 -ffp-contract=off -Wall -Wextra -Werror -D_GNU_SOURCE -I$root/native/include
       -I$src -pthread"

objects=""
for file in "$src"/error.c "$src"/crc32.c "$src"/layout.c "$src"/store.c "$src"/residency.c \
            "$src"/stream.c "$src"/run.c "$src"/trace.c "$src"/kernels/*.c \
            "$root/native/tests/store_stress.c"; do
    extra=""
    if [ "$(basename "$file")" = neondot.c ]; then extra="-march=armv8.2-a+dotprod"; fi
    object=$work/$(basename "$file" .c).o
    # shellcheck disable=SC2086
    $gcc $flags $extra -c "$file" -o "$object"
    objects="$objects $object"
done
# shellcheck disable=SC2086
$gcc -static -pthread -Wl,--wrap=pread $objects -lm -o "$work/stress"
qemu-aarch64-static -cpu "$1" "$work/stress" "$work" "${2:-10}" "${3:-1}"
