import pytest
import torch

from lamkernels.lam.objectives import relative_motion_error


def frames(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, 8, 8, generator=generator), torch.rand(batch, 3, 8, 8, generator=generator)


@pytest.mark.parametrize("weight", [0.0, 20.0])
def test_copying_is_one_and_truth_is_zero(weight):
    frame, target = frames(5)
    assert float(relative_motion_error(frame, target, frame, weight)) == pytest.approx(1.0)
    assert float(relative_motion_error(target, target, frame, weight)) == 0.0


def test_one_transition_without_weight_is_the_ratio_of_squares():
    frame, target = frames(1)
    prediction = 0.5 * (frame + target)
    assert float(relative_motion_error(prediction, target, frame, 0.0)) == pytest.approx(0.25)


def test_pixels_that_change_count_more():
    frame = torch.zeros(1, 3, 2, 2)
    target = frame.clone()
    target[0, 0, 0, 0] = 0.5
    prediction = target.clone()
    prediction[0, 0, 1, 1] = 0.5  # a still pixel is wrong: 0.25 against 21 · 0.25
    assert float(relative_motion_error(prediction, target, frame, 20.0)) == pytest.approx(1 / 21)


@pytest.mark.parametrize("moving", [0, 1, 7])
def test_still_transitions_neither_explode_nor_divide_by_zero(moving):
    frame, target = frames(16)
    target[moving:] = frame[moving:]
    prediction = (frame + 0.01).requires_grad_()
    loss = relative_motion_error(prediction, target, frame, 20.0)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert gradient.isfinite().all()
    if moving:
        assert float(loss.detach()) < 1.2
