#!/bin/sh
# Make an arm64 Debian with Python and the packages that its tests need, to run under qemu-user:
#   root          the system; nothing in it is executed to make it
#   ort-newest    NumPy, onnxruntime, psutil and PyYAML: the newest
#   ort-oldest    the oldest onnxruntime that pyproject.toml admits
#   test          pytest and onnx
#   NAME          our wheel: bapq, unless another name is given
#   PACKAGE       each further one, without what it depends on
#   cpuinfo-*     what /proc/cpuinfo shows on a board with that CPU
# Everything but our wheel is left as it is when it is there; remove DIRECTORY for newer packages.
# Usage: make_arm64.sh DIRECTORY PYTHON WHEEL [NAME [PACKAGE...]], relative to the working directory
set -eu
directory=$1 python=$2 wheel=$3 name=${4:-bapq}
shift $(($# < 4 ? $# : 4))
for tool in mmdebstrap qemu-aarch64-static aarch64-linux-gnu-gcc; do
    if ! command -v $tool >/dev/null; then
        echo "$tool is not there: apt install mmdebstrap qemu-user-static gcc-aarch64-linux-gnu" \
             "libc6-dev-arm64-cross" >&2
        exit 1
    fi
done
mkdir -p "$directory"
cd "$directory"
python=$OLDPWD/$python wheel=$OLDPWD/$wheel

# make NAME COMMAND...: NAME appears only when it is complete; COMMAND writes NAME.part.
make_once() {
    made=$1
    shift
    if [ ! -e "$made" ]; then
        rm -rf "$made.part"
        "$@"
        mv "$made.part" "$made"
    fi
}

packages() {
    target=$1
    shift
    "$python" -m pip --disable-pip-version-check --quiet install --target "$target" \
        --only-binary=:all: --implementation cp --python-version 3.11 \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux2014_aarch64 "$@"
}

cpuinfo() { # PART FEATURES
    for processor in 0 1 2 3; do
        printf '%s\t: %s\n' processor $processor BogoMIPS 108.00 Features "$2" \
            'CPU implementer' 0x41 'CPU architecture' 8 'CPU variant' 0x0 'CPU part' "$1" \
            'CPU revision' 3
        echo
    done
}

make_once root mmdebstrap --quiet --architectures=arm64 --variant=extract \
    --include=python3.11-minimal,libpython3.11-stdlib,libstdc++6,libgcc-s1,libgomp1,zlib1g \
    bookworm root.part
make_once ort-newest packages ort-newest.part numpy onnxruntime psutil pyyaml
make_once ort-oldest packages ort-oldest.part 'numpy<2' onnxruntime==1.17.3 psutil pyyaml
make_once test packages test.part --no-deps pytest pluggy iniconfig pygments onnx ml_dtypes \
    typing_extensions

v80="fp asimd evtstrm crc32 cpuid"
cpuinfo 0xd03 "$v80" >cpuinfo-cortex-a53
cpuinfo 0xd08 "$v80" >cpuinfo-cortex-a72
cpuinfo 0xd0b "$v80 aes pmull sha1 sha2 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp" \
    >cpuinfo-cortex-a76

rm -rf "$name"
packages "$name" --no-deps "$wheel"

for package in "$@"; do
    make_once "$package" packages "$package.part" --no-deps "$package"
done
