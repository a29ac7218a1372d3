"""The upkeep of a codebook in Triton's interpreter beside the operators of torch that a CPU takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import lamkernels as lk
from lamkernels.nn import learned_codebook
from lamkernels.ops.codebook_upkeep import triton as upkeep


@pytest.mark.parametrize(
    ("update", "dim", "masked", "dtype"),
    [("ema", 5, False, torch.float32), ("gradient", 140, True, torch.bfloat16), ("ema", 3, True, torch.float16)],
    ids=str,
)
def test_an_update_with_dead_codes_is_that_of_torch(
    update: str, dim: int, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    options = {"update": update, "decay": 0.6, "dead_code_threshold": 0.9, "backend": "reference"}
    plain, ours = (lk.VectorQuantize(dim, 20, **options) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    ours.draws.fill_(2**40)
    plain.draws.fill_(2**40)
    replaced = 0
    for step in range(3):
        x = torch.randn(2, 3, dim, 2).to(dtype).transpose(2, 3)  # rows in groups
        x[1, 0, 0, 1] = torch.inf
        mask = torch.rand(2, 3, 2) < 0.7 if masked else None
        counts = torch.randint(0, 3, (20,)) * (step != 1)
        sums = torch.randn(20, dim) * counts[:, None]
        for vq, module in ((plain, None), (ours, upkeep)):
            monkeypatch.setattr(learned_codebook, "gpu_upkeep", lambda *_, given=module, **__: given)
            before = vq.codebook._version
            vq.update_codebook(counts, sums, x, mask)
            assert vq.codebook._version > before
        for name, value in plain.state_dict().items():
            # the sum of the sizes has another order; rows and thresholds are the same bits
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-6, atol=1e-7)
        fresh = plain.cluster_size == 0.9
        assert torch.equal(ours.codebook[fresh], plain.codebook[fresh])
        replaced += int(fresh.sum())
        ours.load_state_dict(plain.state_dict())
    assert replaced > 5
