#!/bin/sh
# Build the store's stress test with gcc's thread sanitizer, and with its address and undefined
# behaviour sanitizers, and run both. Usage: run_sanitizers.sh [SECONDS_EACH] [SEED]
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
seconds=${1:-10}
seed=${2:-1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
src=$root/native/src
flags="-std=gnu11 -O1 -g -ffp-contract=off -fno-omit-frame-pointer -Wall -Wextra -Werror -D_GNU_SOURCE
       -I$root/native/include -I$src -pthread"
# Where a container lets us, without address randomisation: gcc's thread sanitizer knows only the
# usual memory layouts.
fixed=""
if setarch -R true 2>/dev/null; then fixed="setarch -R"; fi

for sanitizers in thread address,undefined; do
    echo "== $sanitizers"
    objects=""
    for file in "$src"/error.c "$src"/crc32.c "$src"/layout.c "$src"/store.c "$src"/residency.c \
                "$src"/stream.c "$src"/run.c "$src"/trace.c "$src"/kernels/*.c \
                "$root/native/tests/store_stress.c"; do
        case $(uname -m)-$(basename "$file" .c) in
        x86_64-avx2) extra="-mavx2 -mfma" ;;
        x86_64-avx512vnni) extra="-mavx2 -mfma -mavx512f -mavx512bw -mavx512vl -mavx512vnni" ;;
        aarch64-neondot) extra="-march=armv8.2-a+dotprod" ;;
        *) extra="" ;;
        esac
        object=$work/$(basename "$file" .c).o
        # shellcheck disable=SC2086
        gcc $flags -fsanitize=$sanitizers -fno-sanitize-recover=all $extra -c "$file" -o "$object"
        objects="$objects $object"
    done
    # shellcheck disable=SC2086
    gcc -fsanitize=$sanitizers -pthread -Wl,--wrap=pread $objects -lm -o "$work/stress"
    # shellcheck disable=SC2086
    TSAN_OPTIONS=halt_on_error=1 $fixed "$work/stress" "$work" "$seconds" "$seed"
done
