"""Labels are those of a plain loop over pairs, whatever the source, the codebook and the batch size."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from label_cases import CODEBOOK, ROWS, SLOTS, STARTS, D, K, encoder, expected, features, labels_of, read, write_source
from torch import nn

import lamkernels as lk
from lamkernels.labelling import Labeller, run
from lamkernels.lam import Batch, Source


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".parquet"])
@pytest.mark.parametrize(("lag", "shard_rows", "batch_size"), [(1, 100, 33), (3, 51, 7), (60, 1000, 1000)])
def test_every_pair_of_a_file_gets_its_code(tmp_path, format, suffix, lag, shard_rows, batch_size):
    path, out = tmp_path / f"a{suffix}", tmp_path / "out"
    rows, starts = write_source(path)
    manifest = lk.label(
        str(path), encoder, CODEBOOK, out, format=format, vectors=True, lag=lag, shard_rows=shard_rows,
        batch_size=batch_size,
    )  # fmt: skip
    found, vectors = read(out)
    wanted = expected(rows, starts, lag)
    assert found == [(str(path), *pair) for pair in wanted]
    assert manifest["pairs"] == len(wanted) and manifest["rows"] == ROWS and manifest["not_finite"] == 0
    assert manifest["sources"][0]["episodes"] == starts.sum()
    indices = torch.tensor([pair[3] for pair in wanted])
    assert torch.equal(torch.tensor(vectors), CODEBOOK[indices].flatten(1))
    numbers = sorted({row // shard_rows for _, _, row, _ in wanted})
    assert [shard["file"] for shard in manifest["sources"][0]["shards"]] == [
        f"part-00000-{number:05d}.{format}" for number in numbers
    ]
    assert json.loads((out / "_manifest.json").read_text()) == manifest


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_videos_and_shapes(tmp_path, format):
    av = pytest.importorskip("av")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 250, 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))

    def brightness(o, o_next):
        assert o.shape[1:] == (8, 8, 3)
        return o_next.mean((1, 2))[:, :1]

    levels = torch.tensor([[0.0], [0.5], [1.0]])
    lk.label(path, brightness, levels, tmp_path / "out", format=format, side=8, shape=(8, 8, 3), batch_size=4)
    found, _ = read(tmp_path / "out")
    assert [(row[2], row[4]) for row in found] == [
        (t, [int((10 * (t + 1) / 255 - levels).abs().argmin())]) for t in range(24)
    ]


def test_games_have_no_file(tmp_path, monkeypatch):
    class Played(Source):
        def __iter__(self):
            yield Batch(torch.from_numpy(features(0)), torch.from_numpy(STARTS), None, "atari:pong")

    monkeypatch.setattr(run, "Source", Played)
    manifest = lk.label("atari:pong", encoder, CODEBOOK, tmp_path / "out", format="safetensors")
    assert read(tmp_path / "out")[0] == [("atari:pong", *pair) for pair in expected(features(0), STARTS)]
    assert manifest["options"]["files"] == {}


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_the_labels_do_not_depend_on_the_batch_size(tmp_path, data, format):
    found = []
    for batch_size in (1, 7, 256, 10_000):
        out = tmp_path / str(batch_size)
        lk.label(data, encoder, CODEBOOK, out, format=format, vectors=True, batch_size=batch_size, shard_rows=200)
        found.append(labels_of(out))
    assert len(found[0]) == 7 and all(other == found[0] for other in found[1:])


def test_the_codes_of_a_bit_exact_encoder_do_not_depend_on_the_batch_size():
    x = torch.randn(3000, 4, 32)
    codebook = torch.randn(64, 32)
    whole = Labeller(lambda o, _: o.view(-1, 4, 32), codebook)(x.flatten(1), x.flatten(1))
    for size in (1, 2, 13, 1000):
        parts = [Labeller(lambda o, _: o.view(-1, 4, 32), codebook)(p, p).indices for p in x.flatten(1).split(size)]
        assert torch.equal(torch.cat(parts), whole.indices)


# codebooks of every kind


def labels(x, codebook, **options):
    return Labeller(lambda o, _: o.view(x.shape).to(x.dtype), codebook, **options)(x.flatten(1), x.flatten(1))


def test_a_codebook_per_head():
    x, codebook = torch.randn(40, 2, 4, D), torch.randn(2, K, D)
    found = labels(x, codebook)
    assert found.indices.shape == (40, 2, 4)
    for head in range(2):
        wanted = torch.cdist(x[:, head].reshape(-1, D).double(), codebook[head].double()).argmin(-1).view(40, 4)
        assert torch.equal(found.indices[:, head], wanted)
        assert torch.equal(found.vectors[:, head], codebook[head][wanted])


def test_a_residual_list():
    x, codebooks = torch.randn(40, 2, D), [torch.randn(K, D), 0.3 * torch.randn(4, D), 0.1 * torch.randn(9, D)]
    found = labels(x, codebooks)
    rest, total = x, torch.zeros_like(x)
    for position, codes in enumerate(codebooks):
        wanted = torch.cdist(rest.double(), codes.double()).argmin(-1)
        assert torch.equal(found.indices[..., position], wanted)
        rest, total = rest - codes[wanted], total + codes[wanted]
    assert found.indices.shape == (40, 2, 3) and torch.equal(found.vectors, total)


@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_metrics(metric):
    x = torch.randn(40, D)
    scores = (
        x.double() @ (nn.functional.normalize(CODEBOOK.double(), dim=-1) if metric == "cosine" else CODEBOOK.double()).T
    )
    found = labels(x, CODEBOOK, metric=metric)
    assert torch.equal(found.indices, scores.argmax(-1)) and torch.equal(found.vectors, CODEBOOK[found.indices])


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.float32, torch.float64)],
)
def test_dtypes_meet_without_loss(x_dtype, dtype):
    x, codebook = torch.randn(40, D).to(x_dtype), CODEBOOK.to(dtype)
    assert torch.equal(labels(x, codebook).indices, torch.cdist(x.double(), codebook.double()).argmin(-1))


@pytest.mark.parametrize(
    "module",
    [
        lk.VectorQuantize(D, K),
        lk.VectorQuantize(D, K, metric="cosine"),
        lk.SimVQ(D, K),
        lk.FSQ([3, 3, 2]),
        lk.LFQ(D),
    ],
    ids=["VectorQuantize", "cosine", "SimVQ", "FSQ", "LFQ"],
)
def test_modules(module):
    module.eval()
    x = torch.randn(40, 2, D)
    quantized, indices, _ = module(x)
    x[3, 1, 0], x[7, 0, 2] = torch.nan, torch.inf
    found = labels(x, module)
    bad = ~x.isfinite().all(-1)
    assert torch.equal(found.indices, indices.masked_fill(bad, -1))
    assert torch.equal(found.vectors[~bad], quantized[~bad]) and bool(found.vectors[bad].isnan().all())


def test_modules_of_another_library():
    vqp = pytest.importorskip("vector_quantize_pytorch")
    module = vqp.ResidualVQ(dim=D, codebook_size=K, num_quantizers=3).eval()
    x = torch.randn(40, 2, D)
    quantized, indices, _ = module(x)
    found = labels(x, module)
    assert torch.equal(found.indices, indices) and torch.equal(found.vectors, quantized)


@pytest.mark.parametrize("codebook", [CODEBOOK, [CODEBOOK, CODEBOOK], lk.VectorQuantize(D, K).eval()])
@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_rows_that_are_not_finite(tmp_path, codebook, format):
    rows = features(0, 60)
    rows[10, 0], rows[20, 4] = np.nan, np.inf  # of the first and of the second slot
    np.save(tmp_path / "a.npy", rows)
    manifest = lk.label(tmp_path / "a.npy", encoder, codebook, tmp_path / "out", format=format, vectors=True)
    found, vectors = read(tmp_path / "out")
    bad = {9: 0, 10: 0, 19: 1, 20: 1}
    for (_, _, _, row, indices), vector in zip(found, torch.tensor(vectors).view(-1, SLOTS, D), strict=True):
        for slot in range(SLOTS):
            index = torch.tensor(indices).view(SLOTS, -1)[slot]
            assert bool((index == -1).all() if bad.get(row) == slot else (index >= 0).all())
            assert bool(vector[slot].isnan().all()) == (bad.get(row) == slot)
    assert manifest["not_finite"] == 4 == manifest["sources"][0]["shards"][0]["not_finite"]
