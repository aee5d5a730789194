#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Device code as nvcc sees it, without a device: it compiles for every architecture without a warning, keeps everything
# in registers (no stack, no spills), and computes no f64, sine or cosine.
#
#     check_device_code.sh <repository> <source> ...
set -u
root=$1
shift
nvcc=$(command -v nvcc) || { echo "nvcc not found"; exit 77; }
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
failed=0

fail() {
    echo "$1"
    failed=1
}

for source in "$@"; do
    for arch in 80 86 89 90; do
        what="$source, sm_$arch"
        "$nvcc" -std=c++17 -O3 -fmad=false -Werror all-warnings -Xptxas -v -arch=sm_$arch --keep --keep-dir "$folder" \
            -I"$root/kernels" -I"$root/kernels/cuda" -I"$root/core" -c "$root/$source" -o "$folder/object" \
            2>"$folder/log" || { cat "$folder/log"; fail "$what: does not compile"; continue; }
        # What is not 0 of "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads".
        grep -E 'stack frame' "$folder/log" | grep -vq '^ *0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads' &&
            fail "$what: uses the stack"
        grep -hE '\.f64|\.local|(sin|cos)\.approx' "$folder"/*.ptx && fail "$what: the lines above"
        echo "$what: registers" $(grep -oE 'Used [0-9]+' "$folder/log" | sed 's/Used //' | sort -nu)
        rm -f "$folder"/*
    done
done
exit $failed
