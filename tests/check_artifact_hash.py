#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reads an artifact with h5py and computes its hashes from docs/format.md alone, before and after h5repack.

Shows that the format is complete without kvq: usage check_artifact_hash.py <test_artifact>. The same for the file of
format 1.0 in tests/data, whose rules for hashes are the same.
Exit codes: 0 = equal, 1 = not, 77 = skipped because h5py or h5repack is not installed.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import h5py
    import numpy
except ImportError:
    print("skipped: python3 has no h5py")
    sys.exit(77)

TYPES = {"<i8": "i64", "<u8": "u64", "<f8": "f64", "<f4": "f32"}


def record(path, value):
    """(path, type, shape, bytes) of one dataset or attribute."""
    if isinstance(value, (bytes, numpy.bytes_)):
        return path, "utf8", "", bytes(value)
    value = numpy.asarray(value)
    return path, TYPES[value.dtype.str], ",".join(map(str, value.shape)), value.tobytes()


def records(path):
    found = []

    def visit(name, item):
        for key in item.attrs:
            value = item.attrs[key]
            found.append(record(f"/{name}@{key}", value.encode() if isinstance(value, str) else value))
        if isinstance(item, h5py.Dataset):
            found.append(record("/" + name, item[()]))

    with h5py.File(path, "r") as file:
        visit("", file)
        file.visititems(visit)
    return sorted(found, key=lambda r: r[0].encode())


def digest(found, covers):
    total = hashlib.sha256()
    for path, kind, shape, data in found:
        if covers(path):
            total.update(f"{path}\t{kind}\t{shape}\t{len(data)}\n".encode() + data)
    return total.hexdigest()


def check(path):
    found = records(path)
    stored = {r[0]: r[3].decode() for r in found if r[0] in ("/@content_sha256", "/@numeric_sha256")}
    content = digest(found, lambda p: p not in stored)
    numeric = digest(found, lambda p: p.startswith("/layers/") or p.startswith(("/quantizer@", "/quantizer/")))
    assert content == stored["/@content_sha256"], f"{path}: content hash {content}"
    assert numeric == stored["/@numeric_sha256"], f"{path}: numeric hash {numeric}"
    return content


def check_additions(path):
    """Where format.md says that 1.1 keeps what it added."""
    with h5py.File(path, "r") as file:
        assert file.attrs["kvq_format_version"] == b"1.1" and file.attrs["kvq_min_reader"] == b"1.1"
        assert file["quantizer"].attrs["recent_tokens"] == 128
        assert file["quantizer"].attrs["threshold_scope"] == b"matrix"
        last = file["layers/002"]
        assert last.attrs["attention_error"] == 2.125 and last["v/heldout"].attrs["clipped_share"] == 1 / 64
        assert last["k"].attrs["datatype"] == b"int-clamped" and last["k"].attrs["domain"] == b"post_rope"
        assert last["v/codebook"].shape == last["v/decode_levels"].shape == (2, 4)
        assert "threshold_lower" not in last["k"] and "threshold_lower" in file["layers/001/k"]
        even = numpy.linspace(-1, 1, 8)[None, :]
        assert numpy.all(abs(last["k/codebook"][()] - even) <= 2.0**-20)


def check_alloc(path):
    """Where format.md says that scheme "alloc" keeps what it has, and that it keeps nothing else."""
    with h5py.File(path, "r") as file:
        assert file.attrs["kvq_format_version"] == b"1.2" and file.attrs["kvq_min_reader"] == b"1.2"
        quantizer = file["quantizer"]
        assert quantizer.attrs["scheme"] == b"alloc" and quantizer.attrs["n_slots"] == 6
        assert "n_side_v" not in quantizer.attrs and "recent_tokens" not in quantizer.attrs
        rotation = quantizer["rotation"][()].astype("f8")
        assert numpy.allclose(rotation @ rotation.T, numpy.eye(8), atol=8 * 2.0**-23)
        for layer, kind in ((file["layers/000"], b"channel"), (file["layers/001"], b"affine")):
            keys, values = layer["k"], layer["v"]
            assert keys.attrs["table_kind"] == kind and "bits" not in keys.attrs and "codebook" not in keys
            widths = keys["widths"][()]
            n = (2**widths).sum() if kind == b"channel" else 63
            assert widths.dtype.str == "<i8" and widths.shape == (16,) and keys["key_levels"].shape == (n,)
            assert ("offset" in keys) == ("scale" in keys) == (kind == b"affine")
            dim = 2 if kind == b"channel" else 1
            assert values["codebook"].shape == (1, 2 ** values.attrs["bits"], dim) and len(values) == 3
            assert values.attrs["scale_format"] == (b"e4m3" if dim == 2 else b"f16")
            for name in ("key_levels", "threshold_lower", "threshold_upper"):
                assert numpy.array_equal(keys[name][()].astype("f2").astype("f4"), keys[name][()])


def seal(data):
    return b"kvq-sha256:" + hashlib.sha256(data).hexdigest().encode() + b"\n"


def check_repacked(kvq, path, content):
    again = path + ".again"
    options = ["-f", "SHUF", "-f", "GZIP=9"]
    with h5py.File(path, "r") as file:  # chunks are for tables of two dimensions
        options += ["-l", "CHUNK=1x2"] if file["layers/000/v/codebook"].ndim == 2 else []
    subprocess.run(["h5repack", *options, path, again], check=True)
    assert check(again) == content, "the content hash did not survive h5repack"
    with open(again, "rb+") as file:
        file.write(seal(file.read()))
    read = subprocess.run([kvq, "--read", again], stdout=subprocess.PIPE, text=True)
    assert read.stdout.strip() == content, read.stdout


def main():
    kvq = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        path, alloc = os.path.join(folder, "a.kvq.h5"), os.path.join(folder, "alloc.kvq.h5")
        subprocess.run([kvq, "--write-sample", path], check=True)
        subprocess.run([kvq, "--write-alloc", alloc], check=True)
        contents = {path: check(path), alloc: check(alloc)}
        check_additions(path)
        check_alloc(alloc)
        check(os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "format-1.0.kvq.h5"))
        for made in contents:
            with open(made, "rb") as file:
                data = file.read()
            assert data[-76:] == seal(data[:-76]), "the last line is not the hash of what lies before it"
        if shutil.which("h5repack") is None:
            print("skipped: no h5repack; hashes by h5py agree")
            sys.exit(77)
        for made, content in contents.items():
            check_repacked(kvq, made, content)
    print("hashes by h5py agree, before and after h5repack")


if __name__ == "__main__":
    main()
