"""Where channels and heads of ``VectorQuantize`` lie, between its callers and the kernels: views, not copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lamkernels.eager import in_shape


def channels_last(vq: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """x with its channels on the last axis, (B, ..., D)."""
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        if mask is not None:
            raise AssertionError("feature maps take no mask")
        return x.movedim(1, -1)
    return x if vq.channel_last or x.ndim == 2 else x.transpose(1, 2)


def split_heads(vq: Any, rows: Tensor) -> Tensor:
    """(B, ..., H·D) as (B, ..., H, D), or (H, B, ..., D) with a codebook per head."""
    if vq.heads == 1:
        return rows
    rows = rows.reshape(*rows.shape[:-1], vq.heads, rows.shape[-1] // vq.heads)
    return rows.movedim(-2, 0) if vq.separate_codebook_per_head else rows


def mask_of_heads(vq: Any, mask: Tensor, leading: torch.Size) -> Tensor:
    """The mask (B, N) for split rows of these leading axes."""
    if vq.heads > 1 and not vq.separate_codebook_per_head:
        mask = mask[..., None]
    return mask.expand(leading)


def rows_in_order(vq: Any, rows: Tensor) -> Tensor:
    """Split rows as (H, N, D), in upstream's order, so that the same random numbers draw the same rows."""
    per_head = False
    if vq.heads > 1:
        per_head = vq.separate_codebook_per_head
        rows = rows if per_head else rows.movedim(-2, 1)
    return rows.reshape(rows.shape[0] if per_head else 1, -1, rows.shape[-1])


def rows_to_draw(vq: Any, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Split rows and their mask as (H, N, D) and (H, N)."""
    if mask is not None:
        mask = rows_in_order(vq, mask_of_heads(vq, mask, rows.shape[:-1])[..., None])[..., 0]
    return rows_in_order(vq, rows.detach()), mask


def merge(vq: Any, quantized: Tensor, indices: Tensor, original: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Heads side by side, projected, masked, and the channels where those of x are."""
    if vq.heads > 1:
        if vq.separate_codebook_per_head:
            quantized, indices = quantized.movedim(0, -2), indices.movedim(0, -1)
        quantized = in_shape(quantized, (*quantized.shape[:-2], quantized.shape[-2] * quantized.shape[-1]))
    quantized = quantized.to(original.dtype)
    if vq.has_projections:
        quantized = vq.project_out(quantized)
    if mask is not None:
        padding = torch.zeros_like(original) if vq.return_zeros_for_masked_padding else original
        quantized = torch.where(mask[..., None], quantized, padding)
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        quantized = quantized.movedim(-1, 1)
    elif not vq.channel_last and original.ndim > 2:
        quantized = quantized.transpose(1, 2)
    return quantized, indices
