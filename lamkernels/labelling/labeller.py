"""From pairs of observations to codes: an encoder, and whatever serves as its codebook."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lamkernels.functional import lookup, nearest_code
from lamkernels.validation import (
    METRICS,
    PRECISIONS,
    Metric,
    Precision,
    check_codebook,
    check_float,
    check_integer,
    check_option,
)

Encoder: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Codebook: TypeAlias = Tensor | nn.Module | Sequence[Tensor]


class Labels(NamedTuple):
    """The latent actions of B pairs.

    Attributes:
        indices: (B, ...) int64: one code a slot; −1 where the encoder's row is not finite.
        vectors: (B, ..., D) float: the codes themselves; NaN where the index is −1. Of a residual list, their sum.
    """

    indices: Tensor
    vectors: Tensor


class Labeller:
    """Pairs of observations in, codes out: ``labels = labeller(o, o_next)``, without gradients.

    Args:
        encoder: maps o and o_next, (B, D_o) float32 or (B, *shape), to rows (B, ..., D), floating point. A module must
            be in evaluation mode: in training mode its rows may depend on the rest of the batch.
        codebook: what the rows are looked up in.

            - (K, D): one codebook for all rows; the indices are (B, ...).
            - (H, K, D): one a head; the rows are (B, H, ..., D) and the indices (B, H, ...).
            - a list of (K_i, D), residual: each is looked up in what the ones before it left over; the indices are
              (B, ..., Q) for Q codebooks, which may differ in K.
            - a module in evaluation mode with ``quantized, indices, ... = module(rows)``, such as those of
              :mod:`lamkernels.nn` and of vector-quantize-pytorch; the indices are (B, ...), or (B, ..., Q).
        metric: of the lookup in a tensor or a list, as for :func:`lamkernels.nearest_code`; None is "l2". A module has
            its own, then it must be None.
        precision: the same; None is "exact": a label is made once and kept.
        shape: that the encoder wants an observation in; None leaves it flat.
        device: the encoder's; None is that of its parameters, or of the codebook.

    Raises:
        TypeError: encoder is not callable, or codebook is none of the above.
        ValueError: a module is in training mode or on another device, a shape or an option is not allowed.
    """

    def __init__(
        self,
        encoder: Encoder,
        codebook: Codebook,
        *,
        metric: Metric | None = None,
        precision: Precision | None = None,
        shape: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not callable(encoder):
            raise TypeError(f"encoder is a {type(encoder).__name__}; it must be callable: encoder(o, o_next)")
        _check_evaluates("encoder", _module_of(encoder))
        self.encoder = encoder
        self.shape = None if shape is None else tuple(shape)
        for size in self.shape or ():
            check_integer("an entry of shape", size)
        self.codebook = _checked(codebook)
        self.device = _device(encoder, self.codebook) if device is None else torch.device(device)
        if isinstance(self.codebook, nn.Module):
            if metric is not None or precision is not None:
                raise ValueError(
                    f"metric is {metric!r} and precision {precision!r}; with a module as the codebook both must be "
                    "None, it has its own"
                )
            _check_evaluates("codebook", self.codebook)
        elif isinstance(self.codebook, list):
            self.codebook = [codes.to(self.device) for codes in self.codebook]
        else:
            self.codebook = self.codebook.to(self.device)
        for name, part in (("encoder", _module_of(encoder)), ("codebook", self.codebook)):
            elsewhere = {t.device.type for t in _tensors(part)} - {self.device.type}
            if elsewhere:
                raise ValueError(f"{name} is on {', '.join(sorted(elsewhere))}; it must be on device {self.device}")
        self.metric: Metric = metric or "l2"
        self.precision: Precision = precision or "exact"
        check_option("metric", self.metric, METRICS)
        check_option("precision", self.precision, PRECISIONS)

    @torch.inference_mode()
    def __call__(self, o: Tensor, o_next: Tensor) -> Labels:
        """The labels of the pairs (o, o_next), (B, D_o) each, on the encoder's device.

        Raises:
            TypeError: the encoder does not return a floating-point tensor.
            ValueError: it does not return B rows of the codebook's length; or o does not fit ``shape``.
        """
        if self.shape is not None:
            o, o_next = (self._shaped(name, rows) for name, rows in (("o", o), ("o_next", o_next)))
        x = self.encoder(o.to(self.device), o_next.to(self.device))
        check_float("what the encoder returns", x)
        if x.ndim < 2 or x.shape[0] != len(o):
            raise ValueError(
                f"the encoder returns shape {tuple(x.shape)} for {len(o)} pairs; it must be ({len(o)}, ..., D)"
            )
        if isinstance(self.codebook, nn.Module):
            return _by_module(self.codebook, x)
        codebooks = self.codebook if isinstance(self.codebook, list) else [self.codebook]
        dim, heads = codebooks[0].shape[-1], codebooks[0].shape[:-2]
        if x.shape[-1] != dim or (heads and (x.ndim < 3 or x.shape[1] != heads[0])):
            wanted = ", ".join(map(str, (len(o), *heads)))
            raise ValueError(
                f"the encoder returns shape {tuple(x.shape)}; for this codebook it must be ({wanted}, ..., {dim})"
            )
        if not isinstance(self.codebook, list):
            return self._nearest(x, self.codebook)
        found, total = [], torch.zeros_like(x)
        for codes in self.codebook:
            labels = self._nearest(x, codes)
            found.append(labels.indices)
            total = total + labels.vectors
            x = x - labels.vectors
        return Labels(torch.stack(found, -1), total)

    def _shaped(self, name: str, rows: Tensor) -> Tensor:
        try:
            return rows.reshape(len(rows), *(self.shape or ()))
        except RuntimeError as error:
            raise ValueError(f"{name} has {rows[0].numel()} entries; shape is {self.shape}") from error

    def _nearest(self, x: Tensor, codebook: Tensor) -> Labels:
        dtype = torch.promote_types(x.dtype, codebook.dtype)  # of both: no bit of either is lost
        x, codebook = x.to(dtype), codebook.to(dtype)
        if codebook.ndim == 3:
            x = x.movedim(0, 1)
        indices = nearest_code(x, codebook, metric=self.metric, precision=self.precision)
        vectors = lookup(indices, codebook)
        return Labels(indices.movedim(0, 1), vectors.movedim(0, 1)) if codebook.ndim == 3 else Labels(indices, vectors)

    def description(self) -> dict[str, Any]:
        """What the labels depend on, as JSON: names, options, and the SHA-256 of every tensor of encoder and codebook.

        A callable that is no module, no method of one and no ``functools.partial`` of these is known by its name alone.
        """
        module = _module_of(self.encoder)
        codebook = self.codebook
        named = (
            dict(codebook.state_dict())
            if isinstance(codebook, nn.Module)
            else dict(enumerate(codebook if isinstance(codebook, list) else [codebook]))
        )
        own = None if isinstance(codebook, nn.Module) else {"metric": self.metric, "precision": self.precision}
        return {
            "encoder": _name(self.encoder),
            "encoder_tensors": None if module is None else _digest(module.state_dict()),
            "codebook": repr(codebook) if isinstance(codebook, nn.Module) else [list(t.shape) for t in named.values()],
            "codebook_tensors": _digest(named),
            "shape": None if self.shape is None else list(self.shape),
            "device": self.device.type,
            **(own or {}),
        }


def _by_module(module: nn.Module, x: Tensor) -> Labels:
    result = module(x)
    if not isinstance(result, tuple) or len(result) < 2 or not all(isinstance(part, Tensor) for part in result[:2]):
        raise TypeError(
            "codebook is a module that does not return (quantized, indices, ...); give its codebook as a tensor"
        )
    vectors, indices = result[:2]
    rows = x.shape[:-1]
    if indices.is_floating_point() or indices.shape[: len(rows)] != rows or indices.ndim > x.ndim:
        raise ValueError(
            f"codebook is a module whose indices are {indices.dtype} {tuple(indices.shape)}; for rows "
            f"{tuple(x.shape)} they must be integers {tuple(rows)}, or {tuple(rows)} and an axis of codebooks"
        )
    finite = x.isfinite().all(-1)  # modules give such rows the index 0
    spread = finite if indices.ndim == finite.ndim else finite[..., None]
    return Labels(indices.long().masked_fill(~spread, -1), vectors.masked_fill(~finite[..., None], torch.nan))


def _checked(codebook: Codebook) -> Tensor | nn.Module | list[Tensor]:
    if isinstance(codebook, nn.Module):
        return codebook
    if isinstance(codebook, Tensor):
        check_float("codebook", codebook)
        check_codebook(codebook)
        return codebook.detach()
    if not isinstance(codebook, (list, tuple)) or not codebook:
        raise TypeError(
            f"codebook is {codebook!r:.80}; it must be a tensor (K, D) or (H, K, D), a module, or a list of (K, D)"
        )
    for position, codes in enumerate(codebook):
        check_float(f"codebook[{position}]", codes)
        if codes.ndim != 2 or codes.numel() == 0 or codes.shape[1] != codebook[0].shape[-1]:
            raise ValueError(
                f"codebook[{position}] has shape {tuple(codes.shape)}; each of a residual list must be "
                f"(K, {codebook[0].shape[-1]}) with K at least 1"
            )
    return [codes.detach() for codes in codebook]


def _module_of(encoder: Any) -> nn.Module | None:
    """The module that a callable is, is a method of, or is a partial call of."""
    while isinstance(encoder, functools.partial):
        encoder = encoder.func
    owner = getattr(encoder, "__self__", encoder)
    return owner if isinstance(owner, nn.Module) else None


def _name(encoder: Any) -> str:
    while isinstance(encoder, functools.partial):
        encoder = encoder.func
    named = encoder if hasattr(encoder, "__qualname__") else type(encoder)
    return f"{named.__module__}:{named.__qualname__}"


def _check_evaluates(name: str, module: nn.Module | None) -> None:
    if module is not None and any(part.training for part in module.modules()):
        raise ValueError(f"{name} is in training mode, in which codes may depend on the batch; call its .eval() first")


def _tensors(part: Any) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()] if isinstance(part, nn.Module) else []


def _device(encoder: Encoder, codebook: Tensor | nn.Module | list[Tensor]) -> torch.device:
    tensors = [*_tensors(_module_of(encoder)), *_tensors(codebook)]
    if not isinstance(codebook, nn.Module):
        tensors.append(codebook[0])
    return tensors[0].device if tensors else torch.device("cpu")


def _digest(tensors: dict[Any, Any]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes; of what is no tensor, its text."""
    digest = hashlib.sha256()
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r};".encode())
    return digest.hexdigest()
