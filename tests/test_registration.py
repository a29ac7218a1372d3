"""What torch asks of an operator: schema, fake, autograd, compile, autocast, vmap, checkpointing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lamkernels as lk

OPS = torch.ops.lamkernels
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def quantize(x, codebook, backend, **options):
    out = lk.vector_quantize(x, codebook, backend=backend, **options)
    return out.quantized.float().square().mean() + out.commitment_loss + out.codebook_loss, out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    x = torch.randn(2, 30, 4, dtype=dtype, requires_grad=True)
    codebook = torch.randn(2, 5, 4, dtype=dtype, requires_grad=True)
    mask = torch.rand(2, 30) < 0.5
    indices = torch.randint(-1, 5, (2, 30))
    residual_sums, rows, grad = torch.randn(2, 5, 4), torch.tensor([30, 30]), torch.randn(2)
    saved = (x.detach(), x.detach(), indices, residual_sums, rows)
    for operator, arguments in (
        (OPS.nearest_code, (x.detach(), codebook.detach(), "l2", "default", True, backend)),
        (OPS.nearest_code, (x.detach(), codebook.detach(), "dot", "exact", False, backend)),
        (OPS.vector_quantize, (x, codebook, None, None, "l2", "default", "ste", backend)),
        (OPS.vector_quantize, (x, codebook, mask, None, "dot", "default", "rotation", backend)),
        (OPS.vector_quantize, (x, codebook, mask, torch.randn_like(x), "cosine", "default", "noise", backend)),
        (OPS.code_statistics, (x, indices, 5, backend)),
        (
            OPS.vector_quantize_backward,
            (*saved, x.detach(), x.detach(), grad, grad, "cosine", "noise", backend),
        ),
        (
            OPS.vector_quantize_backward,
            (*saved, None, None, grad, grad, "l2", "ste", backend),
        ),
    ):
        # opcheck adds the outputs up in their order, which fails where an integer comes before a float with a
        # gradient; test_compiled_lookup_and_statistics goes the way that it would
        skipped = ("test_aot_dispatch_dynamic",) if operator is OPS.code_statistics else ()
        torch.library.opcheck(operator, arguments, test_utils=[name for name in UTILITIES if name not in skipped])


@pytest.mark.parametrize("options", [{}, {"gradient": "rotation", "metric": "cosine"}, {"gradient": "noise"}], ids=str)
def test_compiled_equals_eager_without_a_graph_break(backend, options):
    torch.compiler.reset()  # one function, compiled anew for each set of options
    compiled = torch.compile(quantize, fullgraph=True, dynamic=True)
    for rows in (16, 33, 7):
        for dtype in (torch.float32, torch.bfloat16):
            x, codebook = torch.randn(rows, 3, 8).to(dtype), torch.randn(6, 8)
            noise = {"noise": torch.randn_like(x)} if options.get("gradient") == "noise" else {}
            results = []
            for function in (quantize, compiled):
                leaf, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
                loss, out = function(leaf, codes, backend, **options, **noise)
                loss.backward()
                results.append((loss, *out, leaf.grad, codes.grad))
            for eager, graph in zip(*results, strict=True):
                torch.testing.assert_close(eager, graph, rtol=1e-6, atol=1e-7)


def test_compiled_lookup_and_statistics(backend):
    @torch.compile(fullgraph=True, dynamic=True)
    def function(x, codebook):
        indices = lk.nearest_code(x, codebook, metric="cosine", backend=backend)
        return (
            indices,
            *lk.code_statistics(x, indices, codebook.shape[0], backend=backend),
            lk.lookup(indices, codebook),
        )

    for rows in (5, 40):
        x, codebook = torch.randn(rows, 4, requires_grad=True), torch.randn(9, 4)
        indices, counts, sums, codes = function(x, codebook)
        (sums * codebook).sum().backward()
        assert torch.equal(x.grad, codebook[indices])
        assert torch.equal(indices, lk.nearest_code(x, codebook, metric="cosine", backend=backend))
        assert torch.equal(counts, torch.bincount(indices, minlength=9))
        assert torch.equal(codes, codebook[indices])
        torch.testing.assert_close(sums, lk.code_statistics(x, indices, 9, backend=backend)[1])


def test_compiled_module_trains(backend):
    torch.manual_seed(0)
    eager = lk.VectorQuantize(8, 16, dead_code_threshold=0.5, backend=backend)
    graph = lk.VectorQuantize(8, 16, dead_code_threshold=0.5, backend=backend)
    graph.load_state_dict(eager.state_dict())
    compiled = torch.compile(graph, fullgraph=True, dynamic=True)
    for rows in (40, 60):
        x = torch.randn(rows, 8)
        q, indices, loss = eager(x)
        q2, indices2, loss2 = compiled(x)
        assert torch.equal(indices, indices2) and torch.equal(q, q2)
        torch.testing.assert_close(loss, loss2)
        # the replacement of dead codes draws from a generator that the compiler may advance differently
        alive = eager.cluster_size > 0.5
        torch.testing.assert_close(eager.cluster_size[alive], graph.cluster_size[alive])
        graph.load_state_dict(eager.state_dict())


def test_autocast_leaves_the_operators_alone(backend):
    x, codebook = torch.randn(50, 8), torch.randn(6, 8)
    outside = lk.vector_quantize(x, codebook, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lk.vector_quantize(x, codebook, backend=backend)
    for a, b in zip(outside, inside, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_vmap_over_rows_codebooks_and_both(backend):
    x, codebooks = torch.randn(4, 20, 8), torch.randn(4, 6, 8)

    def function(x, codebook):
        out = lk.vector_quantize(x, codebook, backend=backend)
        indices = lk.nearest_code(x, codebook, backend=backend)
        return (*out, indices, *lk.code_statistics(x, indices, 6, backend=backend))

    for dims in ((0, None), (None, 0), (0, 0)):
        arguments = [t if dim == 0 else t[0] for t, dim in zip((x, codebooks), dims, strict=True)]
        batched = torch.vmap(function, in_dims=dims)(*arguments)
        for i in range(4):
            single = function(*(t[i] if dim == 0 else t for t, dim in zip(arguments, dims, strict=True)))
            for many, one in zip(batched, single, strict=True):
                torch.testing.assert_close(many[i], one)


@pytest.mark.parametrize("gradient", ["ste", "rotation", "noise"])
def test_vmap_has_gradients(backend, gradient):
    x, codebook = torch.randn(3, 20, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    options = {"gradient": gradient} | ({"noise": torch.randn(20, 8)} if gradient == "noise" else {})
    losses = torch.vmap(lambda rows: quantize(rows, codebook, backend, **options)[0])(x)
    losses.sum().backward()
    batched = x.grad, codebook.grad
    x.grad = codebook.grad = None
    sum(quantize(rows, codebook, backend, **options)[0] for rows in x).backward()
    torch.testing.assert_close(batched, (x.grad, codebook.grad))


def test_checkpointing_recomputes_the_same(backend):
    x, codebook = torch.randn(30, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    quantize(x, codebook, backend)[0].backward()
    plain = x.grad, codebook.grad
    x.grad = codebook.grad = None
    checkpoint(lambda x, c: quantize(x, c, backend)[0], x, codebook, use_reentrant=False).backward()
    torch.testing.assert_close(plain, (x.grad, codebook.grad))


def test_codes_of_indices_under_vmap():
    indices = torch.tensor([[0, 3, -1], [2, 1, 0]])
    codebook = torch.randn(4, 5)
    for function in (
        lambda i: lk.lookup(i, codebook),
        lambda i: lk.finite_scalar_codes(i, [2, 2]),
        lambda i: lk.lookup_free_codes(i, 2),
    ):
        torch.testing.assert_close(torch.vmap(function)(indices), function(indices), equal_nan=True)


def test_plain_tensors_go_past_the_dispatcher_and_others_do_not(backend, monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    from lamkernels.ops import registration
    from lamkernels.ops.vector_quantize.op import vector_quantize

    dispatched = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            dispatched.append(func.name())
            return func(*args, **(kwargs or {}))

    calls, kernel = [], registration._KERNELS["vector_quantize"]
    monkeypatch.setitem(registration._KERNELS, "vector_quantize", lambda *args: calls.append(1) or kernel(*args))
    x, codebook = torch.randn(1, 40, 4, requires_grad=True), torch.randn(1, 5, 4, requires_grad=True)
    rest = (None, None, "l2", "default", "ste", backend)
    mine = vector_quantize(x, codebook, *rest)
    with Note():
        theirs = vector_quantize(x, codebook, *rest)
    assert len(calls) == 1 and "lamkernels::vector_quantize" in dispatched
    weights = torch.randn_like(x)
    grads = [
        torch.autograd.grad((out[0] * weights).sum() + 3 * out[2].sum() + out[3].sum(), (x, codebook))
        for out in (mine, theirs)
    ]
    for a, b in zip((*mine, *grads[0]), (*theirs, *grads[1]), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    with torch.no_grad():
        assert not vector_quantize(x, codebook, *rest)[0].requires_grad and len(calls) == 2
    (grad,) = torch.autograd.grad(vector_quantize(x, codebook, *rest)[2].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)
