#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The suites of device code on a device: builds them for it, runs them, and runs them again under the tools of
# compute-sanitizer. Needs the CUDA toolkit and a C compiler, no other library. Ends with 1 when something failed; what
# could not run is skipped and said to be.
#
#     tests/device/run.sh [--build-only] [--out FILE]
#
# --build-only  compiles and links all suites, for sm_90 where there is no device
# --out         writes the table to a file as well, as Markdown
#
# KVQ_DEVICE_BUILD  where to build (build/device)
# KVQ_DEVICE_LOOPS  rounds of a looped case under compute-sanitizer, which is slow (4)
# shellcheck disable=SC2086,SC2089,SC2090 # $reference, $includes and $..._flags are lists, in commands for sh -c
set -eu
caller=$(pwd)
cd "$(dirname "$0")/../.."

# A suite is tests/<suite>.cpp, or in tests/device. Behind its name: its sources in kernels/cuda, and options that all of
# them are compiled with.
suites='
test_cuda_attention         attention.cu attention_launch.cu rope.cu
test_cuda_attention_window  attention_window.cu
test_cuda_attention_step    attention_step.cu -DKVQ_CUDA_MAX_BLOCKS=3
test_cuda_count             count.cu
test_cuda_experts           experts.cu -DKVQ_CUDA_MAX_BLOCKS=3
test_cuda_ops               row_ops.cu loss.cu linear.cu -DKVQ_CUDA_MAX_BLOCKS=3
test_cuda_rows              rows.cu codec_spec.cpp
test_cuda_tiles             tiles.cu tile_outliers.cu codec_spec.cpp
test_device_memory
'
# What they are compared with, and what they share. Nothing of it needs a library; the linker takes what a suite uses.
reference='core/context.c core/finite.c core/fixed.c core/parallel.c core/rng.c core/status.c
  kernels/*_cpu.c kernels/backend.c kernels/backend_no_cuda.c codebook/accumulate.c codebook/artifact.c codebook/count.c
  codebook/histogram.c codebook/measured.c codebook/packed.c codebook/rotation.c codebook/tails.c decoder/packed_*.c
  tests/kvq_test.c tests/attention_rig.c tests/device/libraries.c tests/device/check.cpp tests/device/simt.cpp'

# The folder of stand-ins comes first: theirs are <check.h>, "simt.h" and <lapacke.h>.
includes='-Itests/device -Itests -Icore -Ikernels -Ikernels/cuda -Icodebook -Iio -Idatasets -Imodel -Idecoder'
c_flags="-std=c11 -O2 -ffp-contract=off -fno-math-errno -fopenmp -fexceptions -D_XOPEN_SOURCE=700 -DKVQ_MATMUL_PLAIN=1
  -DKVQ_TEST_SOURCE_DIR='\".\"'"
cuda_flags='-std=c++17 -O3 -fmad=false -Xcompiler -ffp-contract=off,-fno-math-errno'

fail() {
  echo "run.sh: $*" >&2
  exit 1
}

# ---------------------------------------------------------------- what there is

# The first of some files that can be run; nothing when there is none.
first_program() {
  for path in "$@"; do
    if [ -f "$path" ] && [ -x "$path" ]; then
      echo "$path"
      return
    fi
  done
}

find_nvcc() { first_program "${CUDA_HOME:-}/bin/nvcc" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc; }

find_sanitizer() {
  first_program "$(command -v compute-sanitizer)" "${nvcc%/*}/compute-sanitizer" \
    "${nvcc%/*}/../compute-sanitizer/compute-sanitizer"
}

# "name, driver, compute capability" of the device that a program gets; nothing without one.
find_device() {
  nvidia-smi -i "${CUDA_VISIBLE_DEVICES:-0}" --query-gpu=name,driver_version,compute_cap --format=csv,noheader \
    2>/dev/null | grep '[0-9]\.[0-9]' | head -n 1
}

names() { echo "$suites" | awk 'NF { print $1 }'; }
sources_of() {
  echo "$suites" |
    awk -v suite="$1" '$1 == suite { for (i = 2; i <= NF; i++) if ($i !~ /^-/) print "kernels/cuda/" $i }'
  if [ -f "tests/$1.cpp" ]; then echo "tests/$1.cpp"; else echo "tests/device/$1.cpp"; fi
}
options_of() {
  echo "$suites" | awk -v suite="$1" '$1 == suite { for (i = 2; i <= NF; i++) if ($i ~ /^-/) printf "%s ", $i }'
}

# ---------------------------------------------------------------- build

# A source has an object for each set of options.
object_of() { echo "$build/$(echo "$1 ${2:-}" | sed 's/ *$//; s/[^A-Za-z0-9_.]/-/g').o"; }

# The command that compiles a source; a suite with a kernel in it is CUDA as well.
compile() {
  kind=
  if grep -q '^KVQ_KERNEL' "$1"; then kind='-x cu'; fi
  case $1 in
    *.c) echo ${CC:-cc} $c_flags $includes -c "$1" -o "'$(object_of "$1")'" ;;
    *) echo "'$nvcc'" $cuda_flags -arch="$architecture" ${2:-} $includes $kind -c "$1" -o "'$(object_of "$1" "${2:-}")'" ;;
  esac
}

compile_all() {
  for suite in $(names); do
    for source in $(sources_of "$suite"); do compile "$source" "$(options_of "$suite")"; done
  done | awk '!seen[$0]++' # two suites may share a source
  for source in $reference; do compile "$source"; done
}

link() {
  objects=
  for source in $(sources_of "$1"); do objects="$objects '$(object_of "$source" "$(options_of "$1")")'"; done
  echo "'$nvcc'" -arch="$architecture" -o "'$build/$1'" "$objects" "'$build/reference.a'" -Xcompiler -fopenmp -lm
}

# Runs commands, one of a line, on all processors.
run_lines() { tr '\n' '\0' | xargs -0 -n 1 -P "$(getconf _NPROCESSORS_ONLN)" sh -c; }

build_all() {
  mkdir -p "$build"
  rm -f "$build/reference.a"
  compile_all | run_lines || return 1
  for source in $reference; do object_of "$source"; done | tr '\n' '\0' | xargs -0 ar rcs "$build/reference.a" ||
    return 1
  for suite in $(names); do link "$suite"; done | run_lines
}

# ---------------------------------------------------------------- runs

# Runs a suite as it is: "passed failed skipped seconds".
run_suite() {
  log=$build/$1.log
  start=$(date +%s)
  CK_FORK='' KVQ_DEVICE_GUARDS='' KVQ_DEVICE_LOOPS='' "$build/$1" >"$log" 2>&1 || true # whatever the caller has set
  awk -v suite="$1" -v seconds=$(($(date +%s) - start)) '
    $1 == suite ":" && $NF == "skipped" { passed = $(NF - 5); failed = $(NF - 3); skipped = $(NF - 1); found = 1 }
    END { print passed + 0, found ? failed : failed + 1, skipped + 0, seconds }' "$log"
}

# Runs a suite under a tool. Everything is in one process for it, and its ends of buffers are the real ones.
run_tool() {
  log=$build/$1.$2.log
  status=0
  CK_FORK=no KVQ_DEVICE_GUARDS=no KVQ_DEVICE_LOOPS=${KVQ_DEVICE_LOOPS:-4} \
    "$sanitizer" --tool "$2" --error-exitcode 9 "$build/$1" >"$log" 2>&1 || status=$?
  case $status in
    0) echo "clean" ;;
    9) echo "FINDINGS" ;;
    *) echo "FAILED" ;;
  esac
}

row() { printf '| %-26s | %6s | %6s | %7s | %7s | %-9s | %-9s |\n' "$@"; }

head_of_table() {
  row suite passed failed skipped seconds memcheck racecheck
  row -------------------------- ------ ------ ------- ------- --------- ---------
}

table_of_skipped() {
  head_of_table
  for suite in $(names); do row "$suite" - - all - skipped skipped; done
}

table() {
  head_of_table
  for suite in $(names); do
    results=$(run_suite "$suite")
    for tool in memcheck racecheck; do
      if [ -n "$sanitizer" ]; then results="$results $(run_tool "$suite" $tool)"; else results="$results skipped"; fi
    done
    row "$suite" $results
  done
}

# The last line; a suite under a tool counts as one. Ends with 1 when something failed.
totals() {
  awk -F '|' '
    NR > 2 {
      passed += $3; failed += $4; skipped += $5 ~ /all/ ? 1 : $5
      for (i = 7; i <= 8; i++) { passed += $i ~ /clean/; failed += $i ~ /F/; skipped += $i ~ /skipped/ }
    }
    END { printf "device suites: %d passed, %d failed, %d skipped\n", passed, failed, skipped; exit failed > 0 }' "$1"
}

# What the logs say about rows that are not clean.
show_failures() {
  awk -F '|' 'NR > 2 { gsub(/ /, ""); if ($4 > 0) print $2 ".log"; if ($7 ~ /^F/) print $2 ".memcheck.log"
    if ($8 ~ /^F/) print $2 ".racecheck.log" }' "$1" | while read -r log; do
    printf '\n%s:\n' "$log"
    grep -v '^skipped: ' "$build/$log" | head -n 60
  done
}

report() {
  echo "$about"
  echo
  "$@" | tee "$build/table"
}

# ---------------------------------------------------------------- what was asked for

build_only='' out=''
while [ $# -gt 0 ]; do
  case $1 in
    --build-only) build_only=yes ;;
    --out)
      [ $# -gt 1 ] || fail "--out needs a file"
      out=$2
      shift
      ;;
    *) fail "unknown argument $1 (--build-only, --out FILE)" ;;
  esac
  shift
done
build=${KVQ_DEVICE_BUILD:-$PWD/build/device}
case $build in /*) ;; *) build=$caller/$build ;; esac
case $out in '') out=/dev/null ;; /*) ;; *) out=$caller/$out ;; esac
mkdir -p "$build"

nvcc=$(find_nvcc)
device=$(find_device) || device=
missing=
if [ -z "$device" ]; then missing='there is no device (nvidia-smi)'; fi
if [ -z "$nvcc" ]; then missing='there is no nvcc (CUDA_HOME, PATH, /usr/local/cuda)'; fi
architecture=sm_$(echo "${device:-9.0}" | sed 's/.*, *//; s/\.//')

if [ -n "$build_only" ] && [ -z "$nvcc" ]; then
  echo "device suites: not built, $missing"
  exit 0
elif [ -n "$build_only" ]; then
  build_all || fail "the suites do not build for $architecture"
  echo "device suites: $(names | wc -l) built for $architecture"
  exit 0
elif [ -n "$missing" ]; then
  about="skipped: $missing"
  report table_of_skipped | tee "$out"
else
  release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
  about="$device (name, driver, compute capability); CUDA $release; $(date -u '+%Y-%m-%d')"
  sanitizer=$(find_sanitizer)
  build_all || fail "the suites do not build for $architecture"
  report table | tee "$out"
  show_failures "$build/table"
fi
totals "$build/table"
