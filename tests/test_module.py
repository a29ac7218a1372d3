from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import lamkernels as lk
from lamkernels.nn.dead_codes import own_candidates, uniform


def ema_reference(state, x, indices, decay, eps):
    """One update of van den Oord et al. 2017, appendix A.1, with Laplace smoothing, in fp64."""
    codebook, size, sums = (t.double() for t in state)
    one_hot = F.one_hot(indices.reshape(-1), len(codebook)).double()
    size = decay * size + (1 - decay) * one_hot.sum(0)
    sums = decay * sums + (1 - decay) * one_hot.T @ x.reshape(-1, x.shape[-1]).double()
    smoothed = (size + eps) / (size.sum() + len(codebook) * eps) * size.sum()
    return sums / smoothed[:, None], size, sums


def test_ema_follows_the_formula_in_place(backend):
    vq = lk.VectorQuantize(6, 10, decay=0.9, backend=backend)
    buffers = vq.codebook, vq.cluster_size, vq.code_sums
    addresses = [b.data_ptr() for b in buffers]
    for _ in range(5):
        x = torch.randn(4, 30, 6)
        before = [b.clone() for b in buffers]
        quantized, indices, loss = vq(x)
        assert torch.equal(quantized, before[0][indices])  # quantised first, updated after
        torch.testing.assert_close(loss, F.mse_loss(x, before[0][indices]))
        for now, then in zip(buffers, ema_reference(before, x, indices, 0.9, 1e-5), strict=True):
            torch.testing.assert_close(now.double(), then, rtol=1e-5, atol=1e-6)
    assert [b.data_ptr() for b in (vq.codebook, vq.cluster_size, vq.code_sums)] == addresses


def test_evaluation_changes_nothing(backend):
    vq = lk.VectorQuantize(4, 5, init="kmeans", dead_code_threshold=1.0, backend=backend).eval()
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    vq(torch.randn(20, 4))
    assert all(torch.equal(value, before[name]) for name, value in vq.state_dict().items())


def test_gradient_codebook_learns_the_data(backend):
    centres = 5 * torch.randn(4, 3)
    vq = lk.VectorQuantize(3, 24, update="gradient", init="kmeans", backend=backend)
    assert [name for name, _ in vq.named_parameters()] == ["codebook"]
    optimizer = torch.optim.Adam(vq.parameters(), lr=0.05)
    losses = []
    for _ in range(100):
        x = centres[torch.randint(4, (200,))] + 0.1 * torch.randn(200, 3)
        _, _, loss = vq(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.cdist(centres, vq.codebook).amin(1).max() < 0.2
    assert losses[-1] < 0.05


def test_kmeans_initialisation_finds_clusters_once(backend):
    centres = 10 * torch.randn(6, 4)
    x = centres[torch.randint(6, (600,))] + 0.01 * torch.randn(600, 4)
    vq = lk.VectorQuantize(4, 24, init="kmeans", decay=1.0, backend=backend)
    assert not vq.initialized
    x[0] = torch.nan
    vq(x)
    assert vq.initialized and vq.codebook.isfinite().all()
    assert torch.cdist(centres, vq.codebook).amin(1).max() < 0.1
    codebook = vq.codebook.clone()
    vq(torch.randn(50, 4))
    torch.testing.assert_close(vq.codebook, codebook)  # decay 1: only an initialisation would move it


def test_a_loaded_codebook_is_not_initialised_again(backend):
    trained = lk.VectorQuantize(4, 5, init="kmeans", backend=backend)
    trained(torch.randn(50, 4))
    fresh = lk.VectorQuantize(4, 5, init="kmeans", decay=1.0, backend=backend)
    fresh.load_state_dict(trained.state_dict())
    fresh(100 + torch.randn(50, 4))
    torch.testing.assert_close(fresh.codebook, trained.codebook, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_become_rows_of_the_batch(backend, update):
    vq = lk.VectorQuantize(4, 8, update=update, decay=0.5, dead_code_threshold=0.8, backend=backend)
    with torch.no_grad():
        vq.codebook[2:] = 1e3  # nothing is near them
    x = torch.randn(100, 4)
    x[::3] = torch.nan
    mask = torch.arange(100) % 3 != 1
    for _ in range(30):  # a row that is NaN or masked may be drawn, and then the code waits for the next step
        vq(x, mask)
    drawn = x[mask & x.isfinite().all(-1)]
    if update == "gradient":
        assert (vq.codebook[2:] < 100).all()
        assert (vq.codebook.detach()[2:, None] == drawn).all(-1).any(1).all()
    assert vq.codebook.isfinite().all() and vq.cluster_size.isfinite().all()
    assert (vq.cluster_size >= 0.39).all()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_manual_update_equals_the_one_in_the_forward(backend, metric):
    automatic = lk.VectorQuantize(4, 6, metric=metric, backend=backend)
    manual = lk.VectorQuantize(4, 6, metric=metric, ema_update="manual", backend=backend)
    manual.load_state_dict(automatic.state_dict())
    x = torch.randn(2, 40, 4)
    automatic(x)
    # two micro-batches, one update
    parts = [manual.code_statistics(part, manual(part)[1]) for part in x]
    manual.update_codebook(sum(p[0] for p in parts), sum(p[1] for p in parts))
    for name, value in automatic.state_dict().items():
        torch.testing.assert_close(value, manual.state_dict()[name], msg=name)


def test_state_dict_round_trip_continues_bit_for_bit(backend):
    first = lk.VectorQuantize(4, 6, backend=backend)
    first(torch.randn(30, 4))
    second = lk.VectorQuantize(4, 6, backend=backend)
    second.load_state_dict(first.state_dict())
    x = torch.randn(30, 4)
    for a, b in zip(first(x), second(x), strict=True):
        assert torch.equal(a, b)
    assert set(first.state_dict()) == {"codebook", "cluster_size", "code_sums", "initialized", "draws"}
    with pytest.raises(RuntimeError, match="size mismatch for codebook"):
        lk.VectorQuantize(4, 7).load_state_dict(first.state_dict())


def test_rows_that_are_not_finite_get_index_0_and_nan(backend):
    vq = lk.VectorQuantize(4, 6, backend=backend)
    x = torch.randn(10, 4)
    x[2] = torch.inf
    quantized, indices, loss = vq(x)
    assert indices[2] == 0 and quantized[2].isnan().all() and loss.isfinite()
    assert vq.codebook.isfinite().all()


def test_moves_and_casts(backend):
    vq = lk.VectorQuantize(4, 6, backend=backend).double()
    quantized, _, loss = vq(torch.randn(10, 4, dtype=torch.float64))
    assert quantized.dtype == loss.dtype == torch.float64
    vq.float()
    quantized, _, loss = vq(torch.randn(10, 4).bfloat16())
    assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32


def test_cosine_codebook_stays_useful(backend):
    vq = lk.VectorQuantize(4, 6, metric="cosine", init="kmeans", backend=backend)
    quantized, indices, loss = vq(torch.randn(100, 4))
    torch.testing.assert_close(quantized.norm(dim=-1), torch.ones(100))
    assert len(indices.unique()) > 1 and loss < 1


def test_masked_rows_keep_the_index_that_no_statistic_counts(backend):
    automatic = lk.VectorQuantize(4, 6, backend=backend)
    manual = lk.VectorQuantize(4, 6, ema_update="manual", backend=backend)
    manual.load_state_dict(automatic.state_dict())
    x, mask = torch.randn(40, 4), torch.arange(40) % 3 != 0
    x[1] = torch.nan
    automatic(x, mask)
    _, indices, _ = manual(x, mask)
    assert (indices[~mask] == -1).all() and indices[1] == 0 and (indices[mask] >= 0).all()
    manual.update_codebook(*manual.code_statistics(x, indices))
    torch.testing.assert_close(automatic.state_dict(), manual.state_dict())


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_batches_with_no_row_in_change_nothing(backend, decay):
    vq = lk.VectorQuantize(4, 6, decay=decay, backend=backend)
    vq(torch.randn(100, 4))
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    for _ in range(50):
        vq(torch.full((8, 4), torch.nan))
        vq(torch.randn(8, 4), torch.zeros(8, dtype=torch.bool))
        vq(torch.empty(0, 4))
    for name, value in vq.state_dict().items():
        torch.testing.assert_close(value, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x[..., ::2], lambda x: x.transpose(0, 1)])
def test_a_small_step_in_one_call_is_the_step_of_the_operators(dtype, layout, monkeypatch):
    base = torch.randn(3, 50, 8).to(dtype)
    base[1, 7, 2] = torch.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for one_call in (True, False):
        if not one_call:
            monkeypatch.setattr(lk.VectorQuantize, "_plan_one_call", lambda *_: None)
        torch.manual_seed(3)
        leaf = base.clone().requires_grad_()
        x = layout(leaf)
        vq = lk.VectorQuantize(
            x.shape[-1], 10, commitment_weight=0.25, dead_code_threshold=0.9, dtype=wide, backend="numba"
        )
        assert (vq._plan_one_call(x) is not None) is one_call
        for _ in range(2):
            quantized, indices, loss = vq(x)
            (quantized.nan_to_num().double().square().sum() + 3 * loss).backward(inputs=[leaf])
        assert not any(buffer.requires_grad for buffer in vq.buffers())
        results.append((quantized, indices, loss, leaf.grad, *vq.state_dict().values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(results[0][1], results[1][1])


def test_a_small_step_has_the_same_bits_on_any_number_of_threads():
    x, results = torch.randn(1024, 16), []
    for threads in (1, 2):
        torch.manual_seed(5)
        vq = lk.VectorQuantize(16, 64, backend="numba")
        before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
        try:
            assert vq._plan_one_call(x).plan.work >= 1 << 20  # which two threads share
            results.append(step(vq, x))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("gradient", ["rotation", "noise", "none"])
def test_gradients_of_the_module(backend, gradient):
    vq = lk.VectorQuantize(4, 6, gradient=gradient, backend=backend)
    x = torch.randn(30, 4, requires_grad=True)
    quantized, _, _ = vq(x)
    assert quantized.requires_grad is (gradient != "none")
    codes = vq.eval()(x)
    assert torch.equal(codes[0], vq.codebook[codes[1]])


def test_a_gradient_codebook_under_the_cosine_trains_with_dead_codes(backend):
    vq = lk.VectorQuantize(4, 6, update="gradient", metric="cosine", dead_code_threshold=2.0, backend=backend)
    quantized, _, loss = vq(torch.randn(30, 4, requires_grad=True))
    (quantized.sum() + loss).backward()
    assert vq.codebook.grad.isfinite().all()


def test_state_loads_into_a_module_on_the_meta_device():
    state = lk.VectorQuantize(4, 6).state_dict()
    vq = lk.VectorQuantize(4, 6, device="meta")
    vq.load_state_dict(state, assign=True)
    assert torch.equal(vq.codebook, state["codebook"])
    lk.VectorQuantize(4, 6, device="meta").load_state_dict(vq.to("meta").state_dict())


def step(vq, x):
    leaf = x.clone().requires_grad_()
    quantized, indices, loss = vq(leaf)
    (quantized.square().sum() + loss).backward()
    return quantized, indices, loss, leaf.grad, *(value.contiguous() for value in vq.state_dict().values())


@pytest.mark.parametrize("layout", ["transposed", "columns of a wider one", "another dtype"])
def test_buffers_of_any_layout_train_alike(layout):
    x = torch.randn(32, 8)
    expected = lk.VectorQuantize(8, 16)
    odd = lk.VectorQuantize(8, 16)
    odd.load_state_dict(expected.state_dict())
    wide = torch.full((16, 20), 7.0)
    if layout == "transposed":
        odd.codebook, odd.code_sums = odd.codebook.T.contiguous().T, odd.code_sums.T.contiguous().T
    elif layout == "columns of a wider one":
        wide[:, :8] = odd.codebook
        odd.codebook = wide[:, :8]
    else:
        odd.cluster_size = odd.cluster_size.double()
    assert odd._plan_one_call(x) is None
    for mine, theirs in zip(step(odd, x), step(expected, x), strict=True):
        torch.testing.assert_close(mine, theirs, check_dtype=False)
    assert (wide[:, 8:] == 7).all()


@pytest.mark.parametrize("codes", [16, 5000], ids=["one call", "operators"])
def test_second_derivatives_are_refused_and_gradients_come_in_batches(codes):
    vq, x = lk.VectorQuantize(8, codes, backend="numba"), torch.randn(32, 8, requires_grad=True)
    assert (vq._plan_one_call(x) is not None) is (codes == 16)
    quantized, _, loss = vq(x)
    grads = torch.randn(2, 32, 8)
    (batched,) = torch.autograd.grad(quantized, x, grads, is_grads_batched=True, retain_graph=True)
    assert torch.equal(batched, grads)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, x, retain_graph=True)[0])
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.square().sum().backward()


def test_autograd_notices_the_update_of_a_small_step():
    for rows in (32, 40000):
        vq, h = lk.VectorQuantize(8, 16), torch.randn(4, 8, requires_grad=True)
        loss = (h @ vq.codebook.T).square().sum()
        vq(torch.randn(rows, 8))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_training_beside_another_default_device_and_under_a_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += (str(function),)
            return function(*args, **(kwargs or {}))

    x, first, second, third = torch.randn(32, 8), *(lk.VectorQuantize(8, 16) for _ in range(3))
    for other in (second, third):
        other.load_state_dict(first.state_dict())
    expected = step(first, x)
    with torch.device("meta"):
        on_meta = step(second, x)
    with Recorder() as recorder:
        recorded = step(third, x)
    for got in (on_meta, recorded):
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert any("lamkernels.vector_quantize" in name for name in recorder.seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cosine_statistics_are_those_of_the_operator(backend, dtype):
    vq = lk.VectorQuantize(64, 6, metric="cosine", backend=backend)
    x = (15000 * torch.randn(500, 64)).to(dtype)
    out = lk.vector_quantize(x, vq.codebook, metric="cosine", backend=backend)
    counts, sums = vq.code_statistics(x, out.indices)
    assert torch.equal(counts, out.counts)
    torch.testing.assert_close(sums, out.sums, rtol=1e-5, atol=1e-4)


def test_the_rows_for_dead_codes_are_the_same_compiled():
    """The hash once left int64: undefined behaviour in compiled C++, which read past the rows."""

    def draw(step, rows):
        first, second = uniform(step, 16)
        return *own_candidates(first, rows, None, 0, 1), second

    step, rows = torch.tensor(2**33 + 3), torch.randn(256, 8).double()
    for eager, compiled in zip(draw(step, rows), torch.compile(draw)(step, rows), strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize(("rows", "codes", "dim"), [(256, 8, 32), (1024, 64, 16)])
def test_a_small_step_allocates_its_outputs_alone(rows, codes, dim):
    module, x = lk.VectorQuantize(dim, codes), torch.randn(rows, dim, requires_grad=True)

    def step():
        quantized, indices, loss = module(x)
        (grad,) = torch.autograd.grad((quantized, loss), x, (torch.ones_like(quantized), torch.ones_like(loss)))
        return quantized, indices, loss, grad

    step()  # compiled, planned, with scratch memory
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        results = step()
    made = [e.self_cpu_memory_usage for e in trace.events() if e.self_cpu_memory_usage > 0]
    quantized, _, loss, _ = results
    assert sum(made) == sum(t.nbytes for t in (*results, quantized, loss))  # two more that the test gives
