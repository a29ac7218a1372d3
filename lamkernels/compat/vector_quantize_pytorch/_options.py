"""Which options of ``VectorQuantize`` have no fused form, at construction and among the attributes of a module."""

from __future__ import annotations

from typing import Any

# option of the constructor -> the values with a fused form
_FUSED: dict[str, tuple[Any, ...]] = {
    "commitment_use_cross_entropy_loss": (False,),
    "stochastic_sample_codes": (False,),
    "straight_through": (False,),
    "directional_reparam": (False,),
    "vq_bridge": (None,),
    "in_place_codebook_optimizer": (None,),
    "affine_param": (False,),
    "sync_update_v": (0.0,),
}

ATTRIBUTES = (
    "_codebook", "project_in", "project_out", "has_projections", "heads", "separate_codebook_per_head",
    "has_commitment_loss", "commitment_weight", "commitment_use_cross_entropy_loss", "learnable_codebook",
    "has_codebook_orthogonal_loss", "has_codebook_diversity_loss", "rotation_trick", "directional_reparam",
    "route_gradients_to_input", "sync_update_v", "in_place_codebook_optimizer", "codebook_size", "accept_image_fmap",
    "accept_3d_fmap", "channel_last", "zero", "return_zeros_for_masked_padding", "freeze_codebook", "use_cosine_sim",
)  # fmt: skip


def unfused_options(options: dict[str, Any]) -> list[str]:
    """The names of those constructor arguments that have no fused form."""
    names = [name for name, fused in _FUSED.items() if options[name] not in fused]
    return names + [n for n in ("orthogonal_reg_weight", "codebook_diversity_loss_weight") if options[n] > 0]


def unfused_attribute(module: Any) -> str | None:
    """The first option without a fused form among the attributes of a module, ours or upstream's, else None.

    Looked up in every forward: an attribute may be set after the constructor.
    """
    own = module.__dict__
    if (
        own["commitment_use_cross_entropy_loss"]
        or own["has_codebook_orthogonal_loss"]
        or own["has_codebook_diversity_loss"]
        or own["directional_reparam"]
        or own["in_place_codebook_optimizer"] is not None
        or own["sync_update_v"] > 0
    ):
        names = ("commitment_use_cross_entropy_loss", "has_codebook_orthogonal_loss", "has_codebook_diversity_loss",
                 "directional_reparam")  # fmt: skip
        set_ = [name for name in names if own[name]]
        return set_[0] if set_ else "sync_update_v" if own["sync_update_v"] > 0 else "in_place_codebook_optimizer"
    inner = module._modules["_codebook"]
    codebook = inner.__dict__
    if codebook["affine_param"]:
        return "affine_param"
    if codebook.get("vq_bridge") is not None or inner._modules.get("vq_bridge") is not None:
        return "vq_bridge"
    sampler = codebook.get("gumbel_sample")  # upstream's inner module keeps its sampler, a partial
    if sampler is None:
        return None
    options = getattr(sampler, "keywords", None)
    if options is None or set(options) != {"stochastic", "straight_through"}:
        return "gumbel_sample"
    if options["stochastic"]:
        return "stochastic_sample_codes"
    return "straight_through" if options["straight_through"] else None


def check_vector_quantize(use_cosine_sim: bool, learnable_codebook: bool, ema_update: bool) -> None:
    """Options that upstream refuses together, with its kind of error."""
    if use_cosine_sim and learnable_codebook:
        raise AssertionError("use_cosine_sim is not compatible with learnable_codebook")
    if ema_update and learnable_codebook:
        raise AssertionError("learnable_codebook needs ema_update=False")
