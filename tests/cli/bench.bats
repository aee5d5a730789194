# SPDX-License-Identifier: Apache-2.0
# kvq-bench: every case runs and reports what it promises. How fast a machine is, is no test.
load common

MODEL="--model m --repeats 2 --threads 1"

make_model() {
  kvq_make_model_tool m
  words 200 >text.txt
}

# numbers_are_sane: the CSV in $output has a median between its minimum and maximum in every row, and all are positive.
numbers_are_sane() {
  [ "$(head -n 1 <<<"$output")" = "case,name,unit,median,min,max,repeats" ]
  [ "$(wc -l <<<"$output")" -gt 1 ]
  # names are quoted and may hold commas
  tail -n +2 <<<"$output" | sed 's/"[^"]*"/name/' | awk -F, '
    NF != 7 || !($5 > 0 && $5 <= $4 && $4 <= $6) { print "wrong row: " $0; bad = 1 }
    END { exit bad }'
}

@test "matmul measures both directions of square and of given products" {
  succeeds kvq-bench matmul --repeats 2 --threads 1 --csv --shape 48x32 --shape 100x64x7
  numbers_are_sane
  contains "$output" 'matmul,"f32 512x512 forward",GFLOP/s' 'matmul,"f32 best",GFLOP/s' \
    'matmul,"f32 48x32 backward, 2048 rows",of best' 'matmul,"f32 100x64 forward, 7 rows",GFLOP/s'
  # one or the other, on every machine
  [[ $output == *'"bf16 best / f32 best",x'* || $stderr == *"without bf16: "* ]]
}

@test "sweep reports every stage of a calibration" {
  make_model
  succeeds kvq-bench sweep $MODEL --seq-len 32 --windows 2 --csv
  numbers_are_sane
  for stage in "load weights" embed forward thresholds backward count fit loss "attention in forward" \
    "attention in backward" total; do
    contains "$output" "sweep,\"$stage\",s,"
  done
  contains "$output" 'sweep,"forward",of best,' 'sweep,"total",GFLOP/s,' 'sweep,"peak memory of the process until then",MiB,'
  contains "$stderr" "next: kvq-calibrate --model m "
}

@test "sweep stops after the layers that are asked for, and takes the model's window when it is short" {
  kvq_make_model_tool m --layers 3 --positions 24
  succeeds kvq-bench sweep $MODEL --layers 1 --csv
  numbers_are_sane
  contains "$stderr" "windows of 24 tokens"
  fails 2 kvq-bench sweep $MODEL --seq-len 25
  contains "$stderr" "--seq-len 25: the model has 24 positions"
}

@test "the shares of the stages make the whole" {
  make_model
  succeeds kvq-bench sweep --model m --repeats 1 --threads 1 --seq-len 32 --csv
  grep '^sweep,"[a-z ]*",of total,' <<<"$output" | grep -v attention |
    awk -F, '{ sum += $4 } END { exit !(sum > 0.9999 && sum < 1.0001) }'
}

@test "fit compares the exact codebook with Lloyd's, which is never better" {
  succeeds kvq-bench fit --repeats 2 --csv
  numbers_are_sane
  for bits in 2 3 4; do
    contains "$output" "fit,\"exact k-means, $bits bits\",s," "fit,\"exact / Lloyd time, $bits bits\",x,"
  done
  # error of Lloyd over that of the optimum: the minimum over the repeats is 1 or more, up to rounding
  grep '"Lloyd / exact error' <<<"$output" | sed 's/"[^"]*"/name/' | awk -F, '$5 < 1 - 1e-12 { exit 1 }'
}

@test "fit measures points of one's own and shows their levels" {
  # -0.5, -0.25, 0.25 and 0.5, each with weight 1: as many positions as levels of 2 bits
  printf '\0\0\0\277\0\0\200\77\0\0\200\276\0\0\200\77\0\0\200\76\0\0\200\77\0\0\0\77\0\0\200\77' >points
  succeeds kvq-bench fit --points points --bits 2 --repeats 2 --csv
  contains "$output" 'fit,"codebook from points, 2 bits",s,' 'fit,"of that counting, 2 bits",s,' \
    '"level 0, 2 bits",normalised,-0.5,' '"level 1, 2 bits",normalised,-0.25,' '"level 3, 2 bits",normalised,0.5,'
  [ "$(grep -c level <<<"$output")" = 4 ]
  succeeds kvq-bench fit --points points --repeats 1 --csv
  contains "$output" "codebook from points, 4 bits"
  head -c 12 points >odd
  fails 3 kvq-bench fit --points odd
  contains "$stderr" "odd: 12 bytes are no pairs of f32"
  printf '\0\0\0\0\0\0\200\277' >negative
  fails 5 kvq-bench fit --points negative
  contains "$stderr" "negative: point 0 is 0 with weight -1"
  fails 3 kvq-bench fit --points nowhere
}

@test "tokenizer says how much text and how many tokens" {
  make_model
  succeeds kvq-bench tokenizer --model m --text text.txt --repeats 2 --csv
  numbers_are_sane
  contains "$output" "encode, $(wc -c <text.txt) bytes\",MB/s" "Mtokens/s" 'open bpe-'
  gzip -c text.txt >text.gz
  succeeds kvq-bench tokenizer --model m --text text.gz --repeats 1 --csv
  contains "$output" "encode, $(wc -c <text.txt) bytes\",MB/s"
}

@test "codec measures both formats, K and V, there and back" {
  succeeds kvq-bench codec --device cpu --tokens 130 --kv-heads 2 --head-dim 16 --repeats 2 --threads 2 --csv
  numbers_are_sane
  for format in nuq4 nuq3 nuq2 alloc3; do
    for way in "K encode" "K decode" "V encode" "V decode"; do
      contains "$output" "codec,\"$format $way\",GB/s f16," "codec,\"$format $way\",GB/s packed,"
    done
  done
  # 32 codes of 4 bits and two outliers of 32 bits; values have two halves more
  contains "$output" 'codec,"nuq4 K, of an element",bits,6,6,6,1' 'codec,"nuq4 V, of an element",bits,7,7,7,1'
  # the two rates are in the proportion of 6 bits to 16
  grep '^codec,"nuq4 K decode"' <<<"$output" | cut -d, -f4 | awk '
    { rate[NR] = $1 }
    END { exit !(NR == 2 && rate[2] / rate[1] > 0.3749 && rate[2] / rate[1] < 0.3751) }'
}

@test "codec on a device: prompt, token, attention, with the bytes of the CPU" {
  kvq_bench_on_device() {
    "$KVQ_BUILD/emulated/kvq-bench" codec --tokens 100 --kv-heads 1 --head-dim 16 --repeats 1 --threads 1 --csv "$@"
  }
  succeeds kvq_bench_on_device --context 128 --context 200
  numbers_are_sane
  contains "$stderr" "also on cuda:0, emulated device" "its times mean nothing"
  for format in nuq4 nuq3 nuq2 alloc3; do
    contains "$output" "codec,\"$format on device, prompt of 128\",GB/s f16," \
      "codec,\"$format on device, append of a token\",us," "codec,\"$format on device, attention over 128\",us," \
      "codec,\"$format on device, attention over 256\",GB/s packed,"
  done
  KVQ_SIMT_MEMORY=3000000 succeeds kvq_bench_on_device --context 1000000 --context 128
  contains "$stderr" "nuq4: 1000064 tokens do not fit into the device's memory"
  contains "$output" "nuq4 on device, attention over 128"
  [[ $output != *1000064* ]]
  KVQ_SIMT_CALLS=150 run --separate-stderr kvq_bench_on_device --context 128
  show
  [ "$status" -eq 70 ]
  contains "$stderr" "it stopped working"
  succeeds kvq_bench_on_device --device cpu
  [[ $output != *"on device"* ]]
}

@test "the table, CSV and JSON tell the same" {
  make_model
  succeeds kvq-bench fit sweep $MODEL --seq-len 16 --json
  [ "$(json schema)" = kvq.bench/1 ]
  [ "$(json threads)" = 1 ]
  [ "$(json results 0 case)" = fit ]
  [ "$(json results 0 unit)" = Melements/s ]
  [ -n "$(json results 0 values 1)" ]
  [[ $output == *'"sweep"'* ]]
  succeeds kvq-bench fit --repeats 1
  contains "$output" "threads  1 repeats" "median" "Lloyd, 2 bits"
  succeeds kvq bench fit --repeats 1 --csv
  numbers_are_sane
}

@test "what is missing or wrong is named" {
  fails 2 kvq-bench
  contains "$stderr" "the case to measure is missing" "matmul, sweep, fit, tokenizer, codec"
  fails 2 kvq-bench fiit
  contains "$stderr" "unknown case 'fiit'" "did you mean fit?"
  fails 2 kvq-bench fit nonsense
  contains "$stderr" "unknown case 'nonsense'"
  fails 2 kvq-bench sweep
  contains "$stderr" "sweep: --model is missing"
  fails 2 kvq-bench tokenizer --model m
  contains "$stderr" "tokenizer: --text is missing"
  fails 2 kvq-bench fit --csv --json
  fails 2 kvq-bench fit --device cpu
  contains "$stderr" "fit: --device is for codec alone"
  fails 2 kvq-bench codec --device gpu
  fails 2 kvq-bench codec --head-dim 17
  contains "$stderr" "--head-dim 17 is odd"
  fails 2 kvq-bench codec --kv-heads 600 --head-dim 128
  contains "$stderr" "more than 65534 channels"
  for context in 0 -1 4k 99999999999; do
    fails 2 kvq-bench codec --context "$context"
    contains "$stderr" "--context: '$context' is not a number of tokens"
  done
  for shape in 4096 4096x x4096 0x5 5x0 5x5x5x5 5x5x 5y5 -5x5 99999999x2 99999999999999999999x2; do
    fails 2 kvq-bench matmul --shape "$shape"
    contains "$stderr" "--shape: '$shape' is not OUTxIN or OUTxINxROWS"
  done
  fails 3 kvq-bench sweep --model nowhere
  : >empty.txt
  make_model
  fails 3 kvq-bench tokenizer --model m --text empty.txt
  contains "$stderr" "empty.txt: the text is empty"
}

@test "bf16 is used or refused, in every program that offers it" {
  make_model
  export DNNL_MAX_CPU_ISA=AVX2
  for command in "kvq-bench sweep $MODEL" "kvq-bench matmul --repeats 1" "kvq-calibrate --model m --text text.txt $SMALL -o m.kvq.h5" \
    "kvq-validate --model m --text text.txt --seq-len 16"; do
    # shellcheck disable=SC2086
    fails 3 $command --compute bf16
    contains "$stderr" "KVQ-E3003" "bf16: " "--compute f32"
  done
}
