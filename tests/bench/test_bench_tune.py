"""The tuner without a GPU: what it would try on each target, what it drops ahead of time, what it proposes."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing: TRITON_INTERPRET=1 is set", allow_module_level=True)

from lamkernels.bench import cli, tune
from lamkernels.bench.ahead import SHARED, compiled, record
from lamkernels.bench.workloads import Workload

from lamkernels import tuning
from lamkernels.tuning import Tile

LOOKUP = Workload("tune", "nearest_code", 65536, 1024, 64)


@pytest.mark.parametrize("workload", tune.WORKLOADS, ids=lambda workload: workload.name.replace(" ", "-"))
def test_every_target_has_tiles_to_try_and_a_row_that_the_launch_obeys(workload, monkeypatch):
    for target in SHARED:
        rule, key, given = tune.consulted(workload, target)
        tiles = tune.candidates(rule, target, given, workload.torch_dtype.itemsize)
        assert 3 < len(tiles) <= tune.MOST and len(set(tiles)) == len(tiles) and given not in tiles
        assert key[:2] == (rule, target)
        if rule == "streamed":  # two tiles of entries for each stage
            staged = [(t.rows + t.codes) * t.dim * t.stages * workload.torch_dtype.itemsize for t in tiles]
            assert max(staged) <= SHARED[target]
        changed = tiles[-1]
        monkeypatch.setitem(tuning.MEASURED, key, changed)
        launches = record(target, lambda: tune.call_on_meta(workload))
        ruled = [launch for launch in launches if launch.kernel.__name__ in tune.KERNELS[rule]]
        assert ruled and all(dict(launch.options)["num_warps"] == changed.warps for launch in ruled)
        assert all(changed.rows in dict(launch.constants).values() for launch in ruled)


def test_what_cannot_be_held_is_not_generated_and_what_spills_is_refused():
    rule, key, given = tune.consulted(LOOKUP, "sm_90")
    tiles = tune.candidates(rule, "sm_90", given, 4)
    assert not any(tile.rows * tile.codes // (32 * tile.warps) > 160 for tile in tiles)
    assert tune.why_not(LOOKUP, "sm_90", rule, key, given) == ""
    built = compiled("sm_90", lambda: tune.call_on_meta(LOOKUP))
    assert [name for name, _ in built] == [
        one.kernel.__name__ for one in record("sm_90", lambda: tune.call_on_meta(LOOKUP))
    ]
    assert all(kernel.asm["cubin"] for _, kernel in built)
    assert "spills" in tune.why_not(LOOKUP, "sm_90", rule, key, given._replace(registers=64))
    assert "sm_87" not in SHARED and tune.why_not(LOOKUP, "sm_87", *tune.consulted(LOOKUP, "sm_87")) == ""


def test_the_fastest_right_tile_becomes_a_row_ready_to_paste():
    rule, key, given = tune.consulted(LOOKUP, "sm_90")
    tiles = tune.candidates(rule, "sm_90", given, 4)
    refused, wrong, fastest = tiles[:3]

    def refuse(asked):
        assert asked == tiles
        return ["200 bytes of stack: it spills" if tile == refused else "" for tile in asked]

    def measure(tile):
        if tile == wrong:
            raise ValueError("wrong codes beyond the numerics contract")
        return {given: 2.0, fastest: 1.5, refused: 0.1}.get(tile, 3.0)

    found = tune.sweep(LOOKUP, "sm_90", refuse, measure)
    assert found.best == fastest and len(found.times) == len(tiles) - 1
    assert "spills" in found.rejected[refused] and "wrong codes" in found.rejected[wrong]
    row = eval("{" + found.row() + "\n}", {"Tile": Tile, "torch": torch})  # in tuning.py it stands in such braces
    assert row == {key: fastest} and "# 1.5 ms; 2 ms by the rule" in found.row()
    assert "best" in tune.summary(found) and "1 timed" not in tune.summary(found)


def test_a_gain_within_the_noise_changes_nothing():
    found = tune.sweep(LOOKUP, "sm_90", lambda tiles: ["" for _ in tiles], lambda tile: 1.0 - 0.001 * tile.stages)
    assert found.best is None and found.row() == "" and "it stays" in tune.summary(found)


def test_a_rule_that_fails_is_replaced_by_what_works():
    given = tune.consulted(LOOKUP, "sm_90")[2]

    def measure(tile):
        if tile == given:
            raise RuntimeError("out of resource")
        return float(tile.rows)

    found = tune.sweep(LOOKUP, "sm_90", lambda tiles: ["" for _ in tiles], measure)
    assert (
        found.best is not None and "the rule's tile failed" in found.row() and "out of resource" in tune.summary(found)
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--tune", "--device", "cpu"], "--tune times tiles on a GPU"),
        (["--tune", "--device", "cuda"], "no CUDA or ROCm device"),
    ],
)
def test_without_a_gpu_it_says_so(argv, expected, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert expected in capsys.readouterr().err
