#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint of any size with random weights: a Hugging Face directory of the llama architecture, bf16 safetensors.

What memory, disk and time a calibration needs depends on shapes, not on what the weights say, so the checkpoint of a
large model can be measured without having it. The weights are scaled as a fresh network's, which keeps activations
and gradients finite through any number of layers; a few channels of every key projection are larger than the rest, as
they are in trained models.

Every tensor has a generator of its own, keyed by the seed and its name, and is written in pieces: the same command
gives the same bytes, and memory stays below 300 MiB. Needs Python 3 and numpy.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
import zlib

import numpy as np

SHARD_BYTES = 5 * 10**9
PIECE_ELEMENTS = 1 << 22  # drawn and written at a time
SIGMA = 0.02
OUTLIER_CHANNELS = 8  # per key projection
OUTLIER_FACTOR = 8.0


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="is made; must not exist, or be empty")
    for name, value, text in [
        ("layers", 32, ""),
        ("hidden", 4096, "hidden size"),
        ("heads", 32, "query heads"),
        ("kv-heads", 32, "key and value heads"),
        ("ffn", 11008, "width of the gated MLP"),
        ("vocab", 32000, "rows of embedding and output matrix"),
        ("positions", 8192, "longest window"),
        ("seed", 0, ""),
    ]:
        parser.add_argument("--" + name, type=int, default=value, metavar="N", help=f"{text} ({value})".strip())
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="also write N random token ids to DIR/tokens.npy")
    o = parser.parse_args()
    if o.hidden % o.heads != 0 or o.heads % o.kv_heads != 0:
        parser.error("--hidden must be a multiple of --heads, and --heads of --kv-heads")
    return o


def list_tensors(o):
    """Name, shape and standard deviation (None: ones) of every tensor, in the order of the files."""
    kv = o.hidden // o.heads * o.kv_heads
    into_residual = SIGMA / math.sqrt(2 * o.layers)  # 2 L additions leave the residual stream at its usual size
    layer = [
        ("self_attn.q_proj", (o.hidden, o.hidden), SIGMA),
        ("self_attn.k_proj", (kv, o.hidden), SIGMA),
        ("self_attn.v_proj", (kv, o.hidden), SIGMA),
        ("self_attn.o_proj", (o.hidden, o.hidden), into_residual),
        ("mlp.gate_proj", (o.ffn, o.hidden), SIGMA),
        ("mlp.up_proj", (o.ffn, o.hidden), SIGMA),
        ("mlp.down_proj", (o.hidden, o.ffn), into_residual),
        ("input_layernorm", (o.hidden,), None),
        ("post_attention_layernorm", (o.hidden,), None),
    ]
    tensors = [("model.embed_tokens.weight", (o.vocab, o.hidden), SIGMA)]
    for i in range(o.layers):
        tensors += [(f"model.layers.{i}.{name}.weight", shape, sigma) for name, shape, sigma in layer]
    tensors += [("model.norm.weight", (o.hidden,), None), ("lm_head.weight", (o.vocab, o.hidden), SIGMA)]
    return tensors


def tensor_bytes(shape):
    return 2 * math.prod(shape)


def cut_into_shards(tensors):
    shards, used = [[]], 0
    for tensor in tensors:
        if shards[-1] and used + tensor_bytes(tensor[1]) > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor_bytes(tensor[1])
    return shards


def to_bf16(x):
    """The upper half of each f32, rounded to nearest, ties to even. Finite input."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_tensor(file, name, shape, sigma, seed):
    if sigma is None:
        file.write(to_bf16(np.ones(shape, np.float32)).tobytes())
        return
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    outliers = rng.choice(shape[0], min(OUTLIER_CHANNELS, shape[0]), replace=False) if "k_proj" in name else []
    rows_per_piece = max(1, PIECE_ELEMENTS // shape[1])
    for first in range(0, shape[0], rows_per_piece):
        rows = min(rows_per_piece, shape[0] - first)
        piece = rng.standard_normal((rows, shape[1]), np.float32)
        piece *= np.float32(sigma)
        for channel in outliers:
            if first <= channel < first + rows:
                piece[channel - first] *= np.float32(OUTLIER_FACTOR)
        file.write(to_bf16(piece).tobytes())


def write_shard(path, tensors, seed):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors:
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + tensor_bytes(shape)]}
        at += tensor_bytes(shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, sigma in tensors:
            write_tensor(file, name, shape, sigma, seed)


def write_json(path, document):
    with open(path, "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")


def write_config(o):
    write_json(
        os.path.join(o.folder, "config.json"),
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": o.hidden,
            "intermediate_size": o.ffn,
            "num_hidden_layers": o.layers,
            "num_attention_heads": o.heads,
            "num_key_value_heads": o.kv_heads,
            "head_dim": o.hidden // o.heads,
            "hidden_act": "silu",
            "max_position_embeddings": o.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": o.vocab,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        },
    )


def main():
    o = parse_arguments()
    os.makedirs(o.folder, exist_ok=True)
    if os.listdir(o.folder):
        sys.exit(f"{o.folder}: the folder is not empty")
    tensors = list_tensors(o)
    total = sum(tensor_bytes(shape) for _, shape, _ in tensors)
    free = shutil.disk_usage(o.folder).free
    if total > free:
        sys.exit(f"{o.folder}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

    start = time.monotonic()
    shards = cut_into_shards(tensors)
    weight_map = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_shard(os.path.join(o.folder, name), shard, o.seed)
        weight_map.update((tensor[0], name) for tensor in shard)
        print(f"{name}  {len(shard)} tensors  {time.monotonic() - start:.0f} s", file=sys.stderr)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(os.path.join(o.folder, "model.safetensors.index.json"), index)
    write_config(o)
    if o.tokens > 0:
        rng = np.random.Generator(np.random.SFC64([o.seed, zlib.crc32(b"tokens")]))
        np.save(os.path.join(o.folder, "tokens.npy"), rng.integers(3, o.vocab, o.tokens, dtype=np.int32))
    print(f"{o.folder}: {total / 2e9:.2f} billion weights, {total / 1e9:.2f} GB, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
