"""Residual and grouped quantisers against the installed vector-quantize-pytorch."""

from __future__ import annotations

import pytest
import torch
from compat_cases import assert_same_state, compare_step, paired, train_both

from lamkernels.compat import vector_quantize_pytorch as ours

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")

OPTIONS = {
    "default": {},
    "projected": {"codebook_dim": 4},
    "sizes": {"codebook_size": (5, 16, 9), "num_quantizers": None},
    "dropout": {"quantize_dropout": True},
    "structured dropout": {
        "num_quantizers": 4, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1,
        "quantize_dropout_multiple_of": 2,
    },
    # few codes: a code that is a row leaves a residual of rounding, which the next layer codes by chance
    "shared, dead codes": {"shared_codebook": True, "threshold_ema_dead_code": 4, "codebook_size": 4},
    "shared, cosine": {"shared_codebook": True, "use_cosine_sim": True},
    "shared, k-means": {"shared_codebook": True, "kmeans_init": True, "codebook_size": 4},
    "cosine": {"use_cosine_sim": True},
    "gradient between layers": {"quant_grad_frac": 0.5, "rotation_trick": False},
    "dead codes": {"threshold_ema_dead_code": 4, "codebook_size": 4},
    "k-means": {"kmeans_init": True, "codebook_size": 4, "use_cosine_sim": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "one beam": {"beam_size": 1},
}  # fmt: skip


def pair(options, name="ResidualVQ"):
    return paired(name, **({"dim": 8, "codebook_size": 16, "num_quantizers": 3} | options))


def rows(generator):
    return torch.randn(2, 20, 8, generator=generator)


@pytest.mark.parametrize("name", OPTIONS)
def test_training_is_upstreams(name):
    train_both(pair(OPTIONS[name]), rows)


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_and_all_codes(name):
    fused, stock = (module.eval() for module in pair(OPTIONS[name]))
    mine, _ = compare_step((fused, stock), rows(torch.Generator().manual_seed(1)), return_all_codes=True)
    torch.testing.assert_close(fused.get_output_from_indices(mine[1]), mine[0], rtol=1e-5, atol=1e-5)
    codebooks = fused.codebooks, stock.codebooks
    for a, b in zip(*codebooks, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("zeros", [True, False])
def test_masks(zeros):
    modules = pair({"return_zeros_for_masked_padding": zeros, "threshold_ema_dead_code": 4, "codebook_size": 4})
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.6
    train_both(modules, rows, steps=10, mask=mask)


@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 8)], ids=str)
def test_a_shared_codebook_has_more_dead_codes_than_a_step_has_rows(shape):
    """Those that the layers leave are replaced at the end, by rows of the first sample, as upstream's are."""
    options = {"shared_codebook": True, "threshold_ema_dead_code": 4, "codebook_size": 64, "num_quantizers": 2}
    train_both(pair(options), lambda generator: torch.randn(shape, generator=generator), steps=1)


def test_a_frozen_codebook_and_a_given_seed():
    modules = pair({"quantize_dropout": True})
    for seed in range(4):
        compare_step(modules, torch.randn(2, 20, 8), freeze_codebook=True, rand_quantize_dropout_fixed_seed=seed)
    assert_same_state(*modules)


def test_coarse_indices_need_dropout():
    fused, stock = (module.eval() for module in pair({"quantize_dropout": True}))
    indices = torch.randint(0, 16, (2, 20, 2))
    torch.testing.assert_close(fused.get_output_from_indices(indices), stock.get_output_from_indices(indices))
    with pytest.raises(AssertionError, match="trains for fewer"):
        pair({})[0].get_codes_from_indices(indices)


def test_feature_maps_are_the_rows_of_their_pixels():
    """Upstream 1.32.0 refuses maps that are not square in all of channels, height and width; ours takes them."""
    x = torch.randn(2, 8, 4, 5)
    fused, stock = pair({"accept_image_fmap": True, "shared_codebook": True, "threshold_ema_dead_code": 1})
    with pytest.raises(RuntimeError):
        stock(x)
    flat, _ = pair({"shared_codebook": True, "threshold_ema_dead_code": 1})
    for step in range(5):
        torch.manual_seed(step)
        quantized, indices, losses = fused(x)
        torch.manual_seed(step)
        expected = flat(x.flatten(2).transpose(1, 2))
        torch.testing.assert_close(quantized.flatten(2).transpose(1, 2), expected[0])
        assert indices.shape == (2, 4, 5, 3)
        torch.testing.assert_close(indices.flatten(1, 2), expected[1])
        torch.testing.assert_close(losses, expected[2])
    # the averages; the rows that replace dead codes of a shared codebook are drawn in another order
    torch.testing.assert_close(fused.layers[0]._codebook.cluster_size, flat.layers[0]._codebook.cluster_size)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantize_dropout": True},
        {"shared_codebook": True},
        {"codebook_dim": 3, "threshold_ema_dead_code": 4, "codebook_size": 4},
    ],
    ids=str,
)
def test_groups(options):
    modules = pair({"groups": 2} | options, "GroupedResidualVQ")
    train_both(modules, rows, steps=30)
    fused, stock = (module.eval() for module in modules)
    mine, _ = compare_step((fused, stock), torch.randn(2, 20, 8), return_all_codes=True)
    torch.testing.assert_close(fused.get_output_from_indices(mine[1]), stock.get_output_from_indices(mine[1]))
    torch.testing.assert_close(fused.codebooks, stock.codebooks)
    compare_step((fused, stock), torch.randn(2, 20, 8), mask=torch.arange(20).expand(2, 20) < 11)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"heads": 2}, "multi-headed"),
        ({"num_quantizers": None}, "num_quantizers"),
        ({"eval_beam_size": 2}, "beam_size"),
        ({"quantize_dropout_cutoff_index": -1}, "cutoff_index"),
        ({"codebook_size": (2, 3)}, "2 codebook sizes"),
        ({"codebook_size": (2, 3), "num_quantizers": 2, "shared_codebook": True}, "one size"),
    ],
)
def test_what_upstream_refuses_is_refused_and_named(options, reason):
    with pytest.raises(AssertionError, match=reason):
        ours.ResidualVQ(**({"dim": 8, "codebook_size": 16, "num_quantizers": 3} | options))


def test_groups_that_do_not_fit():
    with pytest.raises(AssertionError, match="multiple of groups"):
        ours.GroupedResidualVQ(dim=9, groups=2, codebook_size=4, num_quantizers=1)
    module = ours.GroupedResidualVQ(dim=8, groups=2, codebook_size=4, num_quantizers=1)
    with pytest.raises(AssertionError, match="must be 8"):
        module(torch.randn(2, 3, 9))
    with pytest.raises(AssertionError, match="2 groups"):
        module(torch.randn(2, 3, 8), indices=torch.zeros(3, 2, 3, 1, dtype=torch.long))
