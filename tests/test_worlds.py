"""Synthetic worlds: what is sampled is what the population says, and the controls do what they are called."""

import math

import pytest
import torch

from lamkernels.lam.blocks import ConditionalMoments, DerivedMoments, SampleMoments, conditioned
from lamkernels.lam.worlds import PopulationCovariance, World, make_world

pytestmark = pytest.mark.usefixtures("one_thread")

RICH = {
    "condition": 20.0, "eps_variance": 4.0, "horizon": 3, "determinism": 0.3, "view_correlation": 0.4, "coupling": 0.5,
    "flow_noise": 0.2, "s_mean": torch.tensor([1.0, -2.0, 0.5]), "xi_mean": torch.tensor([3.0, 0.0]),
    "w_covariance": 0.1 * torch.eye(3), "endogenous": 3, "exogenous": 2, "actions": 2, "observation": 7,
}  # fmt: skip


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_samples_converge_to_the_population():
    world = make_world(**RICH)
    population, rows = world.population(), world.sample(100_000, generator())
    sample = SampleMoments(**rows)
    size = {name: population.covariance(name, name).trace().sqrt() for name in rows}
    for first in rows:
        assert torch.allclose(sample.mean[first], population.mean[first], atol=0.02 * float(size[first])), first
        for second in rows:
            difference = sample.covariance(first, second) - population.covariance(first, second)
            assert float(difference.abs().max()) < 0.02 * float(size[first] * size[second]), (first, second)


def test_rows_obey_the_equations_of_the_world():
    world = make_world(**{**RICH, "w_covariance": None, "flow_noise": 0.0})
    rows = world.sample(50, generator())
    E, F = world.E, world.F
    for o, s, xi in (("o", "s", "xi"), ("o_next", "s_next", "xi_next"), ("o_next_view", "s_next", "xi_next_view")):
        torch.testing.assert_close(rows[o], rows[s] @ E.mT + rows[xi] @ F.mT)
    torch.testing.assert_close(rows["s_next"], rows["s"] @ world.A_s.mT + rows["a"] @ world.B_s.mT)
    torch.testing.assert_close(rows["xi_next"], rows["xi"] @ world.A_xi.mT + rows["eps"])
    torch.testing.assert_close(rows["flow"], rows["s_next"] - rows["s"])


def test_one_seed_one_sample():
    world = make_world()
    first, again, other = (world.sample(20, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["o"], other["o"])
    assert torch.equal(make_world(seed=3).E, make_world(seed=3).E)
    assert not torch.equal(make_world(seed=3).E, make_world(seed=4).E)


@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_the_mixing_has_the_condition_asked_for(condition):
    world = make_world(condition=condition, observation=11)
    singular = torch.linalg.svdvals(torch.cat([world.E, world.F], 1))
    assert float(singular[0] / singular[-1]) == pytest.approx(condition, rel=1e-9)
    read = world.endogenous_rows
    torch.testing.assert_close(read @ world.E @ world.B_s, torch.eye(4, dtype=torch.float64))
    assert float((read @ world.F).abs().max()) < 1e-11 * condition


@pytest.mark.parametrize("determinism", [0.0, 0.4, 1.0])
def test_determinism_moves_variance_of_the_action_into_the_state(determinism):
    world = make_world(endogenous=3, actions=2, action_variance=torch.tensor([2.0, 0.5]), determinism=determinism)
    moments = world.population()
    torch.testing.assert_close(moments.covariance("a", "a"), world.action_covariance)
    left = ConditionalMoments(moments, "s")
    torch.testing.assert_close(left.covariance("a", "a"), (1 - determinism) * world.action_covariance)
    torch.testing.assert_close(left.covariance("s_next", "s_next"), world.q_covariance)


@pytest.mark.parametrize("coupling", [-1.0, 0.0, 0.3, 1.0])
def test_coupling_is_the_correlation_of_noise_and_action(coupling):
    world = make_world(actions=2, endogenous=3, exogenous=3, eps_variance=4.0, coupling=coupling)
    moments = world.population()
    torch.testing.assert_close(moments.covariance("eps", "eps"), world.eps_covariance)
    wanted = torch.zeros(3, 2, dtype=torch.float64).fill_diagonal_(2.0 * coupling)  # c σ_ε σ_a
    torch.testing.assert_close(moments.covariance("eps", "a"), wanted)


@pytest.mark.parametrize("correlation", [-1.0, 0.0, 0.6, 1.0])
def test_views_share_the_agent_and_some_of_the_background(correlation):
    world = make_world(view_correlation=correlation)
    moments = world.population()
    for own, other in (("xi", "xi_view"), ("eps", "eps_view")):
        torch.testing.assert_close(moments.covariance(other, other), moments.covariance(own, own))
        torch.testing.assert_close(moments.covariance(own, other), correlation * moments.covariance(own, own))
    if correlation == 1.0:
        torch.testing.assert_close(moments.forms["o_next_view"], moments.forms["o_next"])


def test_a_second_camera_has_its_own_mixing():
    other = make_world(seed=5, observation=9)
    world = make_world(view_correlation=1.0, E_view=other.E, F_view=other.F)
    rows = world.sample(10, generator())
    torch.testing.assert_close(rows["o_view"], rows["s"] @ other.E.mT + rows["xi"] @ other.F.mT)


def test_what_is_played_at_random_is_uniform():
    actions = make_world(action_variance=4.0).sample(20_000, generator())["a"]
    assert 0.99 < float(actions.abs().max()) / (2 * math.sqrt(3)) <= 1.0
    assert float(actions.pow(4).mean() / actions.square().mean() ** 2) == pytest.approx(9 / 5, abs=0.03)


def test_derived_and_conditional_moments_are_those_of_the_rows():
    rows = make_world(**RICH).sample(200, generator())
    moments = SampleMoments(**rows)
    M = torch.randn(2, 7, generator=generator(), dtype=torch.float64)
    direct = SampleMoments(**rows, sum=rows["o"] @ M.mT + rows["a"])
    derived = DerivedMoments(moments, {"sum": {"o": M, "a": None}})
    torch.testing.assert_close(derived.mean["sum"], direct.mean["sum"])
    for other in ("sum", "eps"):
        torch.testing.assert_close(derived.covariance("sum", other), direct.covariance("sum", other))

    def residual(name, *given):
        inputs = torch.cat([*(rows[g] for g in given), torch.ones(200, 1, dtype=torch.float64)], 1)
        return rows[name] - inputs @ torch.linalg.lstsq(inputs, rows[name]).solution

    partial = conditioned(moments, ("s", "a"))
    wanted = residual("o_next", "s", "a").mT @ residual("xi", "s", "a") / 200
    torch.testing.assert_close(partial.covariance("o_next", "xi"), wanted)
    assert float(partial.covariance("s", "o_next").abs().max()) < 1e-12
    assert all(not bool(mean.any()) for mean in partial.mean.values())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"observation": 3}, ValueError, "observation is 3; it must be at least"),
        ({"actions": 5}, ValueError, "actions is 5; it must be at most endogenous = 4"),
        ({"endogenous": 0}, ValueError, "endogenous is 0"),
        ({"endogenous": 2.0}, TypeError, "endogenous is 2.0"),
        ({"condition": 0.5}, ValueError, "condition is 0.5"),
        ({"determinism": 1.5}, ValueError, r"determinism is 1.5; it must be in \[0, 1\]"),
        ({"coupling": -2.0}, ValueError, "coupling is -2.0"),
        ({"view_correlation": 2.0}, ValueError, "view_correlation is 2.0"),
        ({"flow_noise": -1.0}, ValueError, "flow_noise is -1.0"),
        ({"horizon": 0}, ValueError, "horizon is 0"),
        ({"eps_variance": -1.0}, ValueError, "eps_covariance has the eigenvalue"),
        ({"s_covariance": torch.zeros(4, 4)}, ValueError, "s_covariance has the eigenvalue"),
        ({"s_mean": torch.zeros(3)}, ValueError, r"s_mean is \(3,\); it must be a tensor \(4,\)"),
    ],
)
def test_wrong_worlds_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        make_world(**options)


def test_wrong_calls_are_refused():
    world = make_world()
    with pytest.raises(ValueError, match="n is 0"):
        world.sample(0, generator())
    with pytest.raises(ValueError, match="F is None"):
        World(world.E, None, world.A_s, world.B_s, world.A_xi, world.action_covariance, world.eps_covariance)
    with pytest.raises(KeyError):
        PopulationCovariance(world.population().forms).covariance("o", "nothing")
    with pytest.raises(ValueError, match="given is empty"):
        conditioned(world.population(), ())


@pytest.mark.parametrize(
    ("blocks", "error", "match"),
    [
        ({"o": [1.0]}, TypeError, "o is list"),
        ({"o": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "o is torch.int64"),
        ({"o": torch.zeros(3)}, ValueError, r"o has shape \(3,\)"),
        ({"o": torch.zeros(0, 2)}, ValueError, r"o has shape \(0, 2\)"),
        ({"o": torch.zeros(3, 2), "a": torch.zeros(4, 1)}, ValueError, r"a has shape \(4, 1\)"),
        ({"o": torch.full((3, 2), math.nan)}, ValueError, "o holds NaN"),
    ],
)
def test_wrong_blocks_are_refused(blocks, error, match):
    with pytest.raises(error, match=match):
        SampleMoments(**blocks)
