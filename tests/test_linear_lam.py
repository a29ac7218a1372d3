"""The linear model: optimal, with the thresholds of the theory, finite on any data; measures that are those of rows."""

import math
from dataclasses import replace

import pytest
import torch

from lamkernels.lam.blocks import SampleMoments, effective_rank
from lamkernels.lam.linear import LinearLAM
from lamkernels.lam.linear_metrics import (
    action_recovery,
    exogenous_leakage,
    inconsistency,
    pair_inconsistency,
    partial_r2,
    probe_r2,
    subspace_angle,
)
from lamkernels.lam.linear_sgd import train_linear_lam
from lamkernels.lam.multi_step import multi_step_projection
from lamkernels.lam.worlds import make_world

pytestmark = pytest.mark.usefixtures("one_thread")

EYE = torch.eye(4, dtype=torch.float64)
SPREAD = torch.tensor([2.0, 1.5, 1.0, 0.7])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def centred(*blocks):
    return [block - block.mean(0) for block in blocks]


def residual(target, inputs):
    """What is left of the centred rows of a target after least squares."""
    target, inputs = centred(target, inputs)
    return target - inputs @ torch.linalg.lstsq(inputs, target, driver="gelsd").solution


def fit(world, k, **options):
    """A model of the population and the moments with its latent action."""
    model = LinearLAM(k, **options).fit(world.population())
    return model, model.latent_moments(world.population())


# --- the closed form


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("condition", [1.0, 30.0])
def test_the_loss_is_least_and_that_of_the_rows(k, condition):
    rows = make_world(condition=condition, action_variance=SPREAD, w_covariance=0.1 * EYE).sample(500, generator())
    o, o_next = rows["o"], rows["o_next"]
    model = LinearLAM(k).fit(o, o_next)
    e = residual(o_next, o)
    eigenvalues = torch.linalg.eigvalsh(e.mT @ e / len(e)).flip(0)
    torch.testing.assert_close(model.eigenvalues, eigenvalues)
    assert model.optimal_loss == pytest.approx(float(eigenvalues[k:].sum()), rel=1e-9, abs=1e-12)
    assert model.loss == pytest.approx(model.optimal_loss, rel=1e-9, abs=1e-12)
    measured = float((model(o, o_next) - o_next).square().sum(1).mean())
    assert measured == pytest.approx(model.loss, rel=1e-9, abs=1e-12)
    for seed in range(20):  # no other encoder does better, however it uses o
        z = o @ normal(8, k, seed=seed) + o_next @ (model.D.mT + 0.1 * normal(8, k, seed=100 + seed))
        other = float(residual(o_next, torch.cat([o, z], 1)).square().sum(1).mean())
        assert other >= model.optimal_loss - 1e-12


@pytest.mark.parametrize(("k", "condition"), [(2, 1.0), (4, 3.0)])
def test_gradient_descent_ends_at_the_closed_form(k, condition):
    world = make_world(action_variance=SPREAD, eps_variance=0.3, condition=condition, s_mean=10 * torch.ones(4))
    rows = world.sample(20_000, generator(1))
    trained = train_linear_lam(rows["o"], rows["o_next"], k, steps=500)
    closed = LinearLAM(k).fit(rows["o"], rows["o_next"])
    assert trained.optimal_loss == pytest.approx(closed.loss, rel=1e-9)
    assert trained.loss == pytest.approx(closed.loss, rel=1e-6)
    assert subspace_angle(trained.D, closed.D) < 0.1
    measured = float((trained(rows["o"], rows["o_next"]) - rows["o_next"]).square().sum(1).mean())
    assert measured == pytest.approx(trained.loss, rel=1e-9)
    moments = [model.latent_moments(SampleMoments(**rows)) for model in (trained, closed)]
    for measure in (exogenous_leakage, action_recovery):  # C is free, so z holds o as well; given o nothing differs
        assert measure(moments[0]) == pytest.approx(measure(moments[1]), abs=1e-3)
    assert float((trained.C + trained.D @ closed.A).norm()) > 0.1


def test_latent_actions_are_white_and_functions_of_the_innovation():
    rows = make_world(s_mean=5 * torch.ones(4)).sample(300, generator())
    o, o_next = rows["o"], rows["o_next"]
    model = LinearLAM(3).fit(o, o_next)
    z = model.encode(o, o_next)
    torch.testing.assert_close(z, residual(o_next, o) @ model.D.mT)
    torch.testing.assert_close(z.mT @ z / 300, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(model.C, -model.D @ model.A)
    largest = model.D.gather(1, model.D.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())
    batch = model.encode(o.view(3, 100, 8), o_next.view(3, 100, 8))
    torch.testing.assert_close(batch.view(300, 3), z)
    assert model.encode(o.float(), o_next.float()).dtype == torch.float32
    assert model.decode(o.bfloat16(), z).dtype == torch.bfloat16


def test_full_capacity_reconstructs_every_row():
    rows = make_world(observation=12).sample(300, generator())  # o varies in 8 of 12 directions
    model = LinearLAM(9).fit(rows["o"], rows["o_next"])
    assert (model.observation_rank, model.innovation_rank, model.latent_rank) == (8, 8, 8)
    torch.testing.assert_close(model(rows["o"], rows["o_next"]), rows["o_next"], rtol=0, atol=1e-10)
    assert not bool(model.encode(rows["o"], rows["o_next"])[:, 8:].any())


def test_one_fit_one_set_of_bits_whatever_it_is_fitted_from():
    rows = make_world().sample(200, generator())
    model = LinearLAM(3).fit(rows["o"], rows["o_next"])
    for other in (LinearLAM(3).fit(rows["o"], rows["o_next"]), LinearLAM(3).fit(SampleMoments(**rows))):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"action_weight": 10.0}, {"cross_view": True}, {"representation": "multi-step"}]
)
def test_an_accumulated_stream_gives_the_same_model(options, dtype):
    accumulator = pytest.importorskip("lamkernels.covariance").Covariance
    world = make_world(eps_variance=0.5, observation=16, s_mean=100 * torch.ones(4))  # o varies in 8 of 16 directions
    rows = world.sample(5000, generator())
    moments = accumulator({name: block.shape[1] for name, block in rows.items()})
    for start in range(0, 5000, 777):
        moments.update({name: block[start : start + 777].to(dtype) for name, block in rows.items()})
    streamed, whole = (LinearLAM(4, **options).fit(source) for source in (moments, SampleMoments(**rows)))
    assert (streamed.observation_rank, streamed.innovation_rank) == (whole.observation_rank, whole.innovation_rank)
    assert subspace_angle(streamed.D, whole.D) < 1e-3
    assert streamed.loss * 4999 / 5000 == pytest.approx(whole.loss, rel=1e-6, abs=1e-6)  # 1/(N - 1) and 1/N
    known = streamed.latent_moments(moments), whole.latent_moments(SampleMoments(**rows))
    for measure in (exogenous_leakage, action_recovery, inconsistency):
        assert measure(known[0]) == pytest.approx(measure(known[1]), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"representation": normal(5, 8)}])
def test_a_state_restores_the_model(options):
    rows = make_world().sample(200, generator())
    o, o_next = rows["o"], rows["o_next"]
    model = LinearLAM(3, **options).fit(o, o_next)
    other = torch.nn.Sequential(LinearLAM(3))
    other.load_state_dict({f"0.{name}": value for name, value in model.state_dict().items()})
    restored = other[0]
    assert torch.equal(restored.encode(o, o_next), model.encode(o, o_next))
    assert torch.equal(restored(o, o_next), model(o, o_next))
    assert (restored.loss, restored.latent_rank) == (model.loss, 3) and "loss=" in repr(restored)
    single = restored.float().encode(o, o_next)
    torch.testing.assert_close(single, model.encode(o, o_next), rtol=1e-4, atol=1e-4)


# --- why it fails: the theorem


def above(world, k, **options):
    """Whether more than half of the exogenous innovation leaks into the first latent dimensions."""
    return exogenous_leakage(fit(world, k, **options)[1]) > 0.5


def bisect(is_above, low, high):
    """Where a predicate changes between two positive places."""
    start = is_above(low)
    assert is_above(high) != start
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_above(middle) == start else (low, middle)
    return math.sqrt(low * high)


def isotropic(b=1.0, **options):
    """[E F] orthonormal, B_s = b I, Σ_a = I, so that Σ_q = b² I."""
    world = make_world(**options)
    return replace(world, B_s=b * EYE)


@pytest.mark.parametrize(("b", "w"), [(1.0, 0.0), (0.6, 0.0), (1.0, 0.5)])
def test_noise_displaces_the_action_at_the_theorems_place(b, w):
    own = b * b + w  # Σ_q = B_s Σ_a B_sᵀ + Σ_w
    found = bisect(lambda v: above(isotropic(b, eps_variance=v, w_covariance=w * EYE), 4), 0.1, 10.0)
    assert found == pytest.approx(own, rel=0.02)


@pytest.mark.parametrize("determinism", [0.0, 0.5, 0.9])
def test_a_determined_policy_leaves_less_to_encode(determinism):
    found = bisect(lambda v: above(isotropic(eps_variance=v, determinism=determinism), 4), 0.01, 10.0)
    assert found == pytest.approx(1 - determinism, rel=0.02)


def test_a_policy_that_is_affine_in_the_state_leaves_nothing_but_noise():
    model, moments = fit(isotropic(eps_variance=0.01, determinism=1.0), 4)
    assert (exogenous_leakage(moments), action_recovery(moments)) == (pytest.approx(1), 0.0)
    assert model.innovation_rank == 4 and inconsistency(moments) == pytest.approx(1)


def test_leakage_starts_with_the_first_eigenvalue_that_is_displaced():
    """z is free of ξ' exactly while λ_k(Σ_q) ≥ λ_1(Σ_ε)."""
    noise = torch.tensor([1.0, 0.8, 0.6, 0.4])
    world = make_world(action_variance=SPREAD, eps_variance=noise)
    leaks = [exogenous_leakage(fit(world, k)[1]) for k in range(1, 9)]
    # the union of the spectra: 2.0 1.5 | 1.0 (tie) | 0.8 0.7 0.6 0.4
    assert leaks[:2] == pytest.approx([0, 0], abs=1e-9)
    assert leaks[3] == pytest.approx(1.0 / 2.8) and leaks[4] == pytest.approx(1.8 / 2.8)
    assert leaks[5] == pytest.approx(1.8 / 2.8) and leaks[7] == pytest.approx(1)


def test_without_orthogonality_any_noise_leaks():
    """The crossover is sharp where E ⟂ F; elsewhere principal components mix the two, in proportion to the noise."""
    leaks = [exogenous_leakage(fit(make_world(condition=3.0, eps_variance=v), 4)[1]) for v in (1e-3, 1e-2)]
    assert leaks[0] > 1e-5 and leaks[1] / leaks[0] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("k", [5, 8])
@pytest.mark.parametrize("condition", [1.0, 10.0])
def test_spare_capacity_leaks(k, condition):
    world = make_world(eps_variance=1e-3, condition=condition)
    assert exogenous_leakage(fit(world, k)[1]) >= (k - 4) / 4 - 1e-6


# --- the remedies


@pytest.mark.parametrize("b", [1.0, 0.6])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_threshold_of_action_supervision(b, share):
    """λρ* = (σ_ε² − b²σ_a²) / σ_a²."""
    world = isotropic(b, eps_variance=4.0)

    def leaks(product):
        model = LinearLAM(4, action_weight=product / share).fit(world.population(), label_share=share)
        return exogenous_leakage(model.latent_moments(world.population())) > 0.5

    assert bisect(leaks, 0.1, 100.0) == pytest.approx(4.0 - b * b, rel=0.02)


@pytest.mark.parametrize("w", [0.3, 1.0])
def test_threshold_of_action_supervision_with_endogenous_noise(w):
    """With v = σ_a² + σ_w², labels explain σ_a⁴/v of the action, so λρ* = (σ_ε² − v) v / σ_a⁴."""
    world, v = isotropic(eps_variance=4.0, w_covariance=w * EYE), 1 + w
    found = bisect(lambda x: above(world, 4, action_weight=x), 0.1, 100.0)
    assert found == pytest.approx((4.0 - v) * v, rel=0.02)


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("b", [1.0, 0.6])
def test_threshold_of_the_flow_whatever_its_noise(b, noise):
    """λ* = (σ_ε² − σ_q²) / σ_q²: independent noise of the label moves no covariance with e."""
    world = isotropic(b, eps_variance=4.0, flow_noise=noise)
    found = bisect(lambda x: above(world, 4, flow_weight=x), 0.1, 100.0)
    assert found == pytest.approx((4.0 - b * b) / (b * b), rel=0.02)


def test_threshold_of_the_representation():
    world = isotropic(eps_variance=4.0)
    through = world.F @ torch.linalg.pinv(world.F)
    whole = torch.eye(8, dtype=torch.float64)
    found = bisect(lambda x: above(world, 4, representation=whole - (1 - x) * through), 0.05, 1.0)
    assert found == pytest.approx(0.5, rel=0.02)  # σ_q / σ_ε


def test_threshold_of_the_views():
    found = bisect(lambda r: above(isotropic(eps_variance=4.0, view_correlation=r), 4, cross_view=True), 0.05, 1.0)
    assert found == pytest.approx(0.5, rel=0.02)  # σ_q / σ_ε


REMEDIES = {
    "supervision": {"action_weight": 1e4},
    "flow": {"flow_weight": 1e4},
    "cross-view": {"cross_view": True},
    "multi-step": {"representation": "multi-step"},
}


@pytest.mark.parametrize("condition", [1.0, 100.0])
@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("remedy", REMEDIES)
def test_every_remedy_prevents_the_leak_for_any_conditioning(remedy, condition, horizon):
    world = make_world(condition=condition, eps_variance=4.0, horizon=horizon, determinism=0.3)
    _, plain = fit(world, 4)
    model, cured = fit(world, 4, **REMEDIES[remedy])
    assert exogenous_leakage(plain) > 0.4 and action_recovery(plain) < 0.6
    assert exogenous_leakage(cured) < 1e-3 and action_recovery(cured) > 0.999
    assert inconsistency(cured) < 1e-3
    assert subspace_angle(model.D, world.endogenous_rows) < 1.0
    assert model.loss >= model.optimal_loss - 1e-12


@pytest.mark.parametrize(
    "options",
    [{"action_weight": 2.0}, {"flow_weight": 0.7}, {"cross_view": True}, {"cross_view": True, "action_weight": 0.5}],
)
def test_every_remedy_minimises_its_objective(options):
    """Σ weight · E‖y − ŷ(z)‖² over the targets y, each residualised on the o that its decoder sees."""
    rows = make_world(condition=5.0, action_variance=SPREAD, view_correlation=0.5).sample(400, generator())
    model = LinearLAM(2, **options).fit(SampleMoments(**rows))
    e, view = residual(rows["o_next"], rows["o"]), "_view" if model.cross_view else ""
    targets = [(1.0, residual(rows[f"o_next{view}"], rows[f"o{view}"]))]
    targets += [(model.action_weight, residual(rows["a"], rows["o"]))]
    targets += [(model.flow_weight, residual(rows["flow"], rows["o"]))]

    def objective(D):
        return sum(weight * float(residual(y, e @ D.mT).square().sum(1).mean()) for weight, y in targets)

    least = objective(model.D)
    total = sum(weight * float(y.square().sum(1).mean()) for weight, y in targets)
    assert least == pytest.approx(total - float(model.eigenvalues[:2].sum()), rel=1e-9)
    for seed in range(20):
        for size in (0.01, 0.1, 10.0):
            assert objective(model.D + size * normal(2, 8, seed=seed)) >= least * (1 - 1e-12)


def test_remedies_combine():
    world = make_world(eps_variance=4.0, view_correlation=0.7)
    assert above(world, 4, cross_view=True) and above(world, 4, action_weight=1.5)
    assert not above(world, 4, cross_view=True, action_weight=1.5)


def test_a_view_from_another_camera():
    other = make_world(seed=7, observation=11, condition=5.0)
    world = make_world(eps_variance=4.0, E_view=other.E, F_view=other.F)
    model, moments = fit(world, 6, cross_view=True)
    assert exogenous_leakage(moments) < 1e-9 and action_recovery(moments) > 1 - 1e-9
    assert model.latent_rank == 4 and not bool(model.D[4:].any())  # what has no gain is zero, not random
    rows = world.sample(50, generator())
    z = model.encode(rows["o"], rows["o_next"])
    assert model.decode(rows["o_view"], z).shape == (50, 11)
    own = LinearLAM(6, cross_view=True).fit(**{name: rows[name] for name in ("o", "o_next", "o_view", "o_next_view")})
    error = own.decode(rows["o_view"], own.encode(rows["o"], rows["o_next"])) - rows["o_next_view"]
    assert float(error.square().sum(1).mean()) == pytest.approx(own.loss, rel=0.2)


def test_multi_step_projection_annihilates_the_exogenous_state():
    world = make_world(endogenous=4, exogenous=5, actions=2, observation=12, condition=10.0, horizon=3)
    P = multi_step_projection(world.population(), rtol=1e-6)
    assert len(P) <= 4
    torch.testing.assert_close(P @ P.mT, torch.eye(len(P), dtype=torch.float64))
    assert float((P @ world.F).abs().max()) < 1e-8
    few, many = (SampleMoments(**world.sample(n, generator())) for n in (1000, 100_000))
    leak = [float((multi_step_projection(sample) @ world.F).norm()) for sample in (few, many)]
    assert leak[1] < 0.3 * leak[0]
    with pytest.raises(ValueError, match="a cannot be predicted"):
        multi_step_projection(replace(world, action_covariance=torch.zeros(2, 2)).population())


def test_labels_count_where_they_are_known():
    world = make_world(eps_variance=4.0)
    rows = world.sample(20_000, generator())
    known = torch.rand(20_000, generator=generator()) < 0.2
    actions = rows["a"].where(known[:, None], math.nan)
    o_pair = (rows["o"], rows["o_next"])
    leak = {}
    for weight in (7.5, 30.0):  # λρ of 1.5 and 6, on the two sides of 3
        model = LinearLAM(4, action_weight=weight).fit(*o_pair, a=actions, labelled=known)
        leak[weight] = exogenous_leakage(model.latent_moments(world.population()))
    assert leak[7.5] > 0.9 and leak[30.0] < 0.1
    moments, labelled = SampleMoments(**rows), SampleMoments(**{name: block[known] for name, block in rows.items()})
    same = LinearLAM(4, action_weight=30.0).fit(moments, labelled=labelled, label_share=float(known.double().mean()))
    torch.testing.assert_close(same.D, model.D)


@pytest.mark.parametrize(
    "options",
    [{}, {"action_weight": 10.0}, {"flow_weight": 10.0}, {"cross_view": True}, {"representation": "multi-step"}],
)
def test_fits_of_samples_converge_to_the_population(options):
    world = make_world(action_variance=SPREAD, eps_variance=1.2, condition=3.0)
    exact, moments = fit(world, 2, **options)
    errors = []
    for n in (500, 50_000):
        model = LinearLAM(2, **options).fit(SampleMoments(**world.sample(n, generator())))
        leak = exogenous_leakage(model.latent_moments(world.population()))
        errors.append(max(abs(leak - exogenous_leakage(moments)), abs(model.loss / exact.loss - 1)))
    assert errors[1] < 0.03 and errors[1] < errors[0]


# --- hard data


def degenerate(name):
    """(rows of o, rows of o', ranks of o, of e and of a latent of 4)."""
    rows = make_world(endogenous=2, exogenous=2).sample(300, generator())
    o, o_next = rows["o"], rows["o_next"]
    still = torch.full((300, 1), 0.1, dtype=torch.float64)
    if name == "duplicate columns":
        return torch.cat([o, o], 1), torch.cat([o_next, o_next], 1), (4, 4, 4)
    if name == "constant columns":
        return torch.cat([o, still], 1), torch.cat([o_next, still], 1), (4, 4, 4)
    if name == "a large mean":
        return o + 1e6, o_next + 1e6, (4, 4, 4)
    if name == "fewer rows than columns":
        return o[:3], o_next[:3], (2, 0, 0)
    if name == "one row":
        return o[:1], o_next[:1], (0, 0, 0)
    if name == "nothing moves":
        return o, o, (4, 0, 0)
    if name == "nothing varies":
        return still.expand(300, 4), still.expand(300, 4), (0, 0, 0)
    if name == "a linear future":
        return o, o @ normal(4, 4), (4, 0, 0)
    if name == "one direction":
        return o, o + rows["a"][:, :1] * torch.ones(4, dtype=torch.float64), (4, 1, 1)
    if name == "one moving column":
        return o, torch.cat([o[:, :3], o_next[:, 3:]], 1), (4, 1, 1)
    raise AssertionError(name)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(
    "name",
    [
        "duplicate columns", "constant columns", "a large mean", "fewer rows than columns", "one row", "nothing moves",
        "nothing varies", "a linear future", "one direction", "one moving column",
    ],
)  # fmt: skip
def test_degenerate_data_give_finite_results_and_their_ranks(name, scale):
    o, o_next, ranks = degenerate(name)
    model = LinearLAM(4).fit(scale * o, scale * o_next)
    assert (model.observation_rank, model.innovation_rank, model.latent_rank) == ranks
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    z = model.encode(scale * o, scale * o_next)
    prediction = model.decode(scale * o, z)
    assert bool(z.isfinite().all()) and bool(prediction.isfinite().all())
    assert not bool(z[:, ranks[2] :].any())
    variance = max(float((scale * o_next).var(0, correction=0).sum()), (1e-12 * scale) ** 2)
    assert 0 <= model.optimal_loss <= model.loss + 1e-12 * variance
    error = float((prediction - scale * o_next).square().sum(1).mean())
    assert abs(error - model.loss) < 1e-9 * variance
    assert 0 <= model.effective_rank <= 4 + 1e-9
    moments = model.latent_moments(SampleMoments(o=scale * o, o_next=scale * o_next))
    for measured in (partial_r2(moments, "o_next"), inconsistency(moments, endogenous="o_next")):
        assert 0 <= measured <= 1
    assert math.isfinite(probe_r2(moments, moments, "o_next"))


def test_the_fit_follows_the_units():
    rows = make_world(eps_variance=0.5).sample(200, generator())
    o, o_next = rows["o"], rows["o_next"]
    one, many = (LinearLAM(3).fit(scale * o, scale * o_next) for scale in (1.0, 1e20))
    assert many.loss == pytest.approx(1e40 * one.loss, rel=1e-9)
    torch.testing.assert_close(1e20 * many.D, one.D)
    assert many.effective_rank == pytest.approx(one.effective_rank)


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(3)) == 0.0


# --- the measures


def measured(moments):
    return [
        exogenous_leakage(moments),
        action_recovery(moments),
        inconsistency(moments),
        probe_r2(moments, moments, "a"),
    ]


def test_measures_are_those_of_the_rows():
    world = make_world(condition=5.0, eps_variance=1.5, determinism=0.3)
    rows = world.sample(400, generator())
    model = LinearLAM(3).fit(rows["o"], rows["o_next"])
    z = model.encode(rows["o"], rows["o_next"])
    moments = SampleMoments(**rows, z=z)
    linear = model.latent_moments(SampleMoments(**rows))
    both = torch.cat([rows["o"], z], 1)
    for target, measure in (("eps", exogenous_leakage), ("a", action_recovery)):
        squares = [residual(rows[target], inputs).square().sum() for inputs in (rows["o"], both)]
        direct = float(1 - squares[1] / squares[0])
        assert measure(moments) == pytest.approx(direct, abs=1e-10)
        assert measure(linear) == pytest.approx(direct, abs=1e-10)
        assert probe_r2(moments, moments, target, l2=0.0) == pytest.approx(direct, abs=1e-10)


def test_measures_ignore_the_gauge():
    """z + G o, or an invertible map of z, is the same latent action to a forward model that sees o."""
    world = make_world(condition=5.0, eps_variance=1.5)
    moments = SampleMoments(**world.sample(2000, generator()))
    model = LinearLAM(3).fit(moments)
    before = measured(model.latent_moments(moments))
    G, H = 30 * normal(3, 8), normal(3, 3)
    model.C, model.D = H @ model.C + G, H @ model.D
    assert measured(model.latent_moments(moments)) == pytest.approx(before, abs=1e-8)
    model.B = model.B @ torch.linalg.inv(H)  # the forward model takes both back
    model.A = model.A - model.B @ G
    rows = world.sample(100, generator(1))
    fixed = LinearLAM(3).fit(moments)
    torch.testing.assert_close(model(rows["o"], rows["o_next"]), fixed(rows["o"], rows["o_next"]), rtol=1e-8, atol=1e-8)


def test_the_probe_is_fitted_on_one_set_and_tested_on_the_other():
    world = make_world(eps_variance=0.5)
    rows, others = (world.sample(300, generator(seed)) for seed in (0, 1))
    model = LinearLAM(2).fit(rows["o"], rows["o_next"])
    for r in (rows, others):
        r["z"] = model.encode(r["o"], r["o_next"])
    train, test = SampleMoments(**rows), SampleMoments(**others)
    inputs = rows["o"] - rows["o"].mean(0)

    def left(r, name):  # of a block, by the regression of the first set on its o
        mean = rows[name].mean(0)
        H = torch.linalg.lstsq(inputs, rows[name] - mean).solution
        return r[name] - mean - (r["o"] - rows["o"].mean(0)) @ H

    z, a = left(rows, "z"), left(rows, "a")
    G = torch.linalg.solve(z.mT @ z / 300 + 0.1 * torch.eye(2, dtype=torch.float64), z.mT @ a / 300)  # z is white
    error = left(others, "a") - left(others, "z") @ G
    direct = 1 - float(error.square().sum() / left(others, "a").square().sum())
    assert probe_r2(train, test, "a", l2=0.1) == pytest.approx(direct, abs=1e-9)
    train, test = SampleMoments(**{**rows, "z": normal(300, 200)}), SampleMoments(**{**others, "z": normal(300, 200)})
    assert probe_r2(train, test, "a", l2=0.0) < 0 < partial_r2(train, "a")  # an overfitted probe does not pass


@pytest.mark.parametrize("options", [{}, {"action_weight": 1e4}, {"cross_view": True}])
def test_inconsistency_in_closed_form_is_that_of_pairs(options):
    """o_view holds the same (s, a) in front of another background."""
    world = make_world(condition=4.0, eps_variance=2.0, w_covariance=0.2 * EYE, determinism=0.4)
    model, moments = fit(world, 3, **options)
    exact = pair_inconsistency(model.latent_moments(moments, z="z_view", o="o_view", o_next="o_next_view"))
    assert exact == pytest.approx(inconsistency(moments), abs=1e-9)
    rows = world.sample(50_000, generator())
    z, z_view = model.encode(rows["o"], rows["o_next"]), model.encode(rows["o_view"], rows["o_next_view"])
    left = torch.linalg.cholesky(torch.linalg.inv(residual(z, rows["o"]).mT.cov(correction=0)))
    difference = (residual(z, rows["o"]) - residual(z_view, rows["o_view"])) @ left
    assert float(difference.square().sum(1).mean()) / (2 * 3) == pytest.approx(exact, abs=0.02)


def test_inconsistency_has_the_ends_it_claims():
    world = make_world(eps_variance=4.0)
    rows = world.sample(2000, generator())
    for z, wanted in ((rows["a"], 0.0), (rows["eps"], 1.0)):
        assert inconsistency(SampleMoments(**rows, z=z)) == pytest.approx(wanted, abs=0.01)
    opposite = SampleMoments(**rows, z=rows["a"], z_view=-rows["a"])
    assert pair_inconsistency(opposite) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 1.0, 45.0, 89.9, 90.0])
def test_subspace_angle_is_that_of_a_rotation(degrees):
    t = math.radians(degrees)
    first = torch.eye(5, dtype=torch.float64)[:2]
    second = first.clone()
    second[1] = torch.tensor([0, math.cos(t), math.sin(t), 0, 0], dtype=torch.float64)
    mixed = normal(2, 2) @ second
    assert subspace_angle(first, mixed) == pytest.approx(degrees, rel=1e-6, abs=1e-12)
    assert subspace_angle(second[1:], torch.cat([first, torch.zeros(1, 5)])) == pytest.approx(degrees, abs=1e-9)


def test_subspace_angle_of_nothing():
    rows = normal(2, 4)
    assert subspace_angle(0 * rows, rows) == 90.0
    assert subspace_angle(0 * rows, 0 * rows) == 0.0


def test_targets_without_variance_of_their_own_count_nothing():
    world = make_world(eps_variance=0.0)
    _, moments = fit(world, 4)
    assert exogenous_leakage(moments) == 0.0 and probe_r2(moments, moments, "eps") == 0.0
    assert partial_r2(moments, "s") == 0.0  # o says all of s
    assert probe_r2(moments, moments, "s") == 0.0


# --- wrong arguments

ROWS = {"o": normal(20, 3), "o_next": normal(20, 3, seed=1)}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"latent_dim": 0}, ValueError, "latent_dim is 0"),
        ({"latent_dim": 2.0}, TypeError, "latent_dim is 2.0"),
        ({"action_weight": -1.0}, ValueError, "action_weight is -1.0"),
        ({"flow_weight": math.inf}, ValueError, "flow_weight is inf"),
        ({"rtol": 1.0}, ValueError, "rtol is 1.0"),
        ({"gain_rtol": -1.0}, ValueError, "gain_rtol is -1.0"),
        ({"representation": "view"}, ValueError, "representation is 'view'"),
        ({"representation": torch.zeros(3)}, ValueError, r"representation is \(3,\)"),
        ({"representation": torch.eye(3), "cross_view": True}, ValueError, "cross_view and representation"),
    ],
)
def test_wrong_models_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        LinearLAM(**{"latent_dim": 2, **options})


@pytest.mark.parametrize(
    ("options", "data", "error", "match"),
    [
        ({}, {"o_next": None}, ValueError, "o_next is missing"),
        ({}, {"o_next": normal(20, 2)}, ValueError, r"o_next is \(20, 2\); it must be \(N, d\) like o, \(20, 3\)"),
        ({}, {"o": torch.zeros(0, 3), "o_next": torch.zeros(0, 3)}, ValueError, r"o has shape \(0, 3\)"),
        ({}, {"o_next": ROWS["o"] / 0}, ValueError, "o_next holds NaN"),
        ({}, {"o": torch.zeros(20, 3, dtype=torch.int64)}, TypeError, "o is torch.int64"),
        ({"action_weight": 1.0}, {}, ValueError, "a missing; this model needs a"),
        ({"flow_weight": 1.0}, {}, ValueError, "flow missing"),
        ({"cross_view": True}, {"o_view": ROWS["o"]}, ValueError, "o_next_view missing"),
        ({"representation": "multi-step"}, {"a": normal(20, 1)}, ValueError, "o_ahead missing"),
        ({"representation": torch.eye(2)}, {}, ValueError, r"for o of 3 entries it must be \(r, 3\)"),
        ({"action_weight": 1.0}, {"a": normal(9, 1)}, ValueError, r"a has shape \(9, 1\)"),
        ({}, {"labelled": torch.ones(20)}, TypeError, "labelled must be a bool tensor"),
        ({}, {"labelled": torch.zeros(20, dtype=torch.bool)}, ValueError, "with a labelled row"),
        ({}, {"label_share": 0.0}, ValueError, "label_share is 0.0"),
        (
            {"action_weight": 1.0},
            {"a": normal(9, 1), "labelled": torch.ones(20, dtype=torch.bool)},
            ValueError,
            r"a has shape \(9, 1\); it must be \(20, p\)",
        ),
    ],
)
def test_wrong_data_are_refused(options, data, error, match):
    with pytest.raises(error, match=match):
        LinearLAM(2, **options).fit(**{**ROWS, **data})


def test_wrong_calls_are_refused():
    moments = SampleMoments(**ROWS)
    model = LinearLAM(2)
    with pytest.raises(RuntimeError, match="not fitted"):
        model.encode(**ROWS)
    with pytest.raises(ValueError, match="o holds moments"):
        model.fit(moments, ROWS["o_next"])
    with pytest.raises(ValueError, match=r"label_share is 0.5; beside tensors"):
        model.fit(**ROWS, label_share=0.5)
    with pytest.raises(TypeError, match="o is a list; it must be a tensor, or moments of named blocks"):
        model.fit([[1.0]])
    with pytest.raises(TypeError, match="labelled is a float"):
        model.fit(moments, labelled=0.5)
    with pytest.raises(ValueError, match="flow missing"):
        LinearLAM(2, flow_weight=1.0).fit(moments)
    with pytest.raises(ValueError, match="o_next missing"):
        model.fit(SampleMoments(o=ROWS["o"]))
    model.fit(moments)
    with pytest.raises(ValueError, match=r"o has shape \(20, 2\); its last axis must have 3 entries"):
        model.encode(normal(20, 2), ROWS["o_next"])
    with pytest.raises(ValueError, match=r"z has shape \(20, 3\)"):
        model.decode(ROWS["o"], normal(20, 3))
    with pytest.raises(ValueError, match="l2 is -1"):
        probe_r2(moments, moments, "o_next", z="o_next", l2=-1)
    with pytest.raises(ValueError, match="they must be"):
        subspace_angle(normal(2, 3), normal(2, 4))
    with pytest.raises(ValueError, match="rtol is 1"):
        multi_step_projection(moments, rtol=1)
    with pytest.raises(ValueError, match="steps is 0"):
        train_linear_lam(**ROWS, latent_dim=1, steps=0)
    with pytest.raises(ValueError, match="learning_rate is 0"):
        train_linear_lam(**ROWS, latent_dim=1, learning_rate=0.0)


def test_moments_that_are_not_finite_are_refused():
    broken = make_world().population()
    broken.forms["o_next"] = broken.forms["o_next"] * math.nan
    with pytest.raises(ValueError, match="covariance of o_next and o holds NaN"):
        LinearLAM(2).fit(broken)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing_by_being_empty():
    o, o_next = torch.randn(50, 4), torch.randn(50, 4)
    model = LinearLAM(2).fit(o, o_next)
    z, state = model.encode(o, o_next), model.state_dict()
    for bad in ({}, {name: value for name, value in state.items() if name != "B"}):
        with pytest.raises(RuntimeError, match="Missing key"):
            LinearLAM(2).fit(o, o_next).load_state_dict(bad)
    with pytest.raises(RuntimeError, match="latent_dim is 2"):
        LinearLAM(2).load_state_dict(LinearLAM(4).fit(o, o_next).state_dict())
    model.load_state_dict({}, strict=False)
    assert torch.equal(model.encode(o, o_next), z)
    assert not LinearLAM(2).load_state_dict({}).missing_keys


def test_an_accumulator_is_not_believed_below_its_rounding():
    Covariance = pytest.importorskip("lamkernels.covariance").Covariance
    b = torch.rand(40000, 4, generator=generator()).lt(0.3).float()
    o = 0.1 * torch.cat([b, b[:, :1] + b[:, 1:2], b[:, 2:3] + b[:, 3:]], 1)  # rank 4
    for precision in ("default", "exact"):
        moments = Covariance({"o": 6}, lag=1, precision=precision).update({"o": o})
        assert LinearLAM(2).fit(moments).observation_rank == 4
