"""The drop-in quantisers on a real GPU: the plain forms' results, and nothing that waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lamkernels.bench.stock import moto as stock_moto
from lamkernels.bench.stock import open_genie as stock_open_genie
from lamkernels.bench.stock import tinyworlds as stock_tinyworlds
from lamkernels.bench.stock import villa_x as stock_villa_x
from torch import Tensor, nn

from lamkernels.compat import moto, open_genie, tinyworlds, villa_x

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; there is none here"),
]

Results = Callable[[nn.Module, Tensor], list[Tensor]]  # indices, quantised rows, loss


def of_villa_x(module: nn.Module, z: Tensor) -> list[Tensor]:
    z_q, loss, (_, _, indices) = module(z)
    return [indices, z_q, loss]


def of_moto(module: nn.Module, z: Tensor) -> list[Tensor]:
    z_q, indices, loss = module(z)
    return [indices, z_q, loss]


def of_tinyworlds(module: Any, z: Tensor) -> list[Tensor]:
    quantized = module(z)
    return [module.get_indices_from_latents(quantized), quantized, quantized.square().mean()]


def of_open_genie(module: nn.Module, z: Tensor) -> list[Tensor]:
    (out, idxs), loss = module(z, 2.0)
    return [idxs, out, loss]


CASES = [
    pytest.param(villa_x.VectorQuantizer2, stock_villa_x.VectorQuantizer2, (32, 128, 0.25), of_villa_x, id="villa-X"),
    pytest.param(moto.VectorQuantizer2, stock_moto.VectorQuantizer2, (128, 32, 0.25), of_moto, id="Moto"),
    pytest.param(
        tinyworlds.FiniteScalarQuantizer, stock_tinyworlds.FiniteScalarQuantizer, (2, 2), of_tinyworlds, id="tinyworlds"
    ),
    pytest.param(
        open_genie.LookupFreeQuantization,
        stock_open_genie.LookupFreeQuantization,
        (8, 1, 16),
        of_open_genie,
        id="open-genie",
    ),
]
WIDTH = {"VectorQuantizer2": 1, "FiniteScalarQuantizer": 2, "LookupFreeQuantization": 16}


def pair(ours: type[nn.Module], theirs: type[nn.Module], arguments: tuple[Any, ...]) -> tuple[nn.Module, nn.Module]:
    plain, fused = theirs(*arguments).cuda(), ours(*arguments).cuda()
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def inputs(ours: type[nn.Module], arguments: tuple[Any, ...]) -> Tensor:
    width = arguments[1] if ours.__name__ == "VectorQuantizer2" else WIDTH[ours.__name__]
    return torch.randn(64, 4, width, device="cuda")


@pytest.mark.parametrize(("ours", "theirs", "arguments", "results"), CASES)
def test_results_and_gradients(
    ours: type[nn.Module], theirs: type[nn.Module], arguments: tuple[Any, ...], results: Results
) -> None:
    modules, z = pair(ours, theirs, arguments), inputs(ours, arguments)
    both = []
    for module in modules:
        leaf = z.clone().requires_grad_()
        indices, quantized, loss = results(module, leaf)
        total = quantized.square().sum() + loss
        both.append([indices, quantized, loss, *torch.autograd.grad(total, [leaf, *module.parameters()])])
    assert torch.equal(both[0][0], both[1][0])
    torch.testing.assert_close(both[1], both[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs", "arguments", "results"), CASES)
def test_a_step_waits_for_nothing(
    ours: type[nn.Module], theirs: type[nn.Module], arguments: tuple[Any, ...], results: Results
) -> None:
    _, module = pair(ours, theirs, arguments)
    z = inputs(ours, arguments).requires_grad_()
    for mode in (0, "error"):  # the first step compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            _, quantized, loss = results(module, z)
            (quantized.sum() + loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_villa_x_has_upstreams_guard_against_autocast(dtype: torch.dtype) -> None:
    theirs, ours = pair(villa_x.VectorQuantizer2, stock_villa_x.VectorQuantizer2, (32, 128, 0.25))
    z = torch.randn(64, 4, 128, device="cuda").to(dtype)
    with torch.autocast("cuda", torch.bfloat16):
        got, expected = of_villa_x(ours, z), of_villa_x(theirs, z)
    assert torch.equal(got[0], expected[0]) and got[1].dtype == got[2].dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
