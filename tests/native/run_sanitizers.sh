#!/bin/sh
# Run the stress tests of store and arena under the thread sanitizer, and under the address and undefined
# behaviour sanitizers; under these the operators on hostile graphs, too. Usage: run_sanitizers.sh [SECONDS_EACH] [SEED]
set -eu
build=$(dirname "$0")/build.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Where a container lets us, without address randomisation: gcc's thread sanitizer knows only the
# usual memory layouts.
fixed=""
if setarch -R true 2>/dev/null; then fixed="setarch -R"; fi

for preset in thread address; do
    echo "== $preset"
    stress=$("$build" $preset store_stress)
    # shellcheck disable=SC2086
    TSAN_OPTIONS=halt_on_error=1 $fixed "$stress" "$work" "${1:-10}" "${2:-1}"
    stress=$("$build" $preset arena_stress)
    # shellcheck disable=SC2086
    TSAN_OPTIONS=halt_on_error=1 $fixed "$stress" "${1:-10}" "${2:-1}"
done
"$("$build" address operators_fuzz)" "$work" "${1:-10}000" "${2:-1}"
