"""The swap on the bottlenecks of the projects: their plain forms, and the installed vector-quantize-pytorch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vector_quantize_pytorch as vqp
from lamkernels.bench.stock import lapa, lapo, moto, open_genie, taming, tinyworlds, univla, villa_x
from torch import nn

from lamkernels.compat import Compat, swap

ROOT = Path(__file__).parents[2]
LAPO = SimpleNamespace(
    num_codebooks=2, num_discrete_latents=4, emb_dim=16, num_embs=64, commitment_cost=0.05, decay=0.999
)
CASES = {
    "lapa.NSVQ": lambda: lapa.NSVQ(64, 8, 32, "cpu", code_seq_len=4),
    "univla.VectorQuantizer": lambda: univla.VectorQuantizer(16, 128),
    "lapo.VQEmbeddingEMA": lambda: lapo.VQEmbeddingEMA(LAPO),
    "villa_x.VectorQuantizer2": lambda: villa_x.VectorQuantizer2(32, 16, 0.25),
    "villa_x.VectorQuantizer2 legacy": lambda: villa_x.VectorQuantizer2(32, 16, 0.25, legacy=True),
    "moto.VectorQuantizer2": lambda: moto.VectorQuantizer2(128, 32, 0.25),
    "moto.VectorQuantizer2 sane": lambda: moto.VectorQuantizer2(128, 32, 0.25, sane_index_shape=True, legacy=False),
    "taming.VectorQuantizer2": lambda: taming.VectorQuantizer2(32, 16, 0.25),
    "open_genie.LookupFreeQuantization": lambda: open_genie.LookupFreeQuantization(5, 2, input_dim=32),
    "tinyworlds.FiniteScalarQuantizer": lambda: tinyworlds.FiniteScalarQuantizer(2, 2),
    "vector_quantize.VectorQuantize": lambda: vqp.VectorQuantize(dim=32, codebook_size=64, heads=2, codebook_dim=8),
    "vector_quantize.VectorQuantize cosine": lambda: vqp.VectorQuantize(32, 64, use_cosine_sim=True),
    "vector_quantize.VectorQuantize k-means": lambda: vqp.VectorQuantize(32, 8, kmeans_init=True),
    "vector_quantize.VectorQuantize dead": lambda: vqp.VectorQuantize(32, 64, threshold_ema_dead_code=2),
    "vector_quantize.VectorQuantize close codes": lambda: vqp.VectorQuantize(256, 4096),
    "residual_vq.ResidualVQ": lambda: vqp.ResidualVQ(dim=32, codebook_size=64, num_quantizers=3),
    "residual_vq.ResidualVQ dropout": lambda: vqp.ResidualVQ(
        dim=32, codebook_size=64, num_quantizers=3, quantize_dropout=True
    ),
    "residual_vq.GroupedResidualVQ": lambda: vqp.GroupedResidualVQ(
        dim=32, codebook_size=64, num_quantizers=2, groups=2
    ),
    "fsq.FSQ": lambda: vqp.FSQ([8, 6, 5], dim=32),
    "residual_fsq.ResidualFSQ": lambda: vqp.ResidualFSQ(levels=[8, 5, 5, 3], num_quantizers=2, dim=4),
    "lfq.LFQ": lambda: vqp.LFQ(codebook_size=256, dim=32),
    "lfq.LFQ saturated": lambda: vqp.LFQ(codebook_size=256),
    "sim_vq.SimVQ": lambda: vqp.SimVQ(dim=32, codebook_size=64),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bottleneck_is_verified_and_swapped(name):
    module = CASES[name]()
    state = list(module.state_dict())
    report = swap(module)
    assert len(report.swapped) == 1, report
    assert report.swapped[0].fused.endswith(f".{name.partition(' ')[0]}")
    assert isinstance(module, Compat) and list(module.state_dict()) == state
    assert report.unswap() == ("",) and not isinstance(module, Compat)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: vqp.VectorQuantize(32, 64, orthogonal_reg_weight=1.0), "has no fused form"),
        (lambda: vqp.FSQ([8, 6], noise_dropout=0.5, preserve_symmetry=True), "noise_dropout has no fused form"),
    ],
)
def test_an_option_without_a_fused_form_stays_upstreams(module, words):
    report = swap(module())
    assert not report.swapped and words in report.refused[0].why


def test_forms_of_one_name_are_told_apart_without_running_them():
    model = nn.ModuleDict({"v": CASES["villa_x.VectorQuantizer2"](), "m": CASES["moto.VectorQuantizer2"]()})
    report = swap(model, verify=False)
    assert [e.fused.split(".")[2] for e in report.swapped] == ["villa_x", "moto"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    module = CASES["villa_x.VectorQuantizer2"]().to(dtype)
    assert swap(module).swapped and module.embedding.weight.dtype == dtype


def test_the_examples_of_the_page_run_as_they_are_written(capsys):
    page = (ROOT / "docs" / "swap.md").read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/swap.md", "exec"), names)
    out = capsys.readouterr().out
    table = re.search(r"^```\n(swapped.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert out.startswith(table[1]) and "would swap (verified): 1" in out
    assert re.search(r"output\[2\] differs by \d\.\de[+-]\d+ \(\d\.\de-\d+ is allowed\)", out)


def test_import_loads_it_when_it_is_used():
    code = (
        "import sys, lamkernels as lk; before = 'lamkernels.compat' in sys.modules; import torch;"
        "print(before, callable(lk.compat.swap), lk.compat.swap(torch.nn.Linear(2, 2)))"
    )
    out = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split(None, 2) == ["False", "True", "nothing to swap\n"]
