#!/usr/bin/env bash
# Builds mmcv's wheel, ops included, unless the folder has it: build_mmcv.sh VERSION FOLDER
# Uses the `python` on PATH, which needs torch, ninja, wheel and setuptools below 81, and a C++ compiler.
set -euo pipefail

version=$1
folder=$2

if compgen -G "$folder/mmcv-$version-*.whl" > /dev/null; then
    exit 0
fi
if ! command -v "${CXX:-c++}" > /dev/null; then
    echo "expected a C++ compiler to build mmcv $version, but found no ${CXX:-c++}" >&2
    exit 1
fi

mkdir -p "$folder"
build=$(mktemp -d "$folder/.build-XXXXXX")
trap 'rm -rf "$build"' EXIT

echo "Building mmcv $version with its ops into $folder: 9 to 15 minutes on two cores, once"
# Ops for the CPU, whatever GPU this machine has: the wheel is to serve every checkout.
# -g0: debug symbols would only make the compiler slower and the wheel larger.
if ! env -u FORCE_CUDA CUDA_VISIBLE_DEVICES= MMCV_WITH_OPS=1 MAX_JOBS="${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}" \
    CFLAGS="${CFLAGS:-} -g0" python -m pip wheel -q --no-deps --no-build-isolation --no-binary=mmcv \
    -w "$build" "mmcv==$version" > "$build/log" 2>&1; then
    tail -n 40 "$build/log" >&2
    echo "mmcv $version did not build: the end of the compiler's log stands above" >&2
    exit 1
fi
# Renamed only when complete: a second set-up at the same time never sees half a wheel
mv "$build"/mmcv-*.whl "$folder/"
