# SPDX-License-Identifier: Apache-2.0
# What must not be used: each input is refused with its exit code, a message that names it, and nothing left behind.
load common

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 300 >"$SHARED_DIR/text.txt"
  kvq-calibrate -q --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o "$SHARED_DIR/a.kvq.h5"
}

# A copy of the model to damage.
copy_model() { cp -r "$SHARED_DIR/model" model; }

# The model in ./model is refused: refused CODE FRAGMENT...
refused() {
  local code=$1
  shift
  fails "$code" kvq-calibrate --model model --text "$SHARED_DIR/text.txt" $SMALL -o out.kvq.h5
  contains "$stderr" "$@"
}

# header FILE: the JSON part of a safetensors file, which starts with its length in 8 bytes.
header_bytes() { od -An -tu8 -N8 "$1" | tr -d ' '; }
header() { head -c $((8 + $(header_bytes "$1"))) "$1" | tail -c +9; }

# edit_header FILE SED: offsets in a header count from its end, so it may change its length.
edit_header() {
  local n
  n=$(header_bytes "$1")
  header "$1" | sed "$2" >header.json
  tail -c +$((9 + n)) "$1" >data
  { bytes 8 "$(wc -c <header.json)" && cat header.json data; } >"$1"
  rm header.json data
}

# tensor_offset FILE NAME: where its bytes begin in the file.
tensor_offset() { echo $((8 + $(header_bytes "$1") + $(header "$1" | kvq_json_tool "$2" data_offsets 0))); }

@test "config.json is missing" {
  copy_model
  rm model/config.json
  refused 3 "config.json"
}

@test "the weights are missing" {
  copy_model
  rm model/*.safetensors
  refused 3 "safetensors"
}

@test "an empty folder, and a file that is no model" {
  mkdir model
  refused 3 "model"
  rmdir model
  words 5 >model
  refused 3 "model"
}

@test "config.json is no JSON" {
  copy_model
  truncate -s 20 model/config.json
  refused 4 "config.json"
}

@test "an unsupported architecture is named" {
  kvq_make_model_tool model --config '{"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}'
  refused 3 "KVQ-E3003" "hisper"
}

@test "an unsupported rope type is named" {
  kvq_make_model_tool model --rope '{"rope_type": "dynamic", "factor": 2.0}'
  refused 3 "KVQ-E3003" "dynamic"
}

@test "truncated weights" {
  copy_model
  truncate -s -100 model/model.safetensors
  refused 4 "model.safetensors"
}

@test "a safetensors header longer than its file" {
  copy_model
  bytes 8 99999999 | overwrite model/model.safetensors 0
  refused 4 "model.safetensors" "99999999"
}

@test "tensors that overlap" {
  copy_model
  start=$(header model/model.safetensors | kvq_json_tool model.layers.0.self_attn.k_proj.weight data_offsets 0)
  edit_header model/model.safetensors "s/\"data_offsets\": *\[$start,/\"data_offsets\":[$((start - 4)),/"
  refused 4 "model.safetensors"
}

@test "a tensor of another shape than the configuration implies" {
  copy_model
  sed -i 's/\("num_key_value_heads":[[:space:]]*\)[0-9]*/\11/' model/config.json
  refused 3 "k_proj"
}

@test "a tensor of a type that is no number for us" {
  copy_model
  edit_header model/model.safetensors '0,/"F32"/s//"I32"/'
  refused 3 "I32"
}

@test "a tensor is missing" {
  copy_model
  edit_header model/model.safetensors 's/model.layers.1.self_attn.v_proj.weight/model.layers.1.self_attn.x_proj.weight/'
  refused 3 "model.layers.1.self_attn.v_proj.weight"
}

@test "NaN and Inf in weights are found and placed" {
  kvq_make_model_tool model --nan model.layers.1.self_attn.v_proj.weight
  refused 5 "model.layers.1.self_attn.v_proj.weight" "row 1" "column 2"
  rm -r model
  copy_model
  printf '\x00\x00\x80\x7f' | overwrite model/model.safetensors "$(tensor_offset model/model.safetensors model.layers.1.mlp.up_proj.weight)"
  refused 5 "model.layers.1.mlp.up_proj.weight"
}

@test "a truncated GGUF, at any length" {
  kvq_make_model_tool source --gguf model
  bytes=$(wc -c <model)
  for part in 1 2 4 8 32; do
    truncate -s $((bytes * (part * 3 - 1) / (part * 3))) model
    fails 4 kvq-calibrate --model model --text "$SHARED_DIR/text.txt" $SMALL -o out.kvq.h5
    contains "$stderr" model
    rm -r source model
    kvq_make_model_tool source --gguf model
  done
}

@test "a tokenizer without merges" {
  copy_model
  sed -i 's/"merges"/"marges"/' model/tokenizer.json
  refused 3 "tokenizer.json" "merges"
}

@test "a model without a tokenizer needs token ids" {
  copy_model
  rm model/tokenizer.json
  refused 3 "tokenizer"
  npy_ids ids.npy $(seq 0 60) $(seq 0 60)
  succeeds kvq-calibrate --model model --tokens ids.npy $SMALL -o out.kvq.h5
}

@test "a token id outside the vocabulary" {
  npy_ids ids.npy $(seq 0 60) 1000000
  fails 3 kvq-calibrate --model "$SHARED_DIR/model" --tokens ids.npy $SMALL -o out.kvq.h5
  contains "$stderr" "ids.npy" "1000000" "61"
}

@test "a file that is no .npy" {
  words 3 >ids.npy
  fails 3 kvq-validate --model "$SHARED_DIR/model" --tokens ids.npy
  contains "$stderr" "ids.npy"
}

@test "a text shorter than one window, and an empty one" {
  echo hello >short.txt
  fails 3 kvq-calibrate --model "$SHARED_DIR/model" --text short.txt $SMALL -o out.kvq.h5
  contains "$stderr" "short" "32"
  : >empty.txt
  fails 3 kvq-validate --model "$SHARED_DIR/model" --text empty.txt --seq-len 32
}

@test "windows longer than the model's positions name both numbers" {
  fails 2 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --seq-len 1000000 -o out.kvq.h5
  contains "$stderr" "--seq-len 1000000" "positions"
  fails 2 kvq-validate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --seq-len 1000000
  contains "$stderr" "--seq-len 1000000" "positions"
}

@test "more sink tokens than a window has" {
  fails 2 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL --sink-tokens 32 -o out.kvq.h5
  contains "$stderr" "--sink-tokens 32"
}

@test "an artifact of another model is refused, unless only the weights differ and that is allowed" {
  kvq_make_model_tool other --seed 2
  fails 3 kvq-validate --model other --artifact "$SHARED_DIR/a.kvq.h5" --text "$SHARED_DIR/text.txt"
  contains "$stderr" "KVQ-E3004" "weights"
  fails 3 kvq-export "$SHARED_DIR/a.kvq.h5" --model other --to json -o out.json
  contains "$stderr" "KVQ-E3004"
  succeeds kvq-validate --model other --artifact "$SHARED_DIR/a.kvq.h5" --text "$SHARED_DIR/text.txt" --allow-other-weights
}

@test "one flipped byte anywhere in an artifact is found, or is no content" {
  bytes=$(wc -c <"$SHARED_DIR/a.kvq.h5")
  kvq-inspect -q --check "$SHARED_DIR/a.kvq.h5" >intact
  found=0
  for ((i = 1; i < 64; i++)); do # the first bytes say that it is HDF5; without them it is no artifact at all (exit 3)
    at=$((bytes * i / 64 + i % 8))
    cp "$SHARED_DIR/a.kvq.h5" b.kvq.h5
    value=$(od -An -tu1 -j$at -N1 b.kvq.h5)
    bytes 1 $((value ^ 255)) | overwrite b.kvq.h5 $at
    run kvq-inspect -q --check b.kvq.h5
    echo "offset $at: exit $status, $output"
    [ "$status" -eq 4 ] || [ "$output" = "$(cat intact)" ]
    [ "$status" -ne 4 ] || found=$((found + 1))
  done
  echo "found $found of 63"
  [ "$found" -ge 16 ]
}

@test "a truncated artifact, an empty file and a text are no artifacts" {
  cp "$SHARED_DIR/a.kvq.h5" b.kvq.h5
  truncate -s -1 b.kvq.h5
  fails 4 kvq-inspect b.kvq.h5 --check
  contains "$stderr" "b.kvq.h5"
  truncate -s 0 b.kvq.h5
  run kvq-inspect b.kvq.h5
  [ "$status" -eq 4 ] || [ "$status" -eq 3 ]
  words 10 >b.kvq.h5
  run kvq-inspect b.kvq.h5
  [ "$status" -eq 4 ] || [ "$status" -eq 3 ]
}

@test "a damaged artifact stops export and validation too" {
  cp "$SHARED_DIR/a.kvq.h5" b.kvq.h5
  truncate -s -1 b.kvq.h5
  fails 4 kvq-export b.kvq.h5 --to json -o out.json
  fails 4 kvq-validate --model "$SHARED_DIR/model" --artifact b.kvq.h5 --text "$SHARED_DIR/text.txt"
}

# A limit on file sizes is a full disk that needs no second disk. Without the trap the signal would end the program.
limited() {
  local kib=$1
  shift
  (
    trap '' XFSZ
    ulimit -f "$kib"
    exec "$@"
  )
}

@test "a disk that fills up ends the run, and the same command goes on when there is room again" {
  run --separate-stderr limited 4 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o out.kvq.h5
  show
  [ "$status" -eq 6 ]
  contains "$stderr" "KVQ-E6002" "out.kvq.h5.work/kvq-x.0000" "--work-dir"
  [ ! -e out.kvq.h5 ]
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o out.kvq.h5
  cmp out.kvq.h5 "$SHARED_DIR/a.kvq.h5"
  [ ! -e out.kvq.h5.work ]
}

@test "a disk that fills up keeps the old artifact and the old export" {
  echo precious >out
  run --separate-stderr limited 6 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --samples 1 \
    --seq-len 4 --weighting none --force -o out
  show
  [ "$status" -eq 6 ]
  contains "$stderr" "KVQ-E6002"
  [ "$(cat out)" = precious ]
  fails 6 limited 1 kvq-export "$SHARED_DIR/a.kvq.h5" --to json --force -o out
  [ "$(cat out)" = precious ]
}

@test "a disk that is too small for the scratch files is found before the run" {
  # 2^24 windows of 512 tokens, four times 64 floats each: 8 TiB
  fails 6 kvq-calibrate --model "$SHARED_DIR/model" --text self --samples 16777216 --seq-len 512 -o out.kvq.h5
  contains "$stderr" "KVQ-E6002" "out.kvq.h5.work" "the least is 8388608 MiB" "--work-dir"
}

@test "an output folder that does not exist is found before the run" {
  fails 6 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL -o nowhere/out.kvq.h5
  contains "$stderr" "nowhere/"
  [[ $stderr != *"quantizer"* ]]
}

@test "an output that is an input, with --force or without" {
  copy_model
  cp "$SHARED_DIR/text.txt" text.txt
  fails 2 kvq-calibrate --model model --text text.txt $SMALL --force -o text.txt
  contains "$stderr" "text.txt" "is an input"
  fails 2 kvq-calibrate --model model --text text.txt $SMALL --force -o model/model.safetensors
  contains "$stderr" "belongs to model"
  cmp text.txt "$SHARED_DIR/text.txt"
  cmp model/model.safetensors "$SHARED_DIR/model/model.safetensors"
  cp "$SHARED_DIR/a.kvq.h5" a.kvq.h5
  fails 2 kvq-export a.kvq.h5 --to json --force -o a.kvq.h5
  cmp a.kvq.h5 "$SHARED_DIR/a.kvq.h5"
}

@test "files that are no text" {
  printf '\x1f\x8b\x08rest of a gzip file' >text.gz
  fails 3 kvq-calibrate --model "$SHARED_DIR/model" --text text.gz $SMALL -o out.kvq.h5
  contains "$stderr" "text.gz" "gzip"
  { words 100 && printf 'a\0b'; } >zero.txt
  fails 3 kvq-calibrate --model "$SHARED_DIR/model" --text zero.txt $SMALL -o out.kvq.h5
  contains "$stderr" "zero.txt: byte " "is zero"
  { words 300 && printf 'caf\xe9'; } >latin1.txt
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text latin1.txt $SMALL -o out.kvq.h5
  contains "$stderr" "warning" "latin1.txt: not UTF-8 from byte "
}

@test "a work folder that was there keeps what is in it, and one run at a time has it" {
  mkdir wk
  echo mine >wk/mine
  calibrate() { kvq-calibrate -q --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $SMALL --work-dir wk "$@"; }
  calibrate -o one.kvq.h5
  [ "$(ls -A wk)" = mine ]
  cmp one.kvq.h5 "$SHARED_DIR/a.kvq.h5"
  (
    flock 9
    fails 2 calibrate -o two.kvq.h5
    contains "$stderr" "KVQ-E2002" "another run (process" "--work-dir"
  ) 9>wk/kvq-lock
}

@test "a device that there is not" {
  for program in "kvq-calibrate -o out.kvq.h5 $SMALL" "kvq-capture -o out.kvqc.h5 $SMALL" "kvq-validate --seq-len 32"; do
    fails 3 $program --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --device cuda:1
    contains "$stderr" "--device cuda:1" "CUDA" "--device cpu"
    fails 2 $program --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --device cuda:x
    contains "$stderr" "cpu, cuda, cuda:N or auto"
  done
  succeeds kvq-validate --seq-len 32 --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --device auto
  contains "$stderr" "of this processor" "(no GPU:"
}
