"""Each objective against its formula in plain torch, with its gradient; every one of them trains a model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamkernels.lam.bottlenecks import BOTTLENECKS
from lamkernels.lam.exogenous import ExogenousFrames
from lamkernels.lam.frame_lam import FrameLAM, FrameLAMConfig
from lamkernels.lam.frame_remedies import SECOND_CAMERA, Region, agent_flow, train_with_remedy
from lamkernels.lam.frame_training import Batches, TrainingConfig
from lamkernels.lam.objectives import (
    ActionSupervision,
    AugmentationConsistency,
    Batch,
    FeatureReconstruction,
    FlowConstraint,
    MultiStepInverse,
    Shading,
    Step,
    TemporalConsistency,
    cross_view_reconstruction,
    decorrelation,
    pixel_reconstruction,
    total_loss,
)

B, K, P, D = 6, 2, 3, 5


def mean_square(x, y):
    return sum(((a - b) ** 2).sum() for a, b in zip(x, y, strict=True)) / len(x)


def leaves(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def step():
    torch.manual_seed(0)
    model = FrameLAM(FrameLAMConfig(8, latent_dim=K, width=2)).double()
    frames = {name: leaves(B, 1, 8, 8) for name in ("frame", "next_frame", "view", "next_view", "ahead")}
    rest = {"action": leaves(B, P), "flow": leaves(B, 4), "features": leaves(B, D), "next_features": leaves(B, D)}
    labelled = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    return Step(model, Batch(**frames, **rest, labelled=labelled))


def agree(found, expected, step):
    """Value, and the gradient of every parameter of the model."""
    torch.testing.assert_close(found, expected)
    parameters = list(step.model.parameters())
    for got, wanted in zip(
        torch.autograd.grad(found, parameters, retain_graph=True, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected, parameters, retain_graph=True, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    return torch.autograd.grad(found, [step.latent.before], allow_unused=True)[0]


def test_reconstructions(step):
    batch, z = step.batch, step.latent.z
    assert agree(
        pixel_reconstruction(step), mean_square(step.model.decode(batch.frame, z), batch.next_frame), step
    ).any()
    crossed = mean_square(step.model.decode(batch.view, z), batch.next_view)
    assert agree(cross_view_reconstruction(step), crossed, step).any()


def test_reconstruction_of_features_that_are_frozen_or_given(step):
    batch, z = step.batch, step.latent.z
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[3, 1:4] = True
    phi = nn.Sequential(Region(region), nn.Linear(3, D).double(), nn.BatchNorm1d(D).double())
    objective = FeatureReconstruction(D, K, phi).double().train()
    assert not any(p.requires_grad for p in objective.features.parameters()) and not objective.features.training
    before, after = (copy.deepcopy(phi).eval()(o) for o in (batch.frame, batch.next_frame))
    head = objective.forward_model
    expected = mean_square(before.detach() + head(torch.cat([before.detach(), z], 1)), after.detach())
    assert agree(objective(step), expected, step).any()
    given = FeatureReconstruction(D, K).double()
    expected = mean_square(batch.features + given.forward_model(torch.cat([batch.features, z], 1)), batch.next_features)
    assert agree(given(step), expected, step).any()
    with pytest.raises(ValueError, match="the batch has no features; this objective needs features, next_features"):
        given(Step(step.model, batch._replace(features=None)))


def test_temporal_consistency_moves_its_copy_and_sends_it_no_gradient(step):
    batch, z = step.batch, step.latent.z
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, D)).double()
    objective = TemporalConsistency(encoder, D, K, momentum=0.9).double()
    with torch.no_grad():
        encoder[1].weight.add_(1.0)
    old, new = objective.slow[1].weight.clone(), encoder[1].weight.detach()
    found = objective(step)
    torch.testing.assert_close(objective.slow[1].weight, 0.9 * old + 0.1 * new)
    head = objective.predictor(torch.cat([encoder(batch.frame), z], 1))
    target = objective.slow(batch.next_frame).detach()
    expected = (2 - 2 * F.cosine_similarity(head, target)).mean()
    assert agree(found, expected, step).any()
    assert all(p.grad is None and not p.requires_grad for p in objective.slow.parameters())
    moved = objective.slow[1].weight.clone()
    objective.eval()(step)
    assert torch.equal(objective.slow[1].weight, moved)


def test_supervision_counts_labelled_rows_alone(step):
    batch, objective = step.batch, ActionSupervision(K, P).double()
    guess = step.latent.z @ objective.head.weight.mT + objective.head.bias
    known = batch.labelled
    gradient = agree(objective(step), mean_square(guess[known], batch.action[known]), step)
    assert gradient.any()
    everywhere = Step(step.model, batch._replace(labelled=None))
    torch.testing.assert_close(objective(everywhere), mean_square(guess, batch.action))
    nowhere = Step(step.model, batch._replace(labelled=torch.zeros(B).bool()))
    assert objective(nowhere) == 0


def test_flow_and_inverse_models(step):
    batch, z = step.batch, step.latent.z
    flow = FlowConstraint(64, K, 4).double()
    assert agree(flow(step), mean_square(flow.head(torch.cat([batch.frame.flatten(1), z], 1)), batch.flow), step).any()
    inverse = MultiStepInverse(nn.Sequential(nn.Flatten(), nn.Linear(64, D)), D, P).double()
    both = torch.cat([inverse.features(batch.frame), inverse.features(batch.ahead)], 1)
    expected = mean_square(inverse.head(both), batch.action)
    assert agree(inverse(step), expected, step) is None  # it trains the representation, not the model
    assert torch.autograd.grad(inverse(step), [inverse.features[1].weight])[0].any()


def test_augmentation_and_decorrelation(step):
    batch, x = step.batch, step.latent.before
    assert AugmentationConsistency(lambda frame: frame)(step) == 0
    changed = step.model.infer(batch.frame**2, batch.next_frame**2).before
    assert agree(AugmentationConsistency(torch.square)(step), mean_square(changed, x) / K, step).any()
    shaded = Shading(strength=3.0)(torch.zeros(4000, 1, 8, 8))
    assert shaded[:, 0, 0, 0].std() == pytest.approx(3.0, rel=0.05)
    assert (shaded[:, 0, 0, 0] - shaded[:, 0, 0, 1]).std() < shaded[:, 0, 0, 0].std()
    covariance = torch.cov(x.mT)
    assert agree(decorrelation(step), (covariance - covariance.diag().diag()).square().sum() / K, step).any()


def test_augmented_frames_move_neither_moments_nor_a_codebook(step):
    model = FrameLAM(FrameLAMConfig(8, latent_dim=K, bottleneck="vq", codebook_size=3, width=2)).double()
    own = Step(model, step.batch)
    assert own.latent.indices is not None  # what the batch itself moves is moved
    state = copy.deepcopy(model.state_dict())
    AugmentationConsistency(torch.square)(own).backward()
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    frames = step.batch.frame, step.batch.next_frame
    torch.testing.assert_close(model.eval().before_bottleneck(*frames), model.infer(*frames).before)


def test_a_remedy_is_a_weighted_sum(step):
    expected = step.latent.loss + 2.0 * pixel_reconstruction(step) + 0.5 * decorrelation(step)
    torch.testing.assert_close(total_loss(step, [(2.0, pixel_reconstruction), (0.5, decorrelation)]), expected)


@pytest.fixture(scope="module")
def falling():
    """A dot that moves left or right in front of a picture whose brightness jumps."""
    generator = torch.Generator().manual_seed(0)
    count = 600
    turn = torch.randint(2, (count,), generator=generator)
    place = torch.zeros(count, dtype=torch.long)
    for t in range(1, count):
        place[t] = (place[t - 1] + 2 * turn[t - 1] - 1) % 8
    noise = torch.randn(count, 1, generator=generator)
    frames = (100 + 12 * noise[:, :, None, None]).expand(count, 1, 8, 8).clone()
    frames[torch.arange(count), 0, 5] = 100
    frames[torch.arange(count), 0, 5, place] = 130
    state = torch.cat([torch.zeros(1, 1), noise[:-1]])
    starts = torch.arange(count) % 100 == 0
    return ExogenousFrames(frames.round().byte(), F.one_hot(turn, 2).float(), starts, noise, state)


def test_batches_are_the_transitions_they_name(falling):
    model = FrameLAM(FrameLAMConfig(8), torch.full((1, 8, 8), 0.25), 0.5)
    rows = falling.pairs[:400]
    batches = Batches(falling, model, rows, TrainingConfig(label_share=0.25, horizon=3))
    torch.manual_seed(0)
    batch = batches.draw(2000, ahead=True)
    torch.testing.assert_close(batch.frame.min(), (falling.frames[rows].min() / 255 - 0.25) / 0.5)
    assert batch.labelled.double().mean() == pytest.approx(0.25, abs=0.04)

    def places(frames):
        return (frames[:, 0, 5] > batch.frame[:, 0, 5].mean()).double().argmax(1)

    moved = (places(batch.next_frame) - places(batch.frame)) % 8
    assert torch.equal(moved == 1, batch.action[:, 1] == 1)
    assert set(((places(batch.ahead) - places(batch.frame)) % 8).tolist()) == {1, 3, 5, 7}


def test_the_flow_of_a_region_stops_at_its_border(falling):
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[5] = True
    flow = agent_flow(falling, region)
    assert flow.shape == (600, 16) and not flow[99].any()
    assert flow[falling.pairs].square().mean() == pytest.approx(1.0, rel=1e-4)
    black = ExogenousFrames(falling.frames * region, *(getattr(falling, n) for n in ("actions", "starts", "exogenous",
                                                                                     "innovation")))  # fmt: skip
    torch.testing.assert_close(agent_flow(black, region), flow)


@pytest.mark.parametrize("bottleneck", BOTTLENECKS)
def test_one_seed_the_same_model_whatever_the_bottleneck(falling, bottleneck):
    region = torch.zeros(8, 8, dtype=torch.bool)
    region[5] = True
    first, second = (
        train_with_remedy(
            "agent region", falling, falling.pairs, region, FrameLAMConfig(8, 1, 2, bottleneck, width=4),
            TrainingConfig(steps=4, batch_size=32, seed=5),
        ) for _ in range(2)
    )  # fmt: skip
    before = FrameLAM(FrameLAMConfig(8, 1, 2, bottleneck, width=4)).head[0].weight
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not first.training and not torch.equal(first.head[0].weight, before)


def test_views_are_those_of_the_remedy(falling):
    """A view that is the frame itself makes cross-view reconstruction that of pixels."""

    def weights(remedy, data):
        shape, training = FrameLAMConfig(8, 1, 2, width=4), TrainingConfig(steps=3, batch_size=32)
        region = torch.ones(8, 8, dtype=torch.bool)
        return train_with_remedy(remedy, data, falling.pairs, region, shape, training).state_dict()

    pixels, black = weights("none", falling), torch.zeros_like(falling.frames)
    for remedy, views, second in (
        ("cross-view", falling.frames, black), (SECOND_CAMERA, black, falling.frames), ("none", black, black)
    ):  # fmt: skip
        found = weights(remedy, replace(falling, views=views, second_views=second))
        torch.testing.assert_close(found, pixels, rtol=0, atol=0)
    with pytest.raises(ValueError, match="the batch has no view and no next_view"):
        weights(SECOND_CAMERA, replace(falling, views=falling.frames))


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="size is 10; it must be a multiple of 4"):
        FrameLAMConfig(10)
    with pytest.raises(ValueError, match="label_share is 0; it must be in"):
        TrainingConfig(label_share=0)
    with pytest.raises(ValueError, match=r"mean has shape \(8, 8\)"):
        FrameLAM(FrameLAMConfig(8), torch.zeros(8, 8))
