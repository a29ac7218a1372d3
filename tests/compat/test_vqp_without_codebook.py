"""FSQ, ResidualFSQ, LFQ and SimVQ against the installed vector-quantize-pytorch."""

from __future__ import annotations

import pytest
import torch
from compat_cases import assert_same_output, assert_same_state, compare_step, paired, train_both

from lamkernels.compat import vector_quantize_pytorch as ours

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")

FSQS = {
    "default": {"levels": [8, 5, 5, 5]},
    "symmetric": {"levels": [4, 3, 2], "preserve_symmetry": True},
    "projected": {"levels": [5, 3], "dim": 6},
    "projected, no bias": {"levels": [5, 3], "dim": 6, "projection_has_bias": False},
    "several codebooks": {"levels": [5, 4], "num_codebooks": 3},
    "kept codebook axis": {"levels": [5, 4], "keep_num_codebooks_dim": True},
    "no indices": {"levels": [5, 4], "return_indices": False},
    "hard": {"levels": [5, 4, 8], "bound_hard_clamp": True},
    "hard, symmetric": {"levels": [5, 4, 8], "bound_hard_clamp": True, "preserve_symmetry": True},
    "rotated": {"levels": [5, 5, 5], "orthogonal_rotation": True},
    "channels first": {"levels": [5, 4], "channel_first": True, "dim": 6},
}


def rows(module, generator):
    return module.probe()[0].new_empty(module.probe()[0].shape).normal_(generator=generator)


@pytest.mark.parametrize("name", FSQS)
def test_fsq_is_upstreams(name):
    fused, stock = paired("FSQ", **FSQS[name])
    train_both((fused, stock), lambda generator: rows(fused, generator))
    fused, stock = fused.eval(), stock.eval()
    mine, _ = compare_step((fused, stock), 3 * rows(fused, None))
    if mine[1] is not None:
        torch.testing.assert_close(fused.indices_to_codes(mine[1]), stock.indices_to_codes(mine[1]))
        torch.testing.assert_close(fused.indices_to_codes(mine[1]), mine[0])
        levels = fused.indices_to_level_indices(mine[1]), stock.indices_to_level_indices(mine[1])
        assert torch.equal(*levels)
        torch.testing.assert_close(fused.implicit_codebook, stock.implicit_codebook)
    z = torch.randn(2, 3, fused.num_codebooks, fused.codebook_dim)
    codes = fused.quantize(z)
    torch.testing.assert_close(codes, stock.quantize(z))
    assert torch.equal(fused.codes_to_indices(codes), stock.codes_to_indices(codes))
    torch.testing.assert_close(fused.bound(z), stock.bound(z))
    torch.testing.assert_close(fused.symmetry_preserving_bound(z), stock.symmetry_preserving_bound(z))


@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (2, 8, 3, 4, 5)])
def test_fsq_of_images_and_videos(shape):
    modules = paired("FSQ", levels=[5, 4], dim=8, num_codebooks=2)
    mine, _ = compare_step(modules, torch.randn(shape))
    torch.testing.assert_close(modules[0].indices_to_codes(mine[1]), modules[1].indices_to_codes(mine[1]))


@pytest.mark.parametrize("force", [True, False])
def test_fsq_in_half_precision(force):
    fused, stock = paired("FSQ", levels=[5, 3], force_quantization_f32=force)
    x = torch.randn(2, 20, 2).to(torch.bfloat16)
    mine, theirs = fused(x), stock(x)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    if force:
        assert_same_output(mine, theirs)
    else:  # upstream decides in bf16, ours on the stored values
        expected = stock(x.double())[1]
        assert torch.equal(mine[1], expected)


def test_fsq_marks_rows_that_are_not_finite():
    for options in ({}, {"bound_hard_clamp": True}):
        x = torch.zeros(1, 3, 2)
        x[0, 1, 0], x[0, 2, 1] = torch.nan, torch.inf
        quantized, indices = ours.FSQ([5, 3], **options)(x)
        assert quantized[0, 1:].isnan().all() and not quantized[0, 0].isnan().any()
        assert indices[0, 0] > 0 and not indices[0, 1:].any()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"levels": [2, 3]}, "preserve_symmetry"),
        ({"levels": [3, 3], "noise_dropout": 0.1}, "preserve_symmetry"),
        ({"levels": [3, 3], "num_codebooks": 2, "keep_num_codebooks_dim": False}, "keep_num_codebooks_dim"),
    ],
)
def test_what_fsq_refuses(options, reason):
    with pytest.raises(AssertionError, match=reason):
        ours.FSQ(**options)
    with pytest.raises(AssertionError, match="must have 2"):
        ours.FSQ([3, 3])(torch.zeros(1, 2, 3))


RESIDUAL_FSQS = {
    "default": {},
    "projected": {"dim": 6},
    "tanh": {"bound_hard_clamp": False},
    "tanh, clamped input": {"bound_hard_clamp": False, "soft_clamp_input_value": [1.5, 2.0]},
    "dropout": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "rotated": {"levels": [5, 5], "orthogonal_rotation": True},
}


@pytest.mark.parametrize("name", RESIDUAL_FSQS)
def test_residual_fsq_is_upstreams(name):
    modules = paired("ResidualFSQ", **({"levels": [5, 3], "num_quantizers": 3} | RESIDUAL_FSQS[name]))
    train_both(modules, lambda generator: rows(modules[0], generator), return_all_codes=True)
    fused, stock = (module.eval() for module in modules)
    mine, _ = compare_step((fused, stock), rows(fused, None), return_all_codes=True)
    torch.testing.assert_close(fused.get_output_from_indices(mine[1]), stock.get_output_from_indices(mine[1]))
    torch.testing.assert_close(fused.codebooks, stock.codebooks)


@pytest.mark.parametrize("shape", [(2, 2, 4, 5), (2, 2, 7), (3, 2)], ids=str)
def test_residual_fsq_with_channels_first(shape):
    """With noise, whose numbers upstream draws in the order of channels last."""
    options = {"levels": [5, 3], "num_quantizers": 3, "is_channel_first": True, "noise_dropout": 0.3}
    compare_step(paired("ResidualFSQ", **options), torch.randn(shape))
    compare_step(paired("ResidualFSQ", **options | {"dim": 6}), torch.randn(shape).repeat_interleave(3, 1))


def test_what_residual_fsq_refuses():
    for options, reason in (
        ({"levels": [1, 3]}, "at least 2"),
        ({"quantize_dropout_cutoff_index": -1}, "cutoff_index"),
        ({"soft_clamp_input_value": 2.0}, "soft_clamp_input_value"),
        ({"num_codebooks": 2}, "num_codebooks"),
    ):
        with pytest.raises(AssertionError, match=reason):
            ours.ResidualFSQ(**({"levels": [5, 3], "num_quantizers": 2} | options))
    with pytest.raises(AssertionError, match="trains for fewer"):
        ours.ResidualFSQ(levels=[5, 3], num_quantizers=2).get_codes_from_indices(torch.zeros(1, 2, 1, dtype=torch.long))


LFQS = {
    "default": {"codebook_size": 256},
    "commitment": {"codebook_size": 64, "commitment_loss_weight": 0.25, "diversity_gamma": 2.0},
    "projected": {"codebook_size": 16, "dim": 6},
    "several codebooks": {"codebook_size": 16, "num_codebooks": 2},
    "scaled": {"codebook_size": 16, "codebook_scale": 0.5},
    "spherical": {"codebook_size": 16, "spherical": True, "codebook_scale": 0.5, "commitment_loss_weight": 0.1},
    "rotated": {"codebook_size": 16, "orthogonal_rotation": True},
    "clamped input": {"codebook_size": 16, "soft_clamp_input_value": 1.5},
    "softplus": {"codebook_size": 16, "experimental_softplus_entropy_loss": True},
    "activation": {"codebook_size": 16, "straight_through_activation": torch.nn.Tanh()},
    "a part of the rows": {"codebook_size": 16, "frac_per_sample_entropy": 0.4},
    "channels first": {"codebook_size": 16, "channel_first": True},
    "not forced to f32": {"codebook_size": 16, "force_quantization_f32": False},
}


@pytest.mark.parametrize("name", LFQS)
@pytest.mark.parametrize("inv_temperature", [100.0, 0.7])
def test_lfq_is_upstreams(name, inv_temperature):
    fused, stock = paired("LFQ", **LFQS[name])
    train_both(
        (fused, stock), lambda generator: rows(fused, generator), inv_temperature=inv_temperature,
        return_loss_breakdown=True, steps=100 if inv_temperature < 1 else 4,  # so steep, steps amplify rounding
    )  # fmt: skip
    fused, stock = fused.eval(), stock.eval()
    mine, _ = compare_step((fused, stock), rows(fused, None))
    torch.testing.assert_close(fused.indices_to_codes(mine.indices), stock.indices_to_codes(mine.indices))
    torch.testing.assert_close(fused.indices_to_codes(mine.indices), mine.quantized)
    codes = [module.indices_to_codes(mine.indices, project_out=False) for module in (fused, stock)]
    torch.testing.assert_close(*codes)
    torch.testing.assert_close(fused.codebook, stock.codebook)


@pytest.mark.parametrize("fraction", [1.0, 0.4])
@pytest.mark.parametrize("shape", [(3,), (3, 20)])
def test_lfq_masks(fraction, shape):
    modules = paired("LFQ", codebook_size=16, commitment_loss_weight=0.25, frac_per_sample_entropy=fraction)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    compare_step(modules, torch.randn(3, 20, 4), mask=mask, inv_temperature=1.0, return_loss_breakdown=True)
    with pytest.raises(ValueError, match="mask has shape"):
        modules[0](torch.randn(3, 20, 4), mask=torch.ones(2, 20, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (2, 8, 3, 4, 5)])
def test_lfq_of_images_and_videos(shape):
    modules = paired("LFQ", codebook_size=16, num_codebooks=2)
    mine, _ = compare_step(modules, torch.randn(shape), inv_temperature=1.0)
    torch.testing.assert_close(modules[0].indices_to_codes(mine.indices), modules[1].indices_to_codes(mine.indices))


@pytest.mark.parametrize("masked", [True, False])
def test_factorized_entropies_are_those_without_the_clamp(masked):
    fused = ours.LFQ(codebook_size=64, factorized_entropy=True)
    x = torch.randn(2, 20, 6, dtype=torch.float32, requires_grad=True)
    mask = torch.arange(20).expand(2, 20) < 13 if masked else None
    _, losses = fused(x, inv_temperature=0.5, return_loss_breakdown=True, mask=mask)
    rows = (x if mask is None else x[mask]).reshape(-1, 6).double()
    p = (2 * 0.5 * rows @ fused.codebook.double().t()).softmax(-1)
    entropy = torch.special.entr
    torch.testing.assert_close(losses.per_sample_entropy.double(), entropy(p).sum(-1).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.batch_entropy.double(), entropy(p.mean(0)).sum(), rtol=1e-5, atol=0)
    part = ours.LFQ(codebook_size=64, factorized_entropy=True, frac_per_sample_entropy=0.5)
    _, losses = part(x, inv_temperature=0.5, return_loss_breakdown=True, mask=mask)
    assert 0 < losses.per_sample_entropy < 6


def test_what_lfq_refuses():
    for options, reason in (
        ({}, "dim and codebook_size"),
        ({"codebook_size": 12}, "power of 2"),
        ({"dim": 4, "frac_per_sample_entropy": 0.0}, "frac_per_sample_entropy"),
        ({"dim": 4, "soft_clamp_input_value": 0.5}, "soft_clamp_input_value"),
        ({"dim": 4, "num_codebooks": 2, "keep_num_codebooks_dim": False}, "keep_num_codebooks_dim"),
    ):
        with pytest.raises(AssertionError, match=reason):
            ours.LFQ(**options)
    with pytest.raises(AssertionError, match="must have 4"):
        ours.LFQ(dim=4)(torch.zeros(1, 2, 3))


SIMVQS = {
    "default": {},
    "straight-through": {"rotation_trick": False},
    "frozen dim": {"frozen_codebook_dim": 5, "commitment_weight": 0.3, "input_to_quantize_commit_loss_weight": 0.7},
    "init": {"init_fn": torch.sign},
    "transform": {"codebook_transform": torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())},
    "channels first": {"channel_first": True},
}  # fmt: skip


@pytest.mark.parametrize("name", SIMVQS)
def test_simvq_is_upstreams(name):
    fused, stock = paired("SimVQ", dim=8, codebook_size=16, **SIMVQS[name])
    train_both((fused, stock), lambda generator: rows(fused, generator))
    mine, _ = compare_step((fused.eval(), stock.eval()), rows(fused, None))
    torch.testing.assert_close(fused.indices_to_codes(mine[1]), stock.indices_to_codes(mine[1]))
    torch.testing.assert_close(fused.codebook, stock.codebook)


def test_simvq_of_images():
    modules = paired("SimVQ", dim=8, codebook_size=16, channel_first=True)
    mine, _ = compare_step(modules, torch.randn(2, 8, 4, 5))
    torch.testing.assert_close(modules[0].indices_to_codes(mine[1]), modules[1].indices_to_codes(mine[1]))


MODULES = {
    "VectorQuantize": {"dim": 8, "codebook_size": 16},
    "ResidualVQ": {"dim": 8, "codebook_size": 16, "num_quantizers": 2},
    "GroupedResidualVQ": {"dim": 8, "groups": 2, "codebook_size": 16, "num_quantizers": 2},
    "FSQ": {"levels": [5, 3]},
    "ResidualFSQ": {"levels": [5, 3], "num_quantizers": 2},
    "LFQ": {"codebook_size": 16},
    "SimVQ": {"dim": 8, "codebook_size": 16},
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_upstream_turns_into_ours_by_its_class(name):
    """What ``swap`` does: a subclass of both, and no constructor."""
    _, module = paired(name, **MODULES[name])
    _, stock = paired(name, **MODULES[name])
    fused = getattr(ours, name)
    assert fused.refusal(module) is None
    theirs = type(module)
    module.__class__ = type(name, (fused, theirs), {})
    assert isinstance(module, theirs) and module.probe()[0].requires_grad is False
    for _ in range(3):
        compare_step((module, stock), module.probe()[0], seed=1)
        assert_same_state(module, stock)
    compare_step((module.eval(), stock.eval()), module.probe()[0])
    if name in ("VectorQuantize", "ResidualVQ"):  # what is not fused finds the class it came from
        compare_step((module.train(), stock.train()), module.probe()[0], **{
            "VectorQuantize": {"topk": 2}, "ResidualVQ": {"beam_size": 2}}[name])  # fmt: skip
    module.__class__ = theirs
    compare_step(
        (module, stock), torch.randn(2, 6, module.dim if hasattr(module, "dim") else 8 if "FSQ" not in name else 2)
    )


@pytest.mark.parametrize("name", MODULES)
def test_another_version_is_refused(name):
    reason = getattr(ours, name).refusal(torch.nn.Linear(2, 2))
    assert reason is not None and "has no attribute" in reason
