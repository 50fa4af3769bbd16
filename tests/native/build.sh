#!/bin/sh
# Build one target of CMakeLists.txt and print where it is, for scripts and tests that run it.
# Usage: build.sh PRESET TARGET    (CMakePresets.json: tests, thread, address, aarch64)
set -eu
cd "$(dirname "$0")/../.."
cmake=.venv/bin/cmake
[ -x "$cmake" ] || cmake=cmake
folder=build/native/$1
mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9 # tests that run side by side need the same programs
{ "$cmake" --preset "$1" && "$cmake" --build --preset "$1" --target "$2"; } >"$folder/log" 2>&1 ||
    { cat "$folder/log" >&2; exit 1; }
find "$PWD/$folder" -maxdepth 1 -type f \( -name "$2" -o -name "$2.so" \)
