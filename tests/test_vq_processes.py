"""VectorQuantize across processes: every rank has the same codebook, that of one process with the joined batch."""

from __future__ import annotations

import pytest
import torch
from torch import multiprocessing
from vq_process_cases import (
    ACCUMULATED,
    CODES,
    DIM,
    EXACT,
    LEARNS,
    MODEL_STEPS,
    ROWS,
    SETTINGS,
    WRAPPED,
    accumulate,
    fsdp_gradient,
    grid,
    idle,
    joined,
    restless,
    smooth,
    state,
    train,
    train_model,
    work,
)

import lamkernels as lk

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of fork and spawn, not ours
]


@pytest.fixture(scope="module", params=[2, 3])
def runs(request, tmp_path_factory):
    """The number of processes, and what each of them saw."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (request.param, folder), nprocs=request.param)
    return request.param, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def assert_equal_states(found, wanted):
    for step, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert torch.equal(value, b[name]), (step, name)


def alone(options, batch, world, seed):
    """The states of one process that trains on the joined batches."""
    torch.manual_seed(seed)
    vq = lk.VectorQuantize(DIM, CODES, **options)
    return vq, train(vq, joined(batch, world), 0)


def test_exact_sums_make_every_rank_the_one_process_to_the_last_bit(runs):
    world, results = runs
    vq = lk.VectorQuantize(DIM, CODES, health=lk.CodebookHealth(CODES), **EXACT)
    torch.manual_seed(1)
    expected = train(vq, joined(grid, world), 0)["states"]
    for result in results:
        assert_equal_states(result["grid"]["states"], expected)
        assert result["grid"]["health"] == result["grid"]["all"] == vq.health.read()
    assert vq.health.read().replaced > CODES


def test_a_step_makes_one_collective_and_evaluation_none(runs):
    _, results = runs
    for result in results:
        for name in ("grid", *SETTINGS):
            first, *others = result[name]["counts"]
            assert first == 2 + 10 + 1 and set(others) == {1}, name  # the first has k-means
        assert result["evaluation"] == 0
        for name in ACCUMULATED:
            assert set(result[f"manual {name}"]["updates"]) == {1} and set(result[f"manual {name}"]["made"]) == {0}, (
                name
            )
        for name, (_, options) in WRAPPED.items():
            needed = options.get("update") != "gradient" or "dead_code_threshold" in options
            assert result[f"model {name}"]["made"] == [int(needed)] * MODEL_STEPS, name


@pytest.mark.parametrize("name", SETTINGS)
def test_every_rank_is_the_one_process_to_rounding(runs, name):
    world, results = runs
    options, batch = SETTINGS[name]
    for result in results[1:]:
        assert_equal_states(result[name]["states"], results[0][name]["states"])
    if name == "uneven dead":  # which codes are replaced, and by what, depends on how rows lie on the ranks
        return
    _, expected = alone(options, batch, world, 2)
    for found, wanted in zip(results[0][name]["states"], expected["states"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(found["cluster_size"], wanted["cluster_size"])  # of counts, which are exact


def test_codes_are_replaced_by_rows_of_any_rank(runs):
    world, results = runs
    replaced, owners = 0, set()
    for step, found in enumerate(results[0]["uneven dead"]["states"]):
        new = found["codebook"][found["cluster_size"] == torch.tensor(LEARNS["dead_code_threshold"])]
        same = (new[:, None] == joined(restless, world)(step, 0)).all(-1)
        assert same.any(1).all()
        owners |= {rank for rank in range(world) if (new[:, None] == restless(step, rank)).all(-1).any()}
        replaced += len(new)
    assert replaced > CODES and owners == set(range(world))


def test_kmeans_waits_for_a_row_and_takes_those_of_any_rank(runs):
    world, results = runs
    torch.manual_seed(3)
    vq = lk.VectorQuantize(DIM, CODES, init="kmeans", decay=0.5)
    vq(torch.full((3, DIM), torch.nan))
    vq(torch.cat([smooth(0, rank) for rank in range(1, world)]))
    for result in results:
        assert not result["k-means waits"]
        assert_equal_states([result["k-means"]], [results[0]["k-means"]])
        torch.testing.assert_close(result["k-means"], state(vq), rtol=1e-5, atol=1e-5)


def test_a_group_of_some_processes(runs):
    world, results = runs
    torch.manual_seed(4)
    vq = lk.VectorQuantize(DIM, CODES, **EXACT)
    expected = train(vq, joined(grid, 2), 0)["states"]
    for result in results[:2]:
        assert_equal_states(result["pair"]["states"], expected)
    if world == 3:  # who is not in the group is alone, and asks nobody
        torch.manual_seed(4)
        outside = train(lk.VectorQuantize(DIM, CODES, **EXACT), grid, 2)["states"]
        assert_equal_states(results[2]["pair"]["states"], outside)
        assert set(results[2]["pair"]["counts"]) == {0}


def test_health_over_processes(runs):
    world, results = runs
    rows = CODES * sum(range(world))
    for rank, result in enumerate(results):
        first, second, own = result["counted"]
        assert first == second == lk.HealthReport(1.0, pytest.approx(CODES), 0, 0, rows, world)
        assert own.rows == CODES * rank
        made, report = result["watched"]
        assert made == 1 and report == results[0]["watched"][1] and report.rows == world * ROWS


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_models_train_as_one_process(runs, name):
    world, results = runs
    wanted = train_model(joined(smooth, world), 0, **WRAPPED[name][1])["state"]
    for result in results:
        found = result[f"model {name}"]["state"]
        assert_equal_states([found], [results[0][f"model {name}"]["state"]])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ACCUMULATED)
def test_one_update_for_many_batches(runs, name):
    world, results = runs
    options = {k: v for k, v in ACCUMULATED[name].items() if k != "wrap"}
    wanted = accumulate(smooth, None, world, alone=True, **options)["state"]
    for result in results:
        found = result[f"manual {name}"]["state"]
        assert_equal_states([found], [results[0][f"manual {name}"]["state"]])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_sharded_codebook_is_rewritten_between_forwards_only(runs):
    world, results = runs
    wanted = fsdp_gradient(world=world)
    assert not wanted["sharded"]
    for result in results:
        found = result["sharded"]
        assert found["sharded"] and len(found["messages"]) == 2
        assert all("cannot rewrite a sharded codebook" in message for message in found["messages"])
        for name in ("codebook", "cluster_size"):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
            assert torch.equal(found[name], results[0]["sharded"][name])


def test_swapped_bottlenecks_that_are_sharded_return_no_views(runs):
    _, results = runs
    assert [result["said"] for result in results] == [[]] * len(results)


def test_a_checkpoint_that_rank_0_read_and_ddp_broadcast(runs):
    _, results = runs
    for result in results:
        assert_equal_states([result["checkpoint"]], [results[0]["checkpoint"]])
        assert result["checkpoint"]["initialized"]


def test_a_rank_without_batches_adds_nothing(runs):
    world, results = runs
    for result in results:
        assert_equal_states([result["idle"]], [results[0]["idle"]])
        torch.testing.assert_close(result["idle"], idle(0, world), rtol=1e-5, atol=1e-6)


def test_a_compiled_step_is_the_eager_one_on_every_rank(runs):
    _, results = runs
    for result in results:
        assert_equal_states(result["compiled"], [results[0]["compiled"][0]] * 2)
