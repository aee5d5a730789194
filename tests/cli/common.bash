# SPDX-License-Identifier: Apache-2.0
#
# Shared by the command-line tests. They use bats and coreutils only, make every input themselves, and run in an empty
# folder of their own, so that "nothing was left behind" can be checked by listing it.
bats_require_minimum_version 1.5.0

KVQ_BUILD=${KVQ_BUILD:-$BATS_TEST_DIRNAME/../../build}
PATH=$KVQ_BUILD/bin:$KVQ_BUILD/tests:$PATH
SOURCE=$BATS_TEST_DIRNAME/../..
PROGRAMS="kvq-bench kvq-calibrate kvq-capture kvq-export kvq-inspect kvq-merge kvq-validate"

# A window length and sample count that keep a run at a fraction of a second.
SMALL="--samples 4 --seq-len 32 --threads 1"

# Shows what happened when an assertion fails.
show() {
  echo "exit code: $status"
  echo "stdout: $output"
  echo "stderr: $stderr"
}

# contains TEXT FRAGMENT...
contains() {
  local text=$1 fragment
  shift
  for fragment in "$@"; do
    [[ $text == *"$fragment"* ]] || {
      echo "'$fragment' is not in: $text"
      return 1
    }
  done
}

# fails CODE COMMAND... then the fragments of its error in $FRAGMENTS: the exit code is right, the three lines of an
# error are there, stdout is empty, and no file or folder is left that was not there before.
fails() {
  local code=$1 before after
  shift
  before=$(ls -A)
  run --separate-stderr "$@"
  show
  [ "$status" -eq "$code" ]
  [ -z "$output" ]
  contains "$stderr" "error KVQ-E" "  why:  " "  next: "
  after=$(ls -A)
  [ "$before" = "$after" ] || {
    echo "left behind: $after"
    return 1
  }
}

# succeeds COMMAND...
succeeds() {
  run --separate-stderr "$@"
  show
  [ "$status" -eq 0 ]
}

# json PATH...: a value of the JSON document in $output.
json() { kvq_json_tool "$@" <<<"$output"; }

# A text with some variety: English number words with line numbers. words LINES [FIRST]
words() {
  local i names=(zero one two three four five six seven eight nine)
  for ((i = ${2:-0}; i < ${2:-0} + $1; i++)); do
    echo "Line $i says ${names[i % 10]}, then ${names[i * 7 % 10]}; the ${names[i * 3 % 10]}th word is ${names[i * i % 10]}."
  done
}

# bytes N VALUE...: little-endian integers of N bytes.
bytes() {
  local n=$1 value k text=
  shift
  for value in "$@"; do
    for ((k = 0; k < n; k++)); do text+=$(printf '\\x%02x' $((value >> 8 * k & 255))); done
  done
  printf "$text"
}

# npy_ids FILE ID...: a one-dimensional int32 .npy file (format 1.0: magic, length of the header, header padded to 64).
npy_ids() {
  local file=$1 header
  shift
  header="{'descr': '<i4', 'fortran_order': False, 'shape': ($#,), }"
  {
    printf '\x93NUMPY\x01\x00'
    bytes 2 118
    printf '%-117s\n' "$header"
    bytes 4 "$@"
  } >"$file"
}

# overwrite FILE OFFSET: bytes from standard input.
overwrite() { dd of="$1" bs=1 seek="$2" conv=notrunc status=none; }

setup() {
  mkdir -p "$BATS_TEST_TMPDIR/work"
  cd "$BATS_TEST_TMPDIR/work" || return 1
}
