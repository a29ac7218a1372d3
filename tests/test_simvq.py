from __future__ import annotations

import pytest
import torch
from torch import nn

import lamkernels as lk


def mlp():
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 8))


@pytest.mark.parametrize("transform", [None, mlp], ids=["linear", "mlp"])
@pytest.mark.parametrize("codes", [1, 16, 300])
def test_agrees_with_vector_quantize_pytorch(backend, codes, transform):
    peer_class = pytest.importorskip("vector_quantize_pytorch").SimVQ
    make = (lambda: None) if transform is None else transform
    peer = peer_class(8, codes, codebook_transform=make(), frozen_codebook_dim=6, rotation_trick=False)
    module = lk.SimVQ(8, codes, frozen_dim=6, code_transform=make(), backend=backend)
    module.load_state_dict(peer.state_dict())
    x = torch.randn(5, 30, 8, requires_grad=True)
    grad = torch.randn_like(x)
    results = []
    for function in (peer, module):
        quantized, indices, loss = function(x)
        parameters = list(function.code_transform.parameters())
        grads = torch.autograd.grad([quantized, loss], [x, *parameters], [grad, None])
        results.append((quantized, loss, *grads, indices))
    *theirs, their_indices = results[0]
    *ours, indices = results[1]
    assert torch.equal(indices, their_indices)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not module.frozen_codebook.requires_grad and all(grad.abs().max() > 0 for grad in ours[2:])
    torch.testing.assert_close(module.indices_to_codes(indices), peer.indices_to_codes(indices), rtol=1e-5, atol=1e-6)


def test_weights_masks_and_rows_that_are_not_finite(backend):
    module = lk.SimVQ(4, 10, commitment_weight=0.5, codebook_weight=2.0, backend=backend, dtype=torch.float64)
    x = torch.randn(60, 4, dtype=torch.float64)
    x[3, 1] = torch.nan
    mask = torch.arange(60) % 4 != 2
    inside = mask & x.isfinite().all(-1)
    quantized, indices, loss = module(x, mask)
    assert quantized[3].isnan().all() and indices[3] == 0 and (quantized[~mask] == 0).all()
    codes = module.codebook.detach()
    nearest = torch.cdist(x[inside], codes).argmin(-1)
    assert torch.equal(indices[inside], nearest)
    torch.testing.assert_close(loss, 2.5 * (x[inside] - codes[nearest]).square().mean())
    loss.backward()
    weight = module.code_transform.weight
    got, weight.grad = weight.grad, None
    (2.0 * (x[inside] - module.codebook[nearest]).square().mean()).backward()
    torch.testing.assert_close(got, weight.grad)


def test_training_moves_every_code_and_lowers_the_loss(backend):
    module = lk.SimVQ(4, 32, backend=backend)
    x = 3 + torch.randn(500, 4)  # far from the first codebook: few codes are chosen
    before = module.codebook.detach().clone()
    frozen = module.frozen_codebook.clone()
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    losses = []
    for _ in range(60):
        loss = module(x)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(module.frozen_codebook, frozen)
    assert (module.codebook.detach() - before).abs().amax(-1).min() > 0


def test_compiled_autocast_and_half_rows(backend):
    module = lk.SimVQ(8, 16, backend=backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    autocast = torch.autocast("cpu", torch.bfloat16)(module)
    for rows in (16, 33):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, 3, 8).to(dtype)
            results = []
            for function in (module, compiled, autocast):
                leaf = x.clone().requires_grad_()
                out = function(leaf)
                loss = out[0].float().square().sum() + out[2]
                results.append((*out, *torch.autograd.grad(loss, [leaf, module.code_transform.weight])))
            for other in results[1:]:
                torch.testing.assert_close(results[0], other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lk.SimVQ(0, 4), "dim is 0; it must be at least 1"),
        (lambda: lk.SimVQ(4, 0), "codebook_size is 0"),
        (lambda: lk.SimVQ(4, 4, frozen_dim=0), "frozen_dim is 0"),
        (lambda: lk.SimVQ(4, 4, dtype=torch.float16), "dtype is torch.float16; it must be float32 or float64"),
        (lambda: lk.SimVQ(4, 4, precision="high"), "precision is 'high'"),
        (lambda: lk.SimVQ(4, 4, backend="cpp"), "backend is 'cpp'"),
        (lambda: lk.SimVQ(4, 5, code_transform=nn.Linear(4, 3))(torch.randn(2, 4)), r"shape \(5, 3\).*\(5, 4\)"),
        (lambda: lk.SimVQ(4, 5)(torch.randn(2, 3)), "x has rows of 3 and codebook of 4"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
