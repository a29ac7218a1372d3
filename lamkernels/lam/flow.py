"""Dense optical flow: OpenCV's DIS where ``opencv-python-headless`` is installed, else Farneback's method in torch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from lamkernels.validation import check_option

METHODS = ("auto", "dis", "farneback")
REACH, SIGMA = 2, 1.1  # of the neighbourhood that a polynomial is fitted to, pixels
WINDOW = 5  # side of the window over which the displacement is one, pixels
ITERATIONS = 3  # on every level of the pyramid
COARSEST = 8  # shortest side of a level, pixels
FLAT = 1e-3  # added to the normal equations: where nothing can be seen, nothing moves
DIS_SIDE = 12  # shortest side that DIS takes, pixels


def optical_flow(frame: Tensor, next_frame: Tensor, method: str = "auto") -> Tensor:
    """Where each pixel went.

    Args:
        frame: (B, H, W) float, grey levels; DIS rounds them and cuts them off to [0, 255].
        next_frame: (B, H, W).
        method: "dis" (Kroeger et al. 2016, OpenCV's medium preset), "farneback" (Farnebäck 2003), or "auto": the first
            where OpenCV is installed.

    Returns:
        (B, 2, H, W) float32: displacements along the width and along the height, pixels.

    Raises:
        ModuleNotFoundError: "dis" without OpenCV.
        ValueError: the shapes differ, a side is below 8 pixels (12 for "dis"), or the method is unknown.
    """
    check_option("method", method, METHODS)
    smallest = DIS_SIDE if method == "dis" else COARSEST
    if frame.ndim != 3 or next_frame.shape != frame.shape or min(frame.shape[1:]) < smallest:
        raise ValueError(
            f"frame is {tuple(frame.shape)} and next_frame {tuple(next_frame.shape)}; both must be (B, H, W) with "
            f"sides of at least {smallest}"
        )
    if method == "dis" or (method == "auto" and min(frame.shape[1:]) >= DIS_SIDE and find_spec("cv2") is not None):
        return _dis(frame, next_frame)
    return _farneback(frame.float(), next_frame.float())


def _dis(frame: Tensor, next_frame: Tensor) -> Tensor:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("method 'dis' needs OpenCV; pip install opencv-python-headless") from error
    made = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    both = (images.round().clamp(0, 255).byte().cpu().contiguous().numpy() for images in (frame, next_frame))
    found = [torch.from_numpy(made.calc(first, second, None)) for first, second in zip(*both, strict=True)]
    return torch.stack(found).permute(0, 3, 1, 2).contiguous().to(frame.device)


def _farneback(frame: Tensor, next_frame: Tensor) -> Tensor:
    """Coarse to fine; each level starts from twice the displacement of the one before."""
    levels = [(frame[:, None], next_frame[:, None])]
    while min(levels[-1][0].shape[2:]) // 2 >= COARSEST:
        levels.append(tuple(F.avg_pool2d(image, 2) for image in levels[-1]))  # type: ignore[arg-type]
    flow = frame.new_zeros(len(frame), 2, *levels[-1][0].shape[2:])
    for first, second in reversed(levels):
        if flow.shape[2:] != first.shape[2:]:
            flow = 2 * F.interpolate(flow, first.shape[2:], mode="bilinear", align_corners=False)
        before, after = _polynomials(first), _polynomials(second)
        for _ in range(ITERATIONS):
            flow = _displacement(before, after, flow)
    return flow


def _polynomials(image: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 5, H, W): coefficients of x, y, x², y² and xy around each pixel, weighted least squares."""
    step = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    y, x = torch.meshgrid(step, step, indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y]).flatten(1)  # (6, pixels)
    weighted = basis * (-(x * x + y * y) / (2 * SIGMA**2)).exp().flatten()
    kernels = torch.linalg.solve(weighted @ basis.mT, weighted)[1:].view(5, 1, *x.shape)
    return F.conv2d(F.pad(image, (REACH,) * 4, mode="replicate"), kernels.to(image))


def _displacement(before: Tensor, after: Tensor, flow: Tensor) -> Tensor:
    """One iteration: a polynomial moved by d has b₂ = b₁ − 2 A d, solved over a window, from ``flow`` on."""
    moved = _sample(after, flow)
    _, _, xx, yy, xy = ((before + moved) / 2).unbind(1)
    a, b, c = xx, xy / 2, yy  # A = [[a, b], [b, c]]
    d_x, d_y = flow.unbind(1)
    b_x, b_y = ((before - moved)[:, :2] / 2).unbind(1)
    b_x, b_y = b_x + a * d_x + b * d_y, b_y + b * d_x + c * d_y
    sums = torch.stack([a * a + b * b, b * (a + c), b * b + c * c, a * b_x + b * b_y, b * b_x + c * b_y], 1)
    pad = WINDOW // 2
    sums = F.avg_pool2d(F.pad(sums, (pad,) * 4, mode="replicate"), WINDOW, 1)
    g, h, i, u, v = sums.unbind(1)
    g, i = g + FLAT, i + FLAT
    determinant = g * i - h * h
    return torch.stack([(i * u - h * v) / determinant, (g * v - h * u) / determinant], 1)


def _sample(image: Tensor, flow: Tensor) -> Tensor:
    """image (B, C, H, W) at each pixel's place moved by flow, bilinear, the border repeated."""
    height, width = image.shape[2:]
    y, x = torch.meshgrid(torch.arange(height).to(flow), torch.arange(width).to(flow), indexing="ij")
    place = torch.stack([2 * (x + flow[:, 0]) / (width - 1) - 1, 2 * (y + flow[:, 1]) / (height - 1) - 1], -1)
    return F.grid_sample(image, place, padding_mode="border", align_corners=True)
