#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reads a measurement of kvq with h5py and with the example in docs/format.md.

Shows that the description is enough: usage check_measurement_h5py.py <test_measurement> <docs/format.md>.
Exit codes: 0 = it is, 1 = not, 77 = skipped because h5py is not installed.
"""
import hashlib
import os
import re
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy
except ImportError:
    print("skipped: python3 has no h5py")
    sys.exit(77)

BINS = 8192
WEIGHTINGS = ["none", "fisher", "fisher-scaled", "range"]


def example(document):
    with open(document, encoding="utf-8") as file:
        found = [code for code in re.findall(r"```python\n(.*?)```", file.read(), re.S) if "def read_histogram" in code]
    scope = {}
    exec(found[0], scope)  # our own documentation
    return scope["read_histogram"]


def check_tensor(group, is_k):
    """All that the table lists is there with its type and shape, and nothing else."""
    expected = {"counts": ("<i8", (2, 4)), "sums": ("<f8", (2, 12))}
    for name in WEIGHTINGS:
        expected[f"weight_{name}"] = expected[f"mean_{name}"] = ("<f4", (2, BINS))
    if is_k:
        expected["threshold_lower"] = expected["threshold_upper"] = ("<f4", (12,))
    found = {name: (x.dtype.str, x.shape) for name, x in group.items()}
    assert found == expected, found
    edges = -1 + 2 * numpy.arange(BINS + 1) / BINS
    for name in WEIGHTINGS:
        weight, mean = group[f"weight_{name}"][()], group[f"mean_{name}"][()]
        assert group[f"weight_{name}"].compression == "gzip" and group[f"weight_{name}"].fletcher32
        assert numpy.all(weight >= 0)
        inside = (mean >= edges[:-1]) & (mean <= edges[1:])
        assert numpy.all(inside | (weight == 0))


CHANNEL_PARTS = {  # name: type, shape
    "channel_weight": ("<f4", (12, 1024)),
    "channel_mean": ("<f4", (12, 1024)),
    "channel_scatter": ("<f8", (12,)),
    "channel_points": ("<i8", (12,)),
    "channel_outliers": ("<i8", (12,)),
}
ROTATED_PARTS = {
    "weight": ("<f4", (BINS,)),
    "mean": ("<f4", (BINS,)),
    "pair_weight": ("<f4", (256, 256)),
    "pair_x": ("<f4", (256, 256)),
    "pair_y": ("<f4", (256, 256)),
    "scatter": ("<f8", (2,)),
    "n_points": ("<i8", (1,)),
    "scale_exponent": ("<i8", (1,)),
}


def check_allocated(path):
    """What a file of 1.1 adds."""
    with h5py.File(path, "r") as file:
        assert file.attrs["kvq_format_version"] == b"1.1" and file.attrs["kvq_min_reader"] == b"1.0"
        measured = file["measurement"].attrs
        assert measured["allocated"] == 1 and measured["channel_weighting"] == b"fisher-scaled"
        assert measured["rotation"] == b"none" and measured["scale_format"] == b"f16"
        grids = [measured[name] for name in ("channel_bins", "value_reach", "pair_cells", "pair_reach")]
        assert grids == [1024, 8, 256, 4]
        for layer in file["layers"].values():
            for f in "01":
                found = {name: (x.dtype.str, x.shape) for name, x in layer["k"][f].items() if "channel_" in name}
                assert found == CHANNEL_PARTS, found
                assert not any("channel_" in name for name in layer["v"][f])
            found = {name: (x.dtype.str, x.shape) for name, x in layer["rotated"].items()}
            assert found == ROTATED_PARTS, found
            assert layer["kl"].shape == (2,) and layer["kl"].dtype.str == "<f8"


def check_layer(layer):
    assert sorted(layer) == ["k", "moments", "spectrum", "v"]
    for tensor in "kv":
        assert sorted(layer[tensor]) == ["0", "1"]
        for group in layer[tensor].values():
            check_tensor(group, tensor == "k")
    for tensor, heads in zip("qkv", (4, 2, 2)):
        moments, values = layer["moments"][tensor][()], layer["spectrum"][tensor][()]
        vectors = layer["spectrum"][tensor + "_vectors"][()]
        assert moments.shape == vectors.shape == (heads, 6, 6) and values.shape == (heads, 6)
        assert numpy.allclose(numpy.linalg.eigvalsh(moments)[:, ::-1], values, rtol=1e-9, atol=1e-12)
        assert numpy.allclose(vectors.transpose(0, 2, 1) * values[:, None, :] @ vectors, moments, atol=1e-9)
        largest = numpy.take_along_axis(vectors, abs(vectors).argmax(axis=2)[..., None], axis=2)
        assert numpy.all(largest > 0)


def main():
    kvq, document = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "a.kvqm.h5")
        wrote = subprocess.run([kvq, "--write-sample", path], check=True, stdout=subprocess.PIPE, text=True)
        with open(path, "rb") as file:
            data = file.read()
        assert hashlib.sha256(data[:-76]).hexdigest() == wrote.stdout.strip()
        assert data[-76:] == b"kvq-sha256:" + wrote.stdout.strip().encode() + b"\n"
        with h5py.File(path, "r") as file:
            assert file.attrs["kvq_format"] == b"kvq.measurement" and file.attrs["kvq_format_version"] == b"1.0"
            assert file["model"].attrs["rope_theta"] == 500000.1 and file["dataset"].attrs["seed"] == 2**64 - 8
            measured = file["measurement"]
            assert measured.attrs["weightings"].decode().split(",") == WEIGHTINGS
            assert measured.attrs["bins"] == BINS and list(measured["fractions"]) == [0, 0.01]
            assert measured.attrs["k_domain"] == b"post_rope" and measured.attrs["k_slots"] == -1
            assert list(file["layers"]) == ["000", "001"] and "quantizer" not in file
            for layer in file["layers"].values():
                check_layer(layer)
        allocated = os.path.join(folder, "b.kvqm.h5")
        subprocess.run([kvq, "--write-allocated", allocated], check=True, stdout=subprocess.DEVNULL)
        check_allocated(allocated)
        weight, product, samples = example(document)(path, 1, "v", 1, "fisher-scaled")
        assert weight.shape == product.shape == (BINS,) and samples > 0 and numpy.all(abs(product) <= weight)
    print("a measurement is what docs/format.md says")


if __name__ == "__main__":
    main()
