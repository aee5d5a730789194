#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every public header compiles alone, as C11, as C17 and (where a C++ compiler is installed) as C++17.
# shellcheck disable=SC2086 # $includes is a list of options
set -u
cd "$(dirname "$0")/.." || exit 1
includes=
for folder in core kernels kernels/cuda codebook io datasets model fisher calib decoder; do includes="$includes -I$folder"; done
passed=0 failed=0 skipped=0
for header in */kvq_*.h kernels/cuda/kvq_*.h; do
  case $header in tests/* | cli/*) continue ;; esac
  for language in c11 c17 c++17; do
    compiler=cc kind=c
    case $language in c++*) compiler=c++ kind=c++ ;; esac
    if ! command -v $compiler >/dev/null; then
      skipped=$((skipped + 1))
    elif echo "#include \"${header##*/}\"" | $compiler -x $kind -std=$language -D_POSIX_C_SOURCE=200809L -Wall -Wextra -Werror -Wno-unused-function $includes -fsyntax-only -; then
      passed=$((passed + 1))
    else
      echo "$header does not compile alone as $language"
      failed=$((failed + 1))
    fi
  done
done
echo "headers: $passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
