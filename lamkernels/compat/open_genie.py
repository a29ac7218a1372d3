"""The lookup-free quantiser of open-genie, for latent actions and for video tokens."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamkernels.compat.base import Compat
from lamkernels.lookup_free import LFQOutput, clamped_entropies, lookup_free_quantize
from lamkernels.validation import check_option

EntropyForm = Literal["clamped", "factorised"]
CLAMP = 1e-6  # of p in log p


class LookupFreeQuantization(Compat):
    """open-genie's ``LookupFreeQuantization``: ``(out, idxs), loss = lfq(inp)``; in eval mode loss is None.

    loss = entropy_weight · (mean H(p) + diversity_weight · H(mean p)) + commit_weight · mean((x − sg q)²), where
    p = softmax(2β x·c) over the 2^d codes. Upstream adds the entropy of the mean, so that it is made small.

    Args:
        d_codebook: d, the number of bits of a code.
        n_codebook: c, the number of codes that a row is made of.
        input_dim: size of a row; where it is not c·d, ``proj_inp`` and ``proj_out`` are linear layers.
        use_bias: whether they have a bias.
        frac_sample: kept, and not used, as upstream does.
        commit_weight: weight of the commitment loss.
        entropy_weight: weight of both entropies.
        diversity_weight: weight of the entropy of the mean against that of the rows.
        entropy_form: how they are computed. "clamped": as upstream, with log(max(p, 1e-6)), of N · 2^d terms.
            "factorised": exactly, from independent bits; off from the clamped value by 1e-4 at d = 8 and by more for
            larger d. On a module that was swapped, set the attribute of that name.

    Shape:
        inp (b, ..., D), with ``transpose`` (b, D, ...) -> out as inp, idxs (b, ..., c) int64 without its axes of
        size 1, loss () or None, in fp32 under autocast. q = sign(x) with sign(0) = 0, while its bit is 0; the first
        entry is the highest bit. In eval mode the gradient of the rows is 0. A row that is not finite is quantised to
        NaN and has index 0.

    State:
        bit_mask (d,) int64, proj_inp.*, proj_out.*; ``codebook`` (2^d, d) is not saved.

    Raises:
        ValueError: shapes do not fit; ``transpose`` where idxs has lost all but one axis, which upstream cannot either.
    """

    upstream_names = ("LookupFreeQuantization",)
    entropy_form: EntropyForm = "clamped"
    bit_mask: Tensor
    codebook: Tensor

    def __init__(
        self,
        d_codebook: int,
        n_codebook: int = 1,
        input_dim: int | None = None,
        use_bias: bool = True,
        frac_sample: float = 1.0,
        commit_weight: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        *,
        entropy_form: EntropyForm = "clamped",
    ) -> None:
        super().__init__()
        check_option("entropy_form", entropy_form, ("clamped", "factorised"))
        code_dim = d_codebook * n_codebook
        input_dim = code_dim if input_dim is None else input_dim
        self.proj_inp: nn.Module = nn.Identity()
        self.proj_out: nn.Module = nn.Identity()
        if input_dim != code_dim:
            self.proj_inp = nn.Linear(input_dim, code_dim, bias=use_bias)
            self.proj_out = nn.Linear(code_dim, input_dim, bias=use_bias)
        self.n_codebook, self.frac_sample, self.commit_weight = n_codebook, frac_sample, commit_weight
        self.entropy_weight, self.diversity_weight = entropy_weight, diversity_weight
        self.entropy_form = entropy_form
        self.register_buffer("bit_mask", 2 ** torch.arange(d_codebook - 1, -1, -1))
        bits = torch.arange(2**d_codebook)[:, None] & self.bit_mask
        self.register_buffer("codebook", (bits != 0).float() * 2 - 1, persistent=False)

    def forward(
        self, inp: Tensor, beta: float = 100.0, transpose: bool = False
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Quantises inp; β is the inverse temperature of the code distribution."""
        if inp.ndim < 2:
            raise ValueError(f"inp has shape {tuple(inp.shape)}; it must be (b, ..., D), or (b, D, ...) with transpose")
        if transpose:
            inp = inp.movedim(1, -1)
        x: Tensor = self.proj_inp(inp)
        if self.n_codebook > 1:
            x = x.reshape(*x.shape[:-1], self.n_codebook, x.shape[-1] // self.n_codebook)  # (b, ..., c, d)
        exact = self.training and self.entropy_form == "factorised"
        out = lookup_free_quantize(
            x, zero="zero", codebook_entropy=False, inv_temperature=float(beta) if exact else 100.0
        )
        code = out.quantized
        if not self.training:  # a sign has a gradient of 0, not none
            code = code.detach() + 0 * x if x.requires_grad else code
        out_rows: Tensor = self.proj_out(code if self.n_codebook == 1 else code.flatten(-2))
        idxs = out.indices.clamp(min=0).squeeze()
        if transpose:
            if idxs.ndim < 2:
                raise ValueError(
                    f"idxs has shape {tuple(idxs.shape)} without its axes of size 1; transpose needs two axes"
                )
            # upstream moves the last axis that is left, whatever it is
            out_rows, idxs = out_rows.movedim(-1, 1), idxs.movedim(-1, 1)
        if not self.training:
            return (out_rows, idxs), None
        x = x.reshape(-1, self.n_codebook, x.shape[-1])
        if exact:
            sample, of_mean = self._factorised(x, out, beta)
        else:  # in the dtype of the codes: at β = 100 a logit has no digits left in half precision
            x = x.to(torch.promote_types(x.dtype, self.codebook.dtype))
            sample, of_mean = clamped_entropies(x, self.codebook, beta, CLAMP)
        loss = self.entropy_weight * torch.add(sample, of_mean, alpha=self.diversity_weight)
        return (out_rows, idxs), torch.add(loss, out.commitment_loss, alpha=self.commit_weight).to(loss.dtype)

    def _factorised(self, x: Tensor, out: LFQOutput, beta: float) -> tuple[Tensor, Tensor]:
        """Mean H(p) and H(mean p) without the clamp. Every codebook has a mean of its own."""
        of_means = [
            lookup_free_quantize(x[:, i], inv_temperature=float(beta)).codebook_entropy for i in range(self.n_codebook)
        ]
        return out.sample_entropy, torch.stack([h for h in of_means if h is not None]).mean()

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        arguments = list(inspect.signature(type(module).forward).parameters)[1:]
        if arguments != ["inp", "beta", "transpose"]:
            return f"its forward takes {', '.join(arguments)}; the one replaced takes inp, beta, transpose"
        mask, codebook = getattr(module, "bit_mask", None), getattr(module, "codebook", None)
        if not isinstance(mask, Tensor) or not torch.equal(mask.cpu(), 2 ** torch.arange(mask.numel() - 1, -1, -1)):
            return "it has no bit_mask of the powers of 2, the highest first"
        if not isinstance(codebook, Tensor) or codebook.shape != (2 ** mask.numel(), mask.numel()):
            return "it has no codebook of (2^d, d)"
        weights = "n_codebook", "commit_weight", "entropy_weight", "diversity_weight", "proj_inp", "proj_out"
        missing = [name for name in weights if not hasattr(module, name)]
        return f"it has no {', '.join(missing)}" if missing else None

    def probe(self) -> tuple[Any, ...]:
        dim = self.n_codebook * self.bit_mask.numel()
        weight = getattr(self.proj_inp, "weight", None)
        width, like = (dim, self.codebook) if weight is None else (weight.shape[1], weight)
        return (torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(like),)
