import pytest
import torch

from lamkernels.lam import compare, measure
from lamkernels.lam.stock import StockVectorQuantize
from lamkernels.nn import VectorQuantize

CPU = torch.device("cpu")


def test_peak_is_the_most_that_is_held_at_once():
    def action():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 19, dtype=torch.uint8)
        del second, third

    assert measure.peak_extra_bytes(action, CPU) == pytest.approx(2 << 20, rel=0.01)


def test_operators_are_counted_once():
    x = torch.ones(3)
    assert measure.count_operators(lambda: (x + x) * x, CPU) == (2, None)


def test_costs_of_both_bottlenecks_at_one_shape():
    bottlenecks = {"stock": StockVectorQuantize(8, 64), "fused": VectorQuantize(8, 64)}
    costs = measure.bottleneck_costs(bottlenecks, torch.randn(4096, 8), repeats=3)
    for cost in costs.values():
        assert cost["time_ms"] > 0 and cost["rounds"] == 3 and cost["operators"] > 0
        assert cost["kernel_launches"] is None
    assert costs["stock"]["peak_extra_mib"] > 4096 * 64 * 4 / 2**20  # at least one distance matrix


def test_agreement_of_curves():
    first = torch.tensor([1.0, 1.0, 2.0, 4.0])
    same = compare.curve_agreement(first, first.clone())
    assert same["coincide"] and same["max_relative_difference"] == 0 and same["identical_steps"] == 4
    apart = compare.curve_agreement(first, torch.tensor([1.0, 1.0, 2.0, 5.0]))
    assert not apart["coincide"] and apart["first_step_apart"] == 3
    assert apart["max_relative_difference"] == pytest.approx(0.25)
    rounded = compare.curve_agreement(first, first * (1 + 1e-6))
    assert rounded["coincide"]
    assert not compare.curve_agreement(first.double(), first.double() * (1 + 1e-6))["coincide"]


def test_settings_come_back(monkeypatch):
    before = torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="stop"), compare.reproducible():
        assert torch.are_deterministic_algorithms_enabled()
        raise RuntimeError("stop")
    assert torch.are_deterministic_algorithms_enabled() is before
