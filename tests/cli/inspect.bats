# SPDX-License-Identifier: Apache-2.0
#
# kvq-inspect on every kind of file. The files are the samples of the suites, whose numbers are known.
load common

setup() {
  mkdir -p "$BATS_TEST_TMPDIR/work"
  cd "$BATS_TEST_TMPDIR/work" || return 1
  test_artifact --write-sample a.kvq.h5 >a.sha256
  test_measurement --write-sample m.kvqm.h5 >m.sha256
}

@test "an artifact's tables show fits, held-out errors and settings" {
  succeeds kvq-inspect a.kvq.h5
  contains "$output" "keys post_rope" "ranges of K per channel by thresholds of the matrix, sink tokens included" \
    "sink tokens 5  recent tokens 128" "weighted error  binning bound" "Lloyd reaches" "SQNR dB" "clipped" "outliers" \
    "entropy bits" "int-clamped" "held-out tokens" "attention error"
  [ "$(grep -c '^ *[0-9]*  [KV] ' <<<"$output")" -eq 12 ] # three layers, two tables
  contains "$stderr" "next: kvq-validate"
}

@test "a layer and a tensor can be singled out, and their levels printed" {
  succeeds kvq-inspect a.kvq.h5 --layer 2 --tensor v
  [ "$(grep -c '^ *[0-9]*  [KV] ' <<<"$output")" -eq 2 ]
  succeeds kvq-inspect a.kvq.h5 --layer 2 --tensor v --codebook
  contains "$output" "layer 2  V  nf  table 1 of 2" "table 2 of 2" "decodes to"
  [ "$(grep -c '^ *[0-3]  ' <<<"$output")" -eq 8 ]
  [[ $output != *"artifact "* ]]
  succeeds kvq-inspect a.kvq.h5 --layer 0 --tensor k --codebook
  [ "$(grep -c '^ *[0-9]*  ' <<<"$output")" -eq 17 ] # 16 levels below a head
  [[ $output != *"decodes to"* ]]
}

@test "the JSON of an artifact has all of it" {
  succeeds kvq-inspect a.kvq.h5 --json
  [ "$(json schema)" = kvq.inspect/1 ]
  [ "$(json layers)" = 3 ]
  [ "$(json quantizer recent_tokens)" = 128 ]
  [ "$(json quantizer threshold_scope)" = matrix ]
  [ "$(json quantizer sinks_counted)" = true ]
  [ "$(json quantizer weighting)" = range ]
  [ "$(json layers 2 attention_error)" = 2.125 ]
  [ "$(json layers 2 k datatype)" = int-clamped ]
  [ "$(json layers 2 k axis)" = token ]
  [ "$(json layers 2 k domain)" = post_rope ]
  [ "$(json layers 2 k lower)" = null ]
  [ "$(json layers 2 v groups)" = 2 ]
  [ "$(json layers 2 v codebook)" = 8 ]
  [ "$(json layers 2 v decode_levels)" = 8 ]
  [ "$(json layers 0 k decode_levels)" = null ]
  [ "$(json layers 0 k clipped)" = 7 ]
  [ "$(json layers 0 k energy)" = 5.5 ]
  [ "$(json layers 0 v heldout tokens)" = 105 ]
  [ "$(json layers 0 v heldout clipped_share)" = 0.015625 ]
  succeeds kvq-inspect a.kvq.h5 --json --layer 1
  [ "$(json layers)" = 1 ]
  [ "$(json layers 0 layer)" = 1 ]
}

@test "an artifact of format 1.0 is shown, and what it does not say is not made up" {
  succeeds kvq-inspect "$SOURCE/tests/data/format-1.0.kvq.h5"
  contains "$output" "recent tokens 0" "keys pre_rope" "nuq"
  [[ $output != *"held-out"* ]]
  succeeds kvq-inspect "$SOURCE/tests/data/format-1.0.kvq.h5" --json
  [ "$(json layers 0 k nmse)" = null ]
  [ "$(json layers 0 k entropy_bits)" = null ]
  [ "$(json layers 0 attention_error)" = null ]
  [ "$(json layers 0 k datatype)" = nuq ]
}

@test "a measurement shows what was measured, samples and ranks" {
  succeeds kvq-inspect m.kvqm.h5
  contains "$output" "$(cat m.sha256)" "outliers 0% (K 0, V 0 per side and token), 1% (K 5, V 1 per side and token)" \
    "weightings none fisher fisher-scaled range" "keys post_rope" "second moments yes" "outliers 0%, weighting fisher-scaled" \
    "effective samples" "effective rank of heads" " of 6"
  [ "$(grep -c '^ *[0-9]*  [QKV] ' <<<"$output")" -eq 6 ]
  contains "$stderr" "next: kvq-calibrate --from m.kvqm.h5"
  succeeds kvq-inspect m.kvqm.h5 --fraction 1% --layer 1 --tensor q --spectrum
  contains "$output" "outliers 1%" "eigenvalues of head 3:"
  [ "$(grep -c '^ *[0-9]*  [QKV] ' <<<"$output")" -eq 1 ]
}

@test "the JSON of a measurement has all of it" {
  succeeds kvq-inspect m.kvqm.h5 --json --spectrum
  [ "$(json schema)" = kvq.inspect-measurement/1 ]
  [ "$(json sha256)" = "$(cat m.sha256)" ]
  [ "$(json measured fractions 1)" = 0.01 ]
  [ "$(json measured weightings)" = 4 ]
  [ "$(json measured token_range)" = percentiles ]
  [ "$(json measured k_slots)" = -1 ]
  [ "$(json layers)" = 2 ]
  [ "$(json layers 1 v fractions)" = 2 ]
  [ "$(json layers 1 q effective_rank)" = 4 ]
  [ "$(json layers 1 q spectrum)" = 4 ]
  [ "$(json layers 1 k spectrum 1)" = 6 ]
  [[ $(json layers 1 v fractions 1 effective_samples fisher-scaled) =~ ^[0-9] ]]
  succeeds kvq-inspect m.kvqm.h5 --json
  run ! kvq_json_tool layers 1 q spectrum <<<"$output"
}

@test "--check reads every layer of a measurement and finds damage" {
  succeeds kvq-inspect m.kvqm.h5 --check
  [ "$output" = "ok  sha256 $(cat m.sha256)" ]
  printf 'x' | overwrite m.kvqm.h5 100000
  fails 4 kvq-inspect m.kvqm.h5 --check
  contains "$stderr" "KVQ-E4001" "m.kvqm.h5"
}

@test "options that belong to another kind of file are refused" {
  fails 2 kvq-inspect a.kvq.h5 --spectrum
  contains "$stderr" "--spectrum is about a measurement"
  fails 2 kvq-inspect a.kvq.h5 --tensor q
  fails 2 kvq-inspect a.kvq.h5 --fraction 1%
  fails 2 kvq-inspect m.kvqm.h5 --codebook
  contains "$stderr" "--codebook is about an artifact"
  fails 2 kvq-inspect m.kvqm.h5 --fraction 2%
  contains "$stderr" "was not measured"
  fails 2 kvq-inspect a.kvq.h5 --layer 3
  contains "$stderr" "3 layers, counted from 0"
  fails 2 kvq-inspect m.kvqm.h5 --layer 2
}

@test "other kinds of files are named, with the program that reads them" {
  test_capture --write-sample c.kvqc.h5 >/dev/null
  fails 3 kvq-inspect c.kvqc.h5
  contains "$stderr" "'kvq.capture' instead of 'kvq.artifact'" "kvq-calibrate --capture"
  echo text >t.kvq.h5
  fails 3 kvq-inspect t.kvq.h5
  contains "$stderr" "not an HDF5 file"
  head -c 5000 a.kvq.h5 >short.kvq.h5
  fails 4 kvq-inspect short.kvq.h5
}
