# SPDX-License-Identifier: Apache-2.0
# The channel-allocated format: from a model or a measurement to artifacts of a size that was asked for, and what
# kvq-inspect, kvq-export and kvq-validate make of them.
load common

# Two tiles per window. Bits are asked for 8 sequences of a window, so 8 windows are what kvq-validate is given.
TILES="--samples 4 --seq-len 256"

setup_file() {
  export SHARED_DIR=$BATS_FILE_TMPDIR
  kvq_make_model_tool "$SHARED_DIR/model"
  words 900 >"$SHARED_DIR/text.txt"
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $TILES --threads 1 --measure-only \
    --allocated -o "$SHARED_DIR/m.kvqm.h5"
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $TILES --threads 1 --target-bits 4 \
    -o "$SHARED_DIR/a.kvq.h5"
}

calibrate() { kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $TILES --threads 1 "$@"; }
refit() { kvq-calibrate --from "$SHARED_DIR/m.kvqm.h5" --threads 1 "$@"; }
validate() { kvq-validate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --windows 8 "$@"; }
inspect() { kvq-inspect -q --json "$1" | kvq_json_tool "${@:2}"; }
recorded() { inspect "$1" provenance options_json | kvq_json_tool "${@:2}"; }
# holds EXPRESSION: of awk
holds() { awk "BEGIN { exit !($1) }" || { echo "not true: $1" && return 1; }; }

# The layers of an artifact, without where it comes from.
numbers() {
  kvq-export -q "$1" --to json -f -o numbers.json >/dev/null
  awk '/^\t"/ { inside = /"layers"/ } inside' numbers.json
}

# mean ARTIFACT TENSOR: bits of its codes per element, over layers
mean() {
  local a b
  a=$(inspect "$1" layers 0 "$2" mean_bits)
  b=$(inspect "$1" layers 1 "$2" mean_bits)
  awk "BEGIN { print ($a + $b) / 2 }"
}

# spends ARTIFACT TARGET: the cache has at most these bits per element, and nearly as many. The largest step of this tiny
# model is an eighth of a bit: values of one of its two layers by half a bit, of half of all elements.
spends() {
  local inspected validated
  inspected=$(inspect "$1" bits_per_element)
  validated=$(validate -q --json --artifact "$1" 2>/dev/null | kvq_json_tool effective_bits)
  holds "$inspected <= $2 && $inspected > $2 - 0.125"
  holds "$validated == $inspected"
}

# ---------------------------------------------------------------- targets

@test "a target is met: everything counted, no more than was asked for and nearly as much" {
  for bits in 2 2.6 4; do
    calibrate --target-bits $bits -f -o out.kvq.h5
    spends out.kvq.h5 $bits
    [ "$(inspect out.kvq.h5 quantizer target_bits)" = "$(awk "BEGIN { printf \"%.17g\", $bits }")" ]
    [ "$(inspect out.kvq.h5 quantizer budget_tokens)" = 256 ]
    [ "$(inspect out.kvq.h5 quantizer budget_sequences)" = 8 ]
    [ "$(recorded out.kvq.h5 target_bits)" = "$(awk "BEGIN { printf \"%.17g\", $bits }")" ]
  done
}

@test "a preset is a target by a name" {
  for bits in 3.4 3 2.75 2.1; do
    refit --preset alloc-$bits -f -o preset.kvq.h5
    refit --target-bits $bits -f -o target.kvq.h5
    cmp preset.kvq.h5 target.kvq.h5
    spends preset.kvq.h5 $bits
  done
  fails 2 refit --preset alloc-9 -o out.kvq.h5
  contains "$stderr" "--preset: 'alloc-9' is none of alloc-3.4, alloc-3, alloc-2.75, alloc-2.1"
}

@test "a target is for so many sequences of such a length" {
  refit --target-bits 3 --target-tokens 4096 --target-sequences 1 -o long.kvq.h5
  [ "$(inspect long.kvq.h5 quantizer budget_tokens)" = 4096 ]
  [ "$(inspect long.kvq.h5 quantizer budget_sequences)" = 1 ]
  holds "$(inspect long.kvq.h5 bits_per_element) <= 3"
  refit --target-bits 3 -o short.kvq.h5 # tables weigh more
  holds "$(mean short.kvq.h5 k) + $(mean short.kvq.h5 v) < $(mean long.kvq.h5 k) + $(mean long.kvq.h5 v)"
  # bits are dealt for whole tiles, and that is what is named and recorded
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" --samples 4 --seq-len 200 \
    --target-bits 4 -o odd.kvq.h5
  contains "$stderr" "4 bits for 8 sequences of 256 tokens" "bits per element for 8 sequences of 256 tokens"
  [ "$(inspect odd.kvq.h5 quantizer budget_tokens)" = 256 ]
  holds "$(inspect odd.kvq.h5 bits_per_element) <= 4"
}

@test "a target that cannot be reached or spent" {
  fails 2 refit --target-bits 1 -o out.kvq.h5
  contains "$stderr" "--target-bits 1 is out of reach" "need at least" "ask for more bits, a longer sequence"
  succeeds refit --target-bits 8 -o out.kvq.h5
  contains "$stderr" "warning" "--target-bits 8 cannot be spent"
}

@test "a target out of reach is refused before anything is measured" {
  FRAGMENTS="out of reach"
  fails 2 calibrate --target-bits 1 -o out.kvq.h5
  contains "$stderr" "--target-bits 1 is out of reach" "ask for more bits"
}

@test "other formats fitted from the same measurement have their usual outlier slots" {
  refit --bits 3 --outliers 1% -f -o from.kvq.h5
  calibrate --bits 3 --outliers 1% -f -o direct.kvq.h5
  [ "$(inspect from.kvq.h5 bits_per_element)" = "$(inspect direct.kvq.h5 bits_per_element)" ]
  [ "$(inspect from.kvq.h5 quantizer n_side_k)" = "$(inspect direct.kvq.h5 quantizer n_side_k)" ]
}

@test "mean bits instead of a target" {
  calibrate --k-mean-bits 2.25 --v-mean-bits 3 -o out.kvq.h5
  holds "$(mean out.kvq.h5 k) == 2.25 && $(mean out.kvq.h5 v) == 3"
  [ "$(inspect out.kvq.h5 quantizer target_bits)" = null ]
  [ "$(recorded out.kvq.h5 target_bits)" = 0 ]
  [ "$(recorded out.kvq.h5 k_mean_bits)" = 2.25 ]
  succeeds refit --k-mean-bits 2.25 --v-mean-bits 3 --dry-run -o none.kvq.h5
  contains "$stderr" "channel-allocated  K 2.25 bits  V 3 bits"
  fails 2 refit --k-mean-bits 2 --k-widths 3,4 --v-mean-bits 3 -o none.kvq.h5
  contains "$stderr" "--k-mean-bits 2"
}

@test "the widths of another artifact, with tables of one's own" {
  words 900 5000 >other.txt
  calibrate --target-bits 3 -o from.kvq.h5
  succeeds kvq-calibrate --model "$SHARED_DIR/model" --text other.txt $TILES --widths-from from.kvq.h5 -o out.kvq.h5
  contains "$stderr" "channel-allocated  widths of from.kvq.h5"
  [[ $stderr != *"KL of each K and V"* ]] # nothing is chosen
  [[ $stderr != *"chosen"* ]]
  for layer in 0 1; do
    kvq-inspect -q --json from.kvq.h5 --layer $layer | awk '/"widths"/,/\]/' >from.widths
    kvq-inspect -q --json out.kvq.h5 --layer $layer | awk '/"widths"/,/\]/' >out.widths
    cmp from.widths out.widths
    [ "$(inspect out.kvq.h5 layers $layer v bits)" = "$(inspect from.kvq.h5 layers $layer v bits)" ]
  done
  [ "$(inspect out.kvq.h5 bits_per_element)" = "$(inspect from.kvq.h5 bits_per_element)" ]
  [ "$(numbers out.kvq.h5 | sha256sum)" != "$(numbers from.kvq.h5 | sha256sum)" ]
  [ "$(recorded out.kvq.h5 widths_from)" = from.kvq.h5 ]
  [ "$(recorded out.kvq.h5 target_bits)" = 0 ]
  [ "$(inspect out.kvq.h5 quantizer target_bits)" = null ]
  # on the same text they are the same artifact, but for what was asked for
  refit --widths-from from.kvq.h5 -o same.kvq.h5
  numbers from.kvq.h5 | grep -v '"kl"' >from.json # no KL was measured for given widths
  numbers same.kvq.h5 | grep -v '"kl"' >same.json
  cmp from.json same.json
  [ "$(inspect same.kvq.h5 layers 0 k kl)" = null ]
}

@test "widths that cannot be used are refused before the run" {
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $TILES -o nuq.kvq.h5
  kvq_make_model_tool other --layers 3
  kvq-calibrate --model other --text "$SHARED_DIR/text.txt" $TILES --target-bits 4 -o other.kvq.h5
  for command in calibrate refit; do
    fails 3 $command --widths-from nowhere.kvq.h5 -o out.kvq.h5
    contains "$stderr" "nowhere.kvq.h5"
    fails 3 $command --widths-from nuq.kvq.h5 -o out.kvq.h5
    contains "$stderr" "KVQ-E3004" "--widths-from nuq.kvq.h5: it is not channel-allocated"
    fails 3 $command --widths-from "$SHARED_DIR/a.kvq.h5" --v-dim 1 -o out.kvq.h5
    contains "$stderr" "KVQ-E3004" "--v-dim 1"
    fails 3 $command --widths-from other.kvq.h5 -o out.kvq.h5
    contains "$stderr" "KVQ-E3004"
    fails 2 $command --widths-from other.kvq.h5 -f -o other.kvq.h5
    contains "$stderr" "--output other.kvq.h5: this file is an input"
  done
}

# ---------------------------------------------------------------- measure once

@test "a measurement says that it has channels, and suggests a fit that uses them" {
  succeeds calibrate --measure-only --allocated -o m.kvqm.h5
  contains "$stderr" "channels and rotated values" "to measure the KL of each K and V alone on 4 x 256 tokens" \
    "next: kvq-calibrate --from m.kvqm.h5 --target-bits 3 -o OUT.kvq.h5"
  cmp m.kvqm.h5 "$SHARED_DIR/m.kvqm.h5"
  succeeds calibrate --measure-only --allocated --threads 2 -f -o m.kvqm.h5
  cmp m.kvqm.h5 "$SHARED_DIR/m.kvqm.h5"
  succeeds kvq-inspect m.kvqm.h5
  contains "$output" "channels and rotated values: weighting fisher-scaled" "KL "
}

# The KL of single tensors is measured with one share of outliers, the usual one; fits with others do without it here.
@test "a fit from a measurement finds the numbers of a calibration" {
  while read -r options; do
    # shellcheck disable=SC2086 # a list of options
    refit $options -f -o from.kvq.h5
    # shellcheck disable=SC2086
    calibrate $options -f -o direct.kvq.h5
    numbers from.kvq.h5 >from.json
    numbers direct.kvq.h5 >direct.json
    [ "$(wc -c <direct.json)" -gt 2000 ]
    cmp from.json direct.json
    [ "$(recorded from.kvq.h5 measurement)" = m.kvqm.h5 ]
  done <<'LIST'
--target-bits 4
--preset alloc-3 --k-tables affine
--k-mean-bits 3 --v-mean-bits 2.5 --v-dim 1
--target-bits 4 --outliers 1% --kl-tokens 0
--target-bits 3 --outliers 0 --kl-tokens 0
--target-bits 3 --budget head --width-group 1
--target-bits 3 --kl-tokens 0
LIST
}

@test "a measurement without channels, or without the outliers, is refused with what to do" {
  kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $TILES --measure-only -o plain.kvqm.h5
  fails 2 kvq-calibrate --from plain.kvqm.h5 --target-bits 3 -o out.kvq.h5
  contains "$stderr" "does not have what the channel-allocated format needs" \
    "measure again with kvq-calibrate --measure-only --allocated"
  fails 2 refit --target-bits 3 --outliers 2% -o out.kvq.h5
  contains "$stderr" "--outliers 2% was not measured"
}

# ---------------------------------------------------------------- what changes a result, and what does not

@test "threads and processes give the bytes of one" {
  calibrate --target-bits 4 --threads 2 -o two.kvq.h5
  cmp two.kvq.h5 "$SHARED_DIR/a.kvq.h5"
  command -v mpirun >/dev/null || skip "no mpirun here"
  export OMPI_MCA_plm=isolated # one machine; otherwise mpirun wants ssh
  local run="mpirun --oversubscribe"
  [ "$(id -u)" -ne 0 ] || run="$run --allow-run-as-root"
  $run -n 1 true 2>/dev/null || skip "mpirun cannot start a process here"
  run --separate-stderr $run -n 2 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $TILES \
    --threads 1 --target-bits 4 -o ranks.kvq.h5
  [[ $stderr != *"built without MPI"* ]] || skip "built without MPI"
  show
  [ "$status" -eq 0 ]
  cmp ranks.kvq.h5 "$SHARED_DIR/a.kvq.h5"
  [ ! -e ranks.kvq.h5.work ]
  [ "$(grep -c '^chosen ' <<<"$stderr")" -eq 1 ] # one voice
  succeeds $run -n 2 kvq-calibrate --model "$SHARED_DIR/model" --text "$SHARED_DIR/text.txt" $TILES --threads 1 \
    --measure-only --allocated -o ranks.kvqm.h5
  cmp ranks.kvqm.h5 "$SHARED_DIR/m.kvqm.h5"
}

# of_first TENSOR KEY...: of the first layer of out.kvq.h5
of_first() { inspect out.kvq.h5 layers 0 "$@"; }

@test "tables of K by channel, or by layer and width" {
  refit --target-bits 4 -o out.kvq.h5
  [ "$(of_first k table_kind)" = channel ]
  succeeds refit --target-bits 4 --k-tables affine -f -o out.kvq.h5
  contains "$stderr" "K tables per layer and width"
  [ "$(of_first k table_kind)" = affine ]
  [ "$(of_first k key_levels)" = 63 ]
  [ "$(of_first k offset)" = 32 ]
  spends out.kvq.h5 4
}

@test "values in pairs or alone, with scales of either type, rotated or not" {
  while read -r dim scale rotation; do
    succeeds calibrate --target-bits 4 --v-dim "$dim" --v-scale "$scale" --v-rotation "$rotation" -f -o out.kvq.h5
    contains "$stderr" "V rotated ($rotation), $([ "$dim" = 2 ] && echo pairs || echo single channels), scales $scale"
    [ "$(of_first v dim)" = "$dim" ]
    [ "$(of_first v scale_format)" = "$scale" ]
    [ "$(inspect out.kvq.h5 quantizer rotation_kind)" = "$([ "$rotation" = none ] && echo none || echo hadamard)" ]
    [ "$(recorded out.kvq.h5 v_scale)" = "$scale" ]
    [ "$(recorded out.kvq.h5 v_rotation)" = "$rotation" ]
    holds "$(inspect out.kvq.h5 bits_per_element) <= 4"
    validate -q --artifact out.kvq.h5 --gate 'kld.mean<=0.5'
  done <<'LIST'
2 e4m3 orthogonal
1 e4m3 orthogonal
2 f16 none
1 f16 orthogonal
2 e4m3 none
LIST
  # a head_dim that no Hadamard matrix has
  kvq_make_model_tool odd --head-dim 18
  kvq-calibrate --model odd --text "$SHARED_DIR/text.txt" $TILES --target-bits 4 -f -o out.kvq.h5
  [ "$(inspect out.kvq.h5 quantizer rotation_kind)" = random ]
  holds "$(inspect out.kvq.h5 bits_per_element) <= 4"
}

# The bits of channels of K, in their order, one line for each layer.
widths() {
  for layer in 0 1; do
    for ((c = 0; c < 32; c++)); do echo "$(inspect "$1" layers $layer k widths $c)"; done | tr '\n' ' '
    echo
  done
}

@test "what channels may have: budgets by layer and head, widths, and groups" {
  refit --k-mean-bits 2.5 --v-mean-bits 3 --budget layer -o out.kvq.h5
  [ "$(of_first k mean_bits)" = 2.5 ]
  [ "$(inspect out.kvq.h5 layers 1 k mean_bits)" = 2.5 ]
  refit --k-mean-bits 2.5 --v-mean-bits 3 --budget head -f -o out.kvq.h5
  widths out.kvq.h5 | awk '{ for (i = 1; i <= 32; i++) sum[i > 16] += $i } END { exit !(sum[0] == 80 && sum[1] == 80) }'
  refit --k-mean-bits 2.5 --v-mean-bits 3 -f -o out.kvq.h5
  [ "$(of_first k mean_bits)" != 2.5 ]
  refit --target-bits 3 --k-widths 1,2,4 --width-group 1 --v-rates 5,7 -f -o out.kvq.h5
  spends out.kvq.h5 3
  for width in 0 3 5; do [ "$(of_first k width_counts $width)" = 0 ]; done
  [[ $(of_first v bits) == [57] ]]
  # channels that share a width come in groups, of 2 in heads of 16, unless they are alone
  refit --target-bits 3 --width-group 8 -f -o out.kvq.h5
  for width in 0 1 2 3 4 5; do [ $(($(of_first k width_counts $width) % 8)) -eq 0 ]; done
  refit --target-bits 3 -f -o out.kvq.h5
  [ "$(recorded out.kvq.h5 width_group)" = 2 ]
  for width in 0 1 2 3 4 5; do of_first k width_counts $width; done |
    awk '{ odd += $1 % 2; other += $1 % 8 != 0 } END { exit !(odd == 0 && other) }'
  pairs=$(widths out.kvq.h5)
  refit --target-bits 3 --width-group 1 -f -o out.kvq.h5
  [ "$(widths out.kvq.h5)" != "$pairs" ]
}

@test "without the KL of single tensors, the same run chooses by gradients alone" {
  succeeds calibrate --target-bits 3 --kl-tokens 0 -o out.kvq.h5
  [[ $stderr != *"KL of each K and V"* ]]
  [ "$(of_first k kl)" = null ]
  [ "$(recorded out.kvq.h5 kl_tokens)" = 0 ]
  succeeds calibrate --target-bits 3 --kl-tokens 512 -f -o out.kvq.h5
  contains "$stderr" "to measure the KL of each K and V alone on 2 x 256 tokens"
  holds "$(of_first k kl) > 0 && $(of_first v kl) > 0"
  spends out.kvq.h5 3
}

# ---------------------------------------------------------------- what is said

@test "what was chosen is said, with its neighbours, and what the cache takes" {
  succeeds calibrate --target-bits 3 -o out.kvq.h5
  contains "$stderr" "quantizer  channel-allocated  3 bits for 8 sequences of 256 tokens, everything counted" \
    "K tables per channel, widths in groups of 2, budget by model, outliers 0.25%" "sink tokens 1" \
    "worst layers by weighted error" "next: kvq-validate"
  contains "$output" "wrote out.kvq.h5" "content sha256"
  chosen=$(grep '^chosen ' <<<"$stderr")
  [[ $chosen =~ ^chosen\ +K\ $(mean out.kvq.h5 k | xargs printf '%.3f')\ +V\ $(mean out.kvq.h5 v | xargs printf '%.3f')\ bits:\ predicted\ loss\ ([0-9.e-]+)\ \(K ]]
  loss=${BASH_REMATCH[1]}
  neighbours=$(sed -n '/^neighbours /,/^V bits/p' <<<"$stderr" | grep "predicted loss")
  [ "$(wc -l <<<"$neighbours")" -ge 2 ]
  while read -r line; do # whatever was not chosen is said to lose more, and does
    [[ $line =~ loss\ ([0-9.e-]+)\ .*\)\ \ more$ ]]
    holds "${BASH_REMATCH[1]} > $loss"
  done <<<"$neighbours"
  contains "$stderr" "V bits by layer: $(inspect out.kvq.h5 layers 0 v mean_bits) $(inspect out.kvq.h5 layers 1 v mean_bits)"
  contains "$stderr" "cache: $(inspect out.kvq.h5 bits_per_element | xargs printf '%.3f') bits per element for 8 sequences of 256 tokens"
  [ "$(wc -l <<<"$output")" -eq 1 ]
}

@test "a plan names the bits and the work, and writes nothing" {
  succeeds calibrate --target-bits 3 --dry-run -o out.kvq.h5
  contains "$stderr" "channel-allocated  3 bits" "to measure the KL of each K and V alone on 4 x 256 tokens" \
    "would write out.kvq.h5; nothing was written"
  [ -z "$output" ]
  succeeds refit --preset alloc-2.75 --dry-run -o out.kvq.h5
  contains "$stderr" "channel-allocated  2.75 bits" "would write out.kvq.h5; nothing was written"
  [ -z "$(ls -A)" ]
}

# ---------------------------------------------------------------- interruptions

# stop_when STAGE: asks a run to stop as soon as it reports that stage, and remembers its exit code.
stop_when() {
  local pid
  kvq-calibrate --model deep --text "$SHARED_DIR/text.txt" $DEEP --progress json -o out.kvq.h5 2>log &
  pid=$!
  until grep -q "\"stage\":\"$1\"" log || ! kill -0 $pid 2>/dev/null; do sleep 0.01; done
  kill -TERM $pid || true
  code=0
  wait $pid || code=$?
}

@test "a run that was stopped goes on to the same bytes, also from within the KL of single tensors" {
  kvq_make_model_tool deep --layers 12
  DEEP="--samples 16 --seq-len 256 --threads 1 --target-bits 3"
  kvq-calibrate --model deep --text "$SHARED_DIR/text.txt" $DEEP -o whole.kvq.h5
  for stage in forward backward sensitivity; do
    stop_when $stage
    cat log
    [ "$code" -eq 75 ]
    contains "$(cat log)" "KVQ-E" "continue"
    [ ! -e out.kvq.h5 ]
    fails 3 kvq-calibrate --model deep --text "$SHARED_DIR/text.txt" $DEEP --v-dim 1 -o out.kvq.h5
    contains "$stderr" "KVQ-E3004" "v_dim: 2, now 1" "--restart"
    succeeds kvq-calibrate --model deep --text "$SHARED_DIR/text.txt" $DEEP --threads 2 -o out.kvq.h5
    contains "$stderr" "continues in out.kvq.h5.work"
    cmp out.kvq.h5 whole.kvq.h5
    [ ! -e out.kvq.h5.work ]
    rm out.kvq.h5
  done
  contains "$(cat log)" "tensors are measured anew by the run that goes on"
}

# ---------------------------------------------------------------- contradictions

@test "what the format never has is refused by name" {
  for option in "--bits 3" "--k-bits 3" "--v-bits 3" "--datatype nf" "--k-datatype nf" "--v-datatype nf" \
    "--groups head" "--q-norm" "--compare-lloyd" "--recent-window 3" "--compat kvquant" "--shard 0/2" "--capture x"; do
    for wanted in "--target-bits 3" "--preset alloc-3" "--k-mean-bits 2 --v-mean-bits 3" "--widths-from x"; do
      # shellcheck disable=SC2086
      fails 2 calibrate $wanted $option -o out.kvq.h5
      contains "$stderr" "${option%% *} has no meaning in the channel-allocated format" "leave one of them out"
    done
  done
  fails 2 calibrate --target-bits 3 --k-axis token -o out.kvq.h5
  contains "$stderr" "leave out --k-axis and --k-domain"
  fails 2 calibrate --target-bits 3 --k-domain post_rope -o out.kvq.h5
  contains "$stderr" "leave out --k-axis and --k-domain"
}

@test "what only the format has is refused by name elsewhere" {
  for option in "--k-widths 1,2" "--v-rates 4" "--width-group 4" "--budget layer" "--k-tables affine" "--v-dim 1" \
    "--target-tokens 1024" "--target-sequences 2"; do
    for other in "" "--bits 3"; do
      # shellcheck disable=SC2086
      fails 2 calibrate $other $option -o out.kvq.h5
      contains "$stderr" "${option%% *} belongs to the channel-allocated format" "add --target-bits, or a --preset"
    done
    # shellcheck disable=SC2086
    fails 2 calibrate --measure-only --allocated $option -o out.kvqm.h5
    contains "$stderr" "${option%% *} belongs to the channel-allocated format" "give it to kvq-calibrate --from"
  done
  for option in "--v-scale f16" "--v-rotation none" "--kl-tokens 0"; do
    # shellcheck disable=SC2086
    fails 2 calibrate $option -o out.kvq.h5
    contains "$stderr" "${option%% *} belongs to the channel-allocated format" "add --target-bits, or a --preset"
    # shellcheck disable=SC2086
    fails 2 calibrate --measure-only $option -o out.kvqm.h5
    contains "$stderr" "${option%% *} belongs to the channel-allocated format" "add --allocated"
  done
  fails 2 calibrate --allocated -o out.kvq.h5
  contains "$stderr" "--allocated belongs to a measurement" "add --measure-only"
  fails 2 calibrate --allocated --target-bits 3 -o out.kvq.h5
  contains "$stderr" "--allocated belongs to a measurement"
  fails 2 calibrate --measure-only --allocated --target-bits 3 -o out.kvqm.h5
  contains "$stderr" "--measure-only: --target-bits and --preset have no meaning here" "kvq-calibrate --from"
}

@test "a measurement decides what it was made with" {
  for option in "--v-scale f16" "--v-rotation none" "--weighting none"; do
    # shellcheck disable=SC2086
    fails 2 refit --target-bits 3 $option -o out.kvq.h5
    contains "$stderr" "--from: the measurement decides ${option%% *}" "measure again with --measure-only --allocated"
  done
  fails 2 refit --target-bits 3 --kl-tokens 512 -o out.kvq.h5
  contains "$stderr" "--from: the measurement decides --kl-tokens; 0 ignores what it has"
}

@test "there is one budget" {
  local budgets=("--target-bits 3" "--preset alloc-3" "--k-mean-bits 2 --v-mean-bits 3" "--widths-from x")
  for one in 0 1 2; do
    for ((other = one + 1; other < 4; other++)); do
      # shellcheck disable=SC2086
      fails 2 calibrate ${budgets[one]} ${budgets[other]} -o out.kvq.h5
      contains "$stderr" "more than one budget of the channel-allocated format" "--widths-from"
    done
  done
  for half in "--k-mean-bits 2" "--v-mean-bits 2"; do
    # shellcheck disable=SC2086
    fails 2 calibrate $half -o out.kvq.h5
    contains "$stderr" "--k-mean-bits and --v-mean-bits belong together"
  done
  for option in "--k-widths 1,2" "--v-rates 4" "--width-group 4" "--budget layer" "--kl-tokens 5"; do
    # shellcheck disable=SC2086
    fails 2 calibrate --widths-from x $option -o out.kvq.h5
    contains "$stderr" "--widths-from: ${option%% *} has no meaning when the widths are given"
  done
}

@test "lists of widths are read to their end" {
  for list in x 1,x 1,,2 9 -1 1.5 "1 2"; do
    fails 2 refit --target-bits 3 --k-widths "$list" -o out.kvq.h5
    contains "$stderr" "--k-widths: '$list' is not a list of widths"
    fails 2 refit --target-bits 3 --v-rates "$list" -o out.kvq.h5
    contains "$stderr" "--v-rates: '$list' is not a list of widths"
  done
  fails 2 refit --target-bits 3 --k-widths 1,7 -o out.kvq.h5
  contains "$stderr" "--k-widths: widths of keys are 0 to 5 bits"
  fails 2 refit --target-bits 3 --v-rates 0,4 -o out.kvq.h5
  contains "$stderr" "--v-rates: pairs of values have 1 to 8 bits"
}

@test "heads that tiles cannot hold are refused by their size" {
  kvq_make_model_tool wide --head-dim 514 --heads 1 --kv-heads 1 --layers 1
  for wanted in "--target-bits 3" "--measure-only --allocated"; do
    # shellcheck disable=SC2086
    fails 3 kvq-calibrate --model wide --text "$SHARED_DIR/text.txt" $SMALL $wanted -o out.kvq.h5
    contains "$stderr" "KVQ-E3003" "a head_dim of 514" "512"
  done
  succeeds kvq-calibrate --model wide --text "$SHARED_DIR/text.txt" $SMALL -o out.kvq.h5 # rows can
}

# ---------------------------------------------------------------- exports and validation

@test "exports are checked against the artifact" {
  for tables in channel affine; do
    refit --target-bits 4 --k-tables $tables -f -o a.kvq.h5
    for target in json safetensors; do
      succeeds kvq-export a.kvq.h5 --to $target --check -f -o out.$target
      contains "$output" "out.$target"
    done
    [ "$(kvq_json_tool layers 0 k table_kind <out.json)" = $tables ]
    [ "$(kvq_json_tool layers 0 k widths <out.json)" = 32 ]
  done
}

# A text of few words has keys in few places; other words are elsewhere.
@test "keys that leave the calibrated ranges are noticed, and those of the calibration text do not" {
  for i in {1..300}; do echo "says then the word says then the word is is is"; done >narrow.txt
  for i in {1..200}; do echo "Zebras quickly JUMP over @#%& lazy-dogs! (7x9=63)"; done >unlike.txt
  for wanted in "--target-bits 4" "--bits 4"; do
    # shellcheck disable=SC2086
    kvq-calibrate --model "$SHARED_DIR/model" --text narrow.txt --samples 8 --seq-len 128 $wanted -f -o out.kvq.h5
    succeeds kvq-validate --model "$SHARED_DIR/model" --artifact out.kvq.h5 --text narrow.txt --windows 8 --json
    [[ $stderr != *"outside of the calibrated ranges"* ]]
    [ "$(json k_beyond_range exceeds)" = false ]
    holds "$(json k_beyond_range share) < 1.1 * $(json k_beyond_range expected)"
    succeeds kvq-validate --model "$SHARED_DIR/model" --artifact out.kvq.h5 --text unlike.txt --windows 8 --json
    contains "$stderr" "warning" "of the keys lie outside of the calibrated ranges" "times as many as expected" \
      "calibrate on text like this too (--text, --newlines mixed)"
    [ "$(json k_beyond_range exceeds)" = true ]
    holds "$(json k_beyond_range share) > 2 * $(json k_beyond_range expected)"
  done
}

@test "channels are counted with the weighting of the measurement" {
  calibrate --measure-only --allocated --weighting range -o range.kvqm.h5
  kvq-calibrate --from range.kvqm.h5 --target-bits 4 -o range.kvq.h5
  [ "$(inspect range.kvq.h5 quantizer weighting)" = range ]
  [ "$(inspect "$SHARED_DIR/a.kvq.h5" quantizer weighting)" = fisher-scaled ]
}
