"""Codebook health, and the rows that replace dead codes."""

import math

import pytest
import torch

import lamkernels as lk
from lamkernels.nn.dead_codes import BITS, believed, own_candidates, uniform


def report(counts, replaced=0, updates=1):
    """The definition, from counts as a list."""
    rows = sum(counts)
    shares = [n / rows for n in counts if n]
    perplexity = math.exp(-sum(p * math.log(p) for p in shares))
    used = len(shares)
    return lk.HealthReport(used / len(counts), pytest.approx(perplexity), len(counts) - used, replaced, rows, updates)


def test_a_report_is_its_definition():
    health = lk.CodebookHealth(4)
    assert health.read() == lk.HealthReport(0.0, 0.0, 4, 0, 0, 0)
    health.update(torch.tensor([3, 0, 1, 0]), torch.tensor([False, True, False, True]))
    assert health.read() == report([3, 0, 1, 0], 2)
    health.update(torch.tensor([0, 2, 0, 0]))
    assert health.read() == health.read_all() == report([3, 2, 1, 0], 2, 2)
    health.reset()
    assert health.read() == lk.HealthReport(0.0, 0.0, 4, 0, 0, 0)


def test_a_window_forgets_what_is_older():
    health = lk.CodebookHealth(5, window=3)
    batches = torch.randint(0, 3, (8, 5))
    replaced = torch.rand(8, 5) < 0.3
    for last in range(8):
        health.update(batches[last], replaced[last])
        window = slice(max(0, last - 2), last + 1)
        counts = batches[window].sum(0).tolist()
        assert health.read() == report(counts, int(replaced[window].sum()), min(last + 1, 3))
    health.reset()
    health.update(batches[0])
    assert health.read() == report(batches[0].tolist())


def test_updates_stay_in_place():
    health = lk.CodebookHealth(4, window=2)
    addresses = [tensor.data_ptr() for tensor in (health._total, health._recent, health._place)]
    for _ in range(5):
        health.update(torch.ones(4, dtype=torch.int64))
    assert [tensor.data_ptr() for tensor in (health._total, health._recent, health._place)] == addresses


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_a_module_feeds_every_row_that_is_in(backend, update):
    vq = lk.VectorQuantize(
        4, 8, update=update, decay=0.5, dead_code_threshold=1.5, backend=backend, health=lk.CodebookHealth(8)
    )
    counts, replaced = torch.zeros(8, dtype=torch.int64), 0
    for _ in range(4):
        x = torch.randn(30, 4)
        x[3] = torch.nan
        mask = torch.arange(30) != 4
        codes = vq.codebook.detach().clone()
        found = lk.nearest_code(x, codes)
        counts += torch.bincount(found[mask & (found >= 0)], minlength=8)
        sizes = torch.lerp(vq.cluster_size, torch.bincount(found[mask & (found >= 0)], minlength=8).float(), 0.5)
        vq(x, mask)
        replaced += int(((sizes < 1.5) & (vq.cluster_size == 1.5)).sum())
    vq.eval()(torch.randn(5, 4))  # is not counted
    assert vq.health.read() == report(counts.tolist(), replaced, 4)
    assert replaced > 0


def test_health_changes_nothing_else():
    states = []
    for health in (None, lk.CodebookHealth(8)):
        torch.manual_seed(0)
        vq = lk.VectorQuantize(4, 8, dead_code_threshold=0.9, health=health, backend="reference")
        for _ in range(5):
            vq(torch.randn(20, 4))
        states.append(vq.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name])


def test_without_health_a_small_step_is_one_call():
    x = torch.randn(32, 4)
    seen = []
    for health in (None, lk.CodebookHealth(8)):
        vq = lk.VectorQuantize(4, 8, backend="numba", health=health)
        vq._step_in_one_call = lambda x, plan: seen.append(plan) or (x, x, x)
        vq(x)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lk.CodebookHealth(0), ValueError, "codebook_size is 0"),
        (lambda: lk.CodebookHealth(4, window=2.5), TypeError, "window is 2.5"),
        (lambda: lk.CodebookHealth(4).update(torch.ones(4)), TypeError, "counts is torch.float32"),
        (lambda: lk.CodebookHealth(4).update([1, 2]), TypeError, "counts is a list"),
        (lambda: lk.CodebookHealth(4).update(torch.ones(3, dtype=torch.int64)), ValueError, r"must be \(4,\)"),
        (lambda: lk.VectorQuantize(2, 8, health=lk.CodebookHealth(4)), ValueError, "health is for 4 codes"),
    ],
)
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def chi_square(counts):
    """Of equally likely places, in standard deviations above its mean."""
    counts = counts.double()
    expected = counts.sum() / len(counts)
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def test_numbers_are_uniform_and_independent():
    draws = [uniform(torch.tensor(step), 64) for step in range(2000)]
    first, second = (torch.stack(numbers) for numbers in zip(*draws, strict=True))
    assert first.min() >= 0 and first.max() < 2**BITS and second.min() >= 0 and second.max() < 2**BITS
    coarse, other = first >> (BITS - 4), second >> (BITS - 4)
    for places in (
        coarse * 16 + other,  # the two of a code
        coarse[:, 1:] * 16 + coarse[:, :-1],  # neighbouring codes
        coarse[1:] * 16 + coarse[:-1],  # neighbouring steps
        (first & 255),  # the low bits
    ):
        assert abs(chi_square(torch.bincount(places.flatten(), minlength=256))) < 4
    assert len(torch.unique(first)) > 0.9999 * first.numel()


@pytest.mark.parametrize("sizes", [[7], [5, 5], [2, 9, 4], [0, 6, 1]])
def test_rows_of_all_ranks_are_drawn_equally_often(sizes):
    world, total = len(sizes), sum(sizes)
    rows = torch.arange(total, dtype=torch.float32)[:, None].split(sizes)
    drawn, waited = torch.zeros(total), 0
    for step in range(3000):
        first, second = uniform(torch.tensor(step), 16)
        parts = [own_candidates(first, rows[rank], None, rank, world) for rank in range(world)]
        valid = torch.stack([part.valid for part in parts]).sum(0)
        assert valid.max() <= 1
        trusted = (valid > 0) & believed(first, second, torch.tensor(sizes))
        found = sum(part.rows for part in parts)[trusted].flatten().long()
        drawn += torch.bincount(found, minlength=total)
        waited += int((~trusted).sum())
    assert abs(chi_square(drawn)) < 4
    assert waited / 48000 == pytest.approx(1 - total / (world * max(sizes)), abs=0.01)


def test_equal_batches_draw_the_rows_of_the_joined_batch():
    rows = torch.randn(12, 5)
    for step in range(50):
        first, _ = uniform(torch.tensor(step), 9)
        whole = own_candidates(first, rows, None, 0, 1)
        parts = [own_candidates(first, rows[4 * rank : 4 * rank + 4], None, rank, 3) for rank in range(3)]
        assert torch.equal(sum(part.rows for part in parts), whole.rows)
        assert torch.equal(sum(part.valid.int() for part in parts).bool(), whole.valid) and whole.valid.all()


def test_a_loaded_state_draws_anew_and_memory_never_written_does_no_harm():
    state = lk.VectorQuantize(4, 6, dead_code_threshold=5.0).state_dict()
    empty = lk.VectorQuantize(4, 6, dead_code_threshold=5.0, device="meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    plain = lk.VectorQuantize(4, 6, dead_code_threshold=5.0)
    plain(torch.randn(9, 4))
    plain.load_state_dict(state)
    x = torch.randn(30, 4)
    for vq in (empty, plain):
        vq(x)
    assert torch.equal(empty.codebook, plain.codebook)


def test_training_compiles_with_health_and_dead_codes():
    torch._dynamo.reset()
    states = []
    for compiled in (False, True):
        torch.manual_seed(3)
        vq = lk.VectorQuantize(4, 8, dead_code_threshold=1.5, backend="reference", health=lk.CodebookHealth(8))
        run = torch.compile(vq, fullgraph=True, backend="aot_eager") if compiled else vq
        for _ in range(6):
            run(torch.randn(40, 4))
        states.append((vq.state_dict(), vq.health.read()))
    torch.testing.assert_close(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
