# SPDX-License-Identifier: Apache-2.0
# The programs with --device cuda, on the emulated device of tests/simt: the same sources, linked with the CUDA backend.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
  words 20 5000 >"$SHARED_DIR/held.txt"
  kvq-calibrate -q --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o "$SHARED_DIR/rows.kvq.h5"
  kvq-calibrate -q --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL --target-bits 4 --kl-tokens 0 \
    -o "$SHARED_DIR/tiles.kvq.h5"
}

# on_gpu PROGRAM ARGUMENT...
on_gpu() {
  local program=$1
  shift
  "$KVQ_BUILD/emulated/$program" --model "$SHARED_DIR/model" "$@"
}

calibrate() { on_gpu kvq-calibrate --text "$SHARED_DIR/text.txt" $SMALL --device cuda "$@"; }

# near A B SHARE: two numbers differ by less than a share of the second.
near() {
  awk -v a="$1" -v b="$2" -v s="$3" 'BEGIN { d = a - b; exit !((d < 0 ? -d : d) <= s * (b < 0 ? -b : b)) }' || {
    echo "$1 is not near $2"
    return 1
  }
}

# hash FILE: of an artifact's content.
hash() { kvq-inspect "$1" | sed -n 's/.*content sha256 \([0-9a-f]*\).*/\1/p'; }

@test "a calibration is the same on every run, whatever the order of threads" {
  succeeds calibrate -o a.kvq.h5
  contains "$stderr" "cuda:0, emulated device" "of the device's, for weights, activations and counters"
  KVQ_SIMT_SEED=77 succeeds calibrate --threads 2 -o b.kvq.h5
  [ "$(hash a.kvq.h5)" = "$(hash b.kvq.h5)" ]
  succeeds kvq-inspect a.kvq.h5
  contains "$output" "the processor's products on sm_00"
  # rounding apart it is the CPU's
  near "$(sed -n 's/^baseline *\([0-9.]*\) nats.*/\1/p' <<<"$output")" \
    "$(kvq-inspect "$SHARED_DIR/rows.kvq.h5" | sed -n 's/^baseline *\([0-9.]*\) nats.*/\1/p')" 1e-6
}

@test "a plan, with the time of two windows, writes nothing" {
  succeeds calibrate --dry-run -o a.kvq.h5
  contains "$stderr" "would write" "cuda:0"
  [ -z "$(ls -A)" ]
}

@test "perplexity is that of the CPU, both formats and protocols" {
  for format in rows tiles; do
    for protocol in prefill decode; do
      common="--artifact $SHARED_DIR/$format.kvq.h5 --text $SHARED_DIR/held.txt --protocol $protocol --json"
      succeeds on_gpu kvq-validate $common --device cuda
      gpu=$output
      [ "$(json device name)" = "cuda:0, emulated device" ]
      succeeds kvq-validate --model "$SHARED_DIR/model" $common --device cpu
      [ "$(json device name)" = "this processor" ]
      cpu=$output
      for side in baseline quantized; do
        near "$(kvq_json_tool $side nll mean <<<"$gpu")" "$(kvq_json_tool $side nll mean <<<"$cpu")" 1e-4
      done
      near "$(kvq_json_tool kld mean <<<"$gpu")" "$(kvq_json_tool kld mean <<<"$cpu")" 0.02
    done
  done
}

@test "a model's own text, a capture, and a fit by measured KL" {
  succeeds on_gpu kvq-calibrate --text self $SMALL --samples 2 --device cuda -o self.kvq.h5
  succeeds on_gpu kvq-capture --text "$SHARED_DIR/text.txt" --samples 2 --seq-len 32 --with-query --with-fisher \
    --device cuda -o c.kvqc.h5
  succeeds kvq-calibrate --capture c.kvqc.h5 -o fitted.kvq.h5
  succeeds calibrate --samples 2 --target-bits 4 --kl-tokens 64 --held-out 1 -o tiles.kvq.h5
}

@test "a run that a device ends goes on with the same bytes" {
  calibrate -q -o whole.kvq.h5
  KVQ_SIMT_CALLS=1000 run --separate-stderr calibrate -o a.kvq.h5
  show
  [ "$status" -eq 70 ]
  contains "$stderr" "cuda:0, emulated device" "it stopped working"
  [ ! -e a.kvq.h5 ]
  [ -d a.kvq.h5.work ]
  succeeds calibrate -o a.kvq.h5
  contains "$stderr" "continu"
  cmp a.kvq.h5 whole.kvq.h5
}

@test "another device does not continue what one has begun" {
  KVQ_SIMT_CALLS=1000 run calibrate -o a.kvq.h5
  run --separate-stderr kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o a.kvq.h5
  show
  [ "$status" -eq 3 ]
  contains "$stderr" "belongs to another run" "matrix_products"
}

@test "a device that is too small, or that there is not" {
  KVQ_SIMT_MEMORY=100000 fails 6 calibrate -o a.kvq.h5
  contains "$stderr" "cuda:0, emulated device has" "--device cpu"
  KVQ_SIMT_MEMORY=300000 fails 6 on_gpu kvq-validate --text "$SHARED_DIR/held.txt" --seq-len 32 --device cuda
  fails 3 calibrate --device cuda:1 -o a.kvq.h5
  contains "$stderr" "--device cuda:1" "there is 1"
}

@test "a model larger than the device is calibrated, and with the same bytes" {
  kvq_make_model_tool big --layers 12 --hidden 256 --ffn 768
  common="--model big --text $SHARED_DIR/text.txt --samples 2 --seq-len 32 --threads 1 --device cuda --bos never"
  succeeds "$KVQ_BUILD/emulated/kvq-calibrate" $common -o whole.kvq.h5
  needs=$(sed -n 's/^ *and \([0-9.]*\) MiB of the device.*/\1/p' <<<"$stderr")
  memory=$(awk -v n="$needs" 'BEGIN { printf "%d", n * 1048576 + 1000000 }') # buffers of transfers, rounding to pages
  [ "$(stat -c %s big/model.safetensors)" -gt "$((2 * memory))" ]
  KVQ_SIMT_MEMORY=$memory succeeds "$KVQ_BUILD/emulated/kvq-calibrate" $common -o a.kvq.h5
  cmp a.kvq.h5 whole.kvq.h5
}

@test "auto takes the device, and the CPU where it does not work" {
  KVQ_SIMT_CALLS=2 succeeds on_gpu kvq-validate --text "$SHARED_DIR/held.txt" --seq-len 32 --json
  contains "$stderr" "of this processor" "(no GPU: cuda:0, emulated device: it stopped working)"
  contains "$(json device fallback)" "stopped working"
  succeeds on_gpu kvq-validate --text "$SHARED_DIR/held.txt" --seq-len 32
  contains "$stderr" "cuda:0, emulated device"
  succeeds on_gpu kvq-validate --text "$SHARED_DIR/held.txt" --seq-len 32 --device cpu
  contains "$stderr" "threads of this processor"
}
