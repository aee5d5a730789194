#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What the gradient pass of a calibration costs in PyTorch on the CPU: squared gradients of the k_proj and v_proj outputs.

The model is loaded with transformers in f32. Every sample goes forward and backward once, through the mean loss per
token; the squares of the gradients are kept for all samples, one row per token, as a fit of KVQuant needs them. This is
the fastest form we know: parameters need no gradients, only what depends on the embedding does, and a gradient is
squared the moment it exists. Nothing is written to disk, unlike in the public code, and the fit is not included.

Prints one JSON document. Needs Python 3 with torch, transformers, numpy; for a GGUF also gguf and accelerate.
"""

import argparse
import json
import os
import resource
import sys
import time

import numpy as np
import torch
import transformers


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="Hugging Face directory or one GGUF file")
    parser.add_argument("--tokens", required=True, metavar="FILE.npy", help="token ids; samples are taken one after the other")
    parser.add_argument("--samples", type=int, default=16, metavar="N")
    parser.add_argument("--seq-len", type=int, default=2048, metavar="S")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--save", metavar="FILE.npz", help="the squared gradients, arrays k0, v0, k1, ... [samples * S, d]")
    return parser.parse_args()


def load_model(path, attention):
    folder, file = (path, None) if os.path.isdir(path) else os.path.split(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder or ".", gguf_file=file, dtype=torch.float32, attn_implementation=attention, local_files_only=True
    )
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False
    return model


def watch_projections(model):
    """Squared gradients by name ("k0", "v0", ...), a list with one [S, d] tensor per sample that was run."""
    squares = {}

    def watch(name):
        def on_gradient(gradient):
            squares[name].append(gradient[0].square())

        def on_output(module, inputs, output):
            output.register_hook(on_gradient)

        return on_output

    for i, layer in enumerate(model.model.layers):
        for letter, projection in [("k", layer.self_attn.k_proj), ("v", layer.self_attn.v_proj)]:
            squares[f"{letter}{i}"] = []
            projection.register_forward_hook(watch(f"{letter}{i}"))
    return squares


def run_sample(model, ids):
    embeddings = model.get_input_embeddings()(ids).requires_grad_()  # so that even layer 0 has gradients
    loss = model(inputs_embeds=embeddings, labels=ids).loss
    loss.backward()
    return loss.item()


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    o = parse_arguments()
    torch.set_num_threads(o.threads)
    ids = np.load(o.tokens).astype(np.int64)
    if len(ids) < o.samples * o.seq_len:
        sys.exit(f"{o.tokens}: {len(ids)} token ids, but {o.samples} x {o.seq_len} are needed")

    start = time.monotonic()
    model = load_model(o.model, o.attention)
    load_s, load_peak = time.monotonic() - start, peak_bytes()
    squares = watch_projections(model)
    run_sample(model, torch.from_numpy(ids[: min(64, o.seq_len)])[None])  # what PyTorch does once is not counted
    for rows in squares.values():
        rows.clear()
    sample_s, losses = [], []
    for i in range(o.samples):
        start = time.monotonic()
        losses.append(run_sample(model, torch.from_numpy(ids[i * o.seq_len : (i + 1) * o.seq_len])[None]))
        sample_s.append(round(time.monotonic() - start, 3))
        print(f"sample {i + 1}/{o.samples}  loss {losses[-1]:.4f}  {sample_s[-1]:.1f} s", file=sys.stderr)

    report = {
        "schema": "kvq.pytorch_fisher/1",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "attention": o.attention,
        "samples": o.samples,
        "seq_len": o.seq_len,
        "mean_loss": float(np.mean(losses)),
        "load_s": round(load_s, 3),
        "gradients_s": round(sum(sample_s), 3),
        "sample_s": sample_s,
        "squared_gradient_bytes": sum(4 * x.numel() for rows in squares.values() for x in rows),
        "peak_rss_load_bytes": load_peak,
        "peak_rss_bytes": peak_bytes(),
    }
    if o.save:
        np.savez(o.save, **{name: torch.cat(rows).numpy() for name, rows in squares.items()})
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
