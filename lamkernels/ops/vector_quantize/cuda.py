"""vector_quantize in CUDA C++ (csrc/vector_quantize.cu): for the few rows of latent action models, one launch a pass.

Also, in the launch of the forward, the moving averages of a codebook: :func:`step_forward`. Not yet measured on a GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lamkernels.ops.cuda_common import THREADS, TYPES, launch, pack, shared_limit, tickets, types
from lamkernels.ops.vector_quantize.gpu_step import Step

SOURCE = "vector_quantize.cu"
ROWS, WARPS = 32, THREADS // 32  # of a tile and of a block, as in the source
ROWS_PER_SUM = 4096  # rows whose residuals a block adds in fp32 before the parts are merged in fp64
MAX_CODES = 256
BLOCKS = 2**16  # of the backward, at most


def shared_bytes(num_codes: int, dim: int) -> int:
    """Of a block of the forward: codes, a tile of rows and what is known of both; `carve` in the source."""
    stride = ((dim + 3) // 4 | 1) * 4
    doubles = num_codes + WARPS + num_codes % 2
    return 8 * doubles + 4 * ((num_codes + ROWS + 1) * stride + 3 * WARPS * ROWS + 4 * num_codes + ROWS)


def fits(num_codes: int, dim: int, device: torch.device) -> bool:
    """Whether a codebook (K, D) is in reach: it must lie in the shared memory of a block."""
    return num_codes <= MAX_CODES and shared_bytes(num_codes, dim) <= shared_limit(device)


def blocks(num_rows: int) -> int:
    """How many blocks a head gets: their tiles take as long as the last one's merge of their parts.

    A function of the shape alone, because the partition decides the bits of sums.
    """
    tiles = -(-num_rows // ROWS)
    return max(1, min(tiles, max(math.isqrt(8 * tiles), -(-num_rows // ROWS_PER_SUM))))


def unfit(x: Tensor, codebook: Tensor, metric: str) -> str:
    """Why the kernels cannot serve these, saying what they serve, or ""."""
    num_codes, dim = codebook.shape[-2:]
    if x.dtype not in TYPES or codebook.dtype not in (x.dtype, torch.float32):
        return f"backend 'cuda' takes float32, float16 and bfloat16; x is {x.dtype}"
    if not fits(num_codes, dim, x.device):
        return (
            f"backend 'cuda' takes codebooks of up to {MAX_CODES} codes that fit {shared_limit(x.device)} bytes of "
            f"shared memory; ({num_codes}, {dim}) needs {shared_bytes(num_codes, dim)}"
        )
    return "" if metric in ("l2", "dot") else f"backend 'cuda' takes metric 'l2' and 'dot'; metric is {metric!r}"


class Outputs(NamedTuple):
    """Where a forward writes; None for what is not wanted. Their order is that of the source's struct."""

    quantized: Tensor | None = None
    indices: Tensor | None = None
    distance: Tensor | None = None
    commitment_loss: Tensor | None = None
    codebook_loss: Tensor | None = None
    counts: Tensor | None = None
    sums: Tensor | None = None
    residual_sums: Tensor | None = None
    num_rows: Tensor | None = None
    codebook: Tensor | None = None  # with the next two: updated in place
    cluster_size: Tensor | None = None
    code_sums: Tensor | None = None


def launch_forward(
    x: Tensor, codebook: Tensor | None, num_codes: int, out: Outputs, *, given: Tensor | None = None,
    mask: Tensor | None = None, metric: str = "l2", precision: str = "default", statistics: bool = True,
    lowest: int = -1, averaging: tuple[float, float] = (0.0, 0.0), weight: float = 1.0,
) -> None:  # fmt: skip
    """One launch of the forward.

    Args:
        x: (H, N, D), or (H, B, N / B, D) whose rows lie in groups.
        codebook: (H, K, D) with entries side by side; None with ``given``.
        num_codes: K.
        out: what to write.
        given: (H, N) int64: indices that are not to be looked up.
        mask: (H, N) bool.
        metric: "l2" or "dot".
        precision: "exact" decides all rows in fp64; the others in fp32.
        statistics: False for indices, quantised rows and distances alone.
        lowest: the index of a row that is not finite.
        averaging: decay and ε of the moving averages.
        weight: of the loss.
    """
    heads, rows, dim = x.shape[0], x.shape[1:-1].numel(), x.shape[-1]
    programs = blocks(rows)
    strides = _row_strides(x)
    scratch: tuple[int, ...] = (0, 0, 0, 0)
    kept = None  # until the launch; then the allocator keeps the order of the stream
    if statistics:
        parts, losses = heads * programs * num_codes * dim, heads * programs
        kept = x.new_empty(8 * losses + 4 * (parts + losses * num_codes), dtype=torch.uint8)
        base = kept.data_ptr()
        counts = base + 8 * losses + 4 * parts
        scratch = (base + 8 * losses, base, counts, tickets(x.device, heads))
    starts = strides[0], strides[1], strides[3] if strides[2] > 1 else 0  # between the first entries of rows
    code_strides = (0, 0) if codebook is None else codebook.stride()[:2]
    arguments = pack(
        (
            x.data_ptr(), _address(codebook), _address(given), _address(mask), *map(_address, out), *scratch,
            rows, num_codes, dim, programs, *strides, *code_strides,
            *((0, 0) if mask is None else mask.stride()), *((0, 0) if given is None else given.stride()),
            metric == "dot", precision == "exact",
            dim % 4 == 0 and strides[4] == 1 and _aligned(x, starts),
            codebook is not None and dim % 4 == 0 and _aligned(codebook, code_strides),
            lowest,
        ),
        (*averaging, weight),
    )  # fmt: skip
    defines = types(x.dtype, x.dtype if codebook is None else codebook.dtype)
    launch("vector_quantize_fwd", SOURCE, defines, heads * programs, arguments, shared_bytes(num_codes, dim), x.device)


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, noise: Tensor | None, metric: str, precision: str, gradient: str
) -> tuple[Tensor, ...]:
    """``x`` (H, N, D) or (H, B, N / B, D), ``codebook`` (H, K, D), ``mask`` (H, N) bool or None; no ``noise``."""
    if reason := unfit(x, codebook, metric):
        raise ValueError(reason)
    if gradient not in ("ste", "none"):
        raise ValueError(f"backend 'cuda' takes gradient 'ste' and 'none'; gradient is {gradient!r}")
    heads, rows, (num_codes, dim) = x.shape[0], x.shape[1:-1].numel(), codebook.shape[1:]
    single = torch.float32
    out = Outputs(
        quantized=x.new_empty((heads, rows, dim)),
        indices=x.new_empty((heads, rows), dtype=torch.int64),
        commitment_loss=x.new_empty((heads,), dtype=single),
        codebook_loss=x.new_empty((heads,), dtype=single),
        counts=x.new_empty((heads, num_codes), dtype=torch.int64),
        sums=x.new_empty((heads, num_codes, dim), dtype=single),
        residual_sums=x.new_empty((heads, num_codes, dim), dtype=single),
        num_rows=x.new_empty((heads,), dtype=torch.int64),
    )
    if heads:
        launch_forward(x, unit_inner(codebook), num_codes, out, mask=mask, metric=metric, precision=precision)
    found = tuple(t for t in out if t is not None)
    return (found[0], found[1], *found[2:], x.new_empty((heads, 0, dim)))


def vector_quantize_backward(
    x: Tensor, codes: Tensor, indices: Tensor, residual_sums: Tensor, num_rows: Tensor, noise: Tensor | None,
    grad_quantized: Tensor | None, grad_commitment: Tensor, grad_codebook_loss: Tensor, metric: str, gradient: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad_x as x, contiguous, and grad_codebook (H, K, D), in one launch."""
    grad_x, grad_codebook = x.new_empty(x.shape), residual_sums.new_empty(residual_sums.shape)
    launch_backward(
        x, codes.contiguous(), indices.contiguous(), residual_sums.contiguous(), num_rows.contiguous(), grad_quantized,
        grad_commitment, grad_codebook_loss, grad_x, grad_codebook,
    )  # fmt: skip
    return grad_x, grad_codebook


def launch_backward(
    x: Tensor, codes: Tensor, indices: Tensor | None, residual_sums: Tensor | None, num_rows: Tensor,
    grad_quantized: Tensor | None, grad_commitment: Tensor, grad_codebook_loss: Tensor | None, grad_x: Tensor,
    grad_codebook: Tensor | None, weight: float = 1.0,
) -> None:  # fmt: skip
    """One launch of the backward; without ``indices`` a row is in unless its code is NaN."""
    heads, rows, dim = codes.shape
    num_codes = 0 if residual_sums is None else residual_sums.shape[1]
    entries = codes.numel() + (0 if grad_codebook is None else grad_codebook.numel())
    if entries == 0:
        return
    arguments = pack(
        (
            x.data_ptr(), codes.data_ptr(), _address(indices), _address(residual_sums), num_rows.data_ptr(),
            _address(grad_quantized), grad_commitment.data_ptr(), _address(grad_codebook_loss), grad_x.data_ptr(),
            _address(grad_codebook), heads, rows, num_codes, dim, *_row_strides(x),
            *((0, 0, 0) if grad_quantized is None else grad_quantized.stride()), grad_commitment.stride(0),
            0 if grad_codebook_loss is None else grad_codebook_loss.stride(0),
        ),
        (weight,),
    )  # fmt: skip
    grid = min(BLOCKS, -(-entries // THREADS))
    launch("vector_quantize_bwd", SOURCE, types(x.dtype, x.dtype), grid, arguments, 0, x.device)


def step_forward(x: Tensor, precision: str, step: Step) -> None:
    """The forward of gpu_step.py in one launch: ``x`` (1, N, D) or (1, B, N / B, D)."""
    codebook, sizes, code_sums = step.averages
    out = Outputs(
        quantized=step.quantized, indices=step.indices, commitment_loss=step.loss, num_rows=step.num_rows,
        codebook=codebook, cluster_size=sizes, code_sums=code_sums,
    )  # fmt: skip
    launch_forward(
        x, codebook.unsqueeze(0), codebook.shape[0], out, precision=precision, lowest=0, averaging=step.rates,
        weight=step.weight,
    )  # fmt: skip


def step_backward(
    x: Tensor, codes: Tensor, num_rows: Tensor, grad_quantized: Tensor | None, grad_loss: Tensor, grad_x: Tensor,
    weight: float,
) -> None:  # fmt: skip
    """Its backward in one launch: writes ``grad_x``, contiguous; of ``codes`` (1, N, D), NaN for a row not in."""
    launch_backward(
        x, codes, None, None, num_rows, grad_quantized, grad_loss, None, grad_x, None, weight
    )  # fmt: skip


def unit_inner(tensor: Tensor) -> Tensor:
    """The tensor itself where neighbours of the last axis are neighbours in memory, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _row_strides(x: Tensor) -> tuple[int, int, int, int, int]:
    """Of x (H, N, D) or (H, B, L, D), as the source takes them: of heads, groups, L, of rows, of entries."""
    if x.ndim == 3:
        return x.stride(0), x.stride(1), 1, 0, x.stride(2)
    return x.stride(0), x.stride(1), x.shape[2], x.stride(2), x.stride(3)


def _aligned(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether four entries from the start of any row lie in one aligned group."""
    return tensor.data_ptr() % (4 * tensor.element_size()) == 0 and all(stride % 4 == 0 for stride in strides)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
