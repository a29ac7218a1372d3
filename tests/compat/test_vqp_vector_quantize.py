"""VectorQuantize against the installed vector-quantize-pytorch: 100 steps of training, from one state and one seed."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import vector_quantize_pytorch as upstream
from compat_cases import assert_same_state, compare_step, paired, train_both

from lamkernels.compat import vector_quantize_pytorch as ours

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")

OPTIONS = {
    "default": {},
    "straight-through": {"rotation_trick": False},
    "slow decay, other epsilon": {"decay": 0.99, "eps": 1e-3, "commitment_weight": 0.25},
    "projected": {"codebook_dim": 4},
    "projected and normed": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "cosine": {"use_cosine_sim": True},
    "cosine, straight-through": {"use_cosine_sim": True, "rotation_trick": False},
    "dead codes": {"threshold_ema_dead_code": 2},
    "dead codes, cosine": {"threshold_ema_dead_code": 2, "use_cosine_sim": True},
    "more dead codes than rows": {"threshold_ema_dead_code": 9, "codebook_size": 64},
    "k-means": {"kmeans_init": True},
    "k-means, cosine": {"kmeans_init": True, "use_cosine_sim": True, "kmeans_iters": 3},
    "heads": {"heads": 2, "codebook_dim": 4},
    "heads, projected": {"heads": 3, "codebook_dim": 4, "threshold_ema_dead_code": 2},
    "codebook per head": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "codebook per head, cosine": {
        "heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True, "use_cosine_sim": True,
        "threshold_ema_dead_code": 2, "kmeans_init": True,
    },
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, straight-through": {"learnable_codebook": True, "ema_update": False, "rotation_trick": False},
    "learnable, dead codes": {"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 1},
    "learnable, no route": {"learnable_codebook": True, "ema_update": False, "route_gradients_to_input": False},
    "no update": {"ema_update": False},
    "manual update": {"manual_ema_update": True},
    "frozen": {"freeze_codebook": True},
    "no commitment": {"commitment_weight": 0.0},
    "channels first": {"channel_last": False},
    "image": {"accept_image_fmap": True},
    "image, heads": {"accept_image_fmap": True, "heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "volume": {"accept_3d_fmap": True, "threshold_ema_dead_code": 2},
    "one dimension": {"dim": 1},
}  # fmt: skip


def rows_for(options, generator, dtype=torch.float32):
    dim = options.get("dim", 8)
    shape = (2, 20, dim)
    if options.get("channel_last") is False:
        shape = (2, dim, 20)
    if options.get("accept_image_fmap"):
        shape = (2, dim, 4, 5)
    if options.get("accept_3d_fmap"):
        shape = (2, dim, 2, 2, 5)
    return torch.randn(shape, generator=generator, dtype=dtype)


def pair(options):
    return paired("VectorQuantize", **({"dim": 8, "codebook_size": 16} | options))


@pytest.mark.parametrize("name", OPTIONS)
def test_training_is_upstreams(name):
    options = OPTIONS[name]
    train_both(pair(options), lambda generator: rows_for(options, generator))


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_is_upstreams(name):
    options = OPTIONS[name]
    fused, stock = (module.eval() for module in pair(options))
    compare_step((fused, stock), rows_for(options, torch.Generator().manual_seed(1)))
    assert_same_state(fused, stock)


@pytest.mark.parametrize("name", ["default", "learnable", "cosine", "codebook per head", "no commitment"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_an_input_without_gradient_and_the_breakdown(name, requires_grad):
    options = OPTIONS[name]
    x = rows_for(options, torch.Generator().manual_seed(1))
    compare_step(pair(options), x, requires_grad=requires_grad, return_loss_breakdown=True)


@pytest.mark.parametrize("name", ["default", "cosine", "dead codes", "more dead codes than rows", "k-means"])
@pytest.mark.parametrize("zeros", [True, False])
def test_masks_are_upstreams(name, zeros):
    options = OPTIONS[name] | {"return_zeros_for_masked_padding": zeros}
    modules = pair(options)
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(2)) < 0.6
    train_both(modules, lambda generator: rows_for(options, generator), steps=20, mask=mask)
    x = rows_for(options, torch.Generator().manual_seed(3))
    compare_step(modules, x, lens=torch.tensor([7, 20]))
    assert_same_state(*modules)


@pytest.mark.parametrize("options", [{"codebook_dim": 4}, {"heads": 2, "codebook_dim": 4}], ids=str)
def test_a_mask_is_as_leaving_the_rows_out_where_upstream_fails(options):
    """Upstream 1.32.0 compares codes with the input before its projection and its split into heads."""
    fused, stock = pair(options)
    x, mask = rows_for(options, torch.Generator().manual_seed(1)), torch.ones(2, 20, dtype=torch.bool)
    mask[:, 12:] = False
    with pytest.raises((RuntimeError, UserWarning), match="size"):
        stock(x, mask=mask)
    short = copy.deepcopy(fused)
    for _ in range(3):
        quantized, indices, loss = fused(x, mask=mask)
        expected = short(x[:, :12])
        torch.testing.assert_close(quantized[:, :12], expected[0])
        torch.testing.assert_close(indices[:, :12], expected[1])
        torch.testing.assert_close(loss, expected[2])
        assert not quantized[:, 12:].any() and (indices[:, 12:] == -1).all()
        assert_same_state(fused, short)


@pytest.mark.parametrize("name", ["default", "heads", "codebook per head", "cosine"])
def test_one_token_a_row(name):
    compare_step(pair(OPTIONS[name]), torch.randn(9, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    x = torch.randn(2, 20, 8).to(dtype)
    fused, stock = pair({"rotation_trick": False})
    mine, theirs = fused(x), stock(x)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    torch.testing.assert_close(mine[1], theirs[1])
    torch.testing.assert_close(mine[0], theirs[0])
    # upstream takes the mean in the dtype of x
    torch.testing.assert_close(mine[2].to(dtype), theirs[2].to(dtype))
    assert_same_state(fused, stock)


def test_a_module_cast_to_double_and_autocast():
    fused, stock = (module.double() for module in pair({"codebook_dim": 4}))
    compare_step((fused, stock), torch.randn(2, 20, 8, dtype=torch.float64))
    assert_same_state(fused, stock)
    modules = pair({"codebook_dim": 4})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = (module(torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))) for module in modules)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    torch.testing.assert_close(mine[1], theirs[1])


WEIGHTS = {
    "none": None,
    "a code": torch.linspace(0, 1, 16),
    "a head and a code": torch.linspace(0, 1, 16)[None],
    "a function": lambda sums, counts: counts / counts.sum(),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weighted_and_accumulated_updates(name):
    modules = pair({"threshold_ema_dead_code": 1})
    for step in range(6):
        x = torch.randn(2, 20, 8)
        compare_step(modules, x, seed=step, accum_ema_update=step % 3 != 2, ema_update_weight=WEIGHTS[name])
        assert_same_state(*modules)


@pytest.mark.parametrize("name", ["default", "heads", "codebook per head", "image", "channels first", "cosine",
                                  "projected"])  # fmt: skip
@pytest.mark.parametrize("masked", [True, False])
def test_update_indices_is_upstreams_and_the_update_left_out(name, masked):
    options = OPTIONS[name]
    if masked and (name in ("image", "heads", "codebook per head", "projected")):
        pytest.skip("upstream does not take this with a mask in training")
    x = rows_for(options, torch.Generator().manual_seed(1))
    mask = (torch.arange(20) % 3 > 0).expand(2, 20) if masked else None
    fused, stock = pair(options)
    reference = copy.deepcopy(fused)
    reference(x, mask=mask)
    _, indices, _ = fused(x, mask=mask, ema_update=False)
    fused.update_ema_indices(x, indices, mask=mask)
    _, indices, _ = stock(x, mask=mask, ema_update=False)
    stock.update_ema_indices(x, indices, mask=mask)
    assert_same_state(fused, stock)
    assert_same_state(fused, reference)


@pytest.mark.parametrize("name", ["default", "codebook per head", "image", "channels first", "cosine"])
def test_codes_from_indices(name):
    fused, stock = (module.eval() for module in pair(OPTIONS[name]))
    x = rows_for(OPTIONS[name], torch.Generator().manual_seed(1))
    quantized, indices, _ = fused(x)
    torch.testing.assert_close(fused.get_output_from_indices(indices), quantized)
    torch.testing.assert_close(fused.get_codes_from_indices(indices), stock.get_codes_from_indices(indices))
    torch.testing.assert_close(fused.codebook, stock.codebook)
    fused.codebook = torch.zeros_like(fused.codebook)
    assert not fused._codebook.embed.any()


@pytest.mark.parametrize("options", [{}, {"heads": 2, "codebook_dim": 4}], ids=str)
def test_expire_codes_is_upstreams(options):
    modules = pair({"threshold_ema_dead_code": 2} | options)
    x = torch.randn(2, 20, 8)
    for module in modules:
        torch.manual_seed(1)
        module.expire_codes_(x)
    assert_same_state(*modules)


def test_a_checkpoint_loads_strictly_both_ways_and_keeps_kmeans_done():
    fused, stock = pair({"kmeans_init": True, "codebook_dim": 4})
    x = torch.randn(2, 20, 8)
    fused(x)
    stock.load_state_dict(fused.state_dict())
    torch.testing.assert_close(stock.eval()(x)[1], fused.eval()(x)[1])
    fresh, _ = pair({"kmeans_init": True, "codebook_dim": 4})
    fresh.load_state_dict(stock.state_dict())
    embed = fresh._codebook.embed.clone()
    torch.testing.assert_close(fresh.eval()(x)[1], fused(x)[1])
    assert torch.equal(fresh._codebook.embed, embed)
    fresh._codebook.initted.fill_(False)  # on the CPU the flag itself is read
    fresh(x)
    assert not torch.equal(fresh._codebook.embed, embed)


@pytest.mark.parametrize("name", ["default", "learnable", "k-means"])
def test_copies_and_pickles_train_on_as_the_module(name):
    module = pair(OPTIONS[name])[0]
    module(torch.randn(2, 20, 8))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is ours.VectorQuantize
        torch.manual_seed(1)
        mine = copy.deepcopy(module)(torch.ones(2, 20, 8))
        torch.manual_seed(1)
        torch.testing.assert_close(twin(torch.ones(2, 20, 8)), mine)


def test_rows_that_are_not_finite_teach_nothing():
    fused, _ = pair({"threshold_ema_dead_code": 2})
    clean, x = copy.deepcopy(fused), torch.randn(2, 20, 8)
    x[0, 0, 3], x[1, 5, 0] = torch.nan, torch.inf
    mask = x.isfinite().all(-1)
    torch.manual_seed(1)
    quantized, indices, loss = fused(x)
    torch.manual_seed(1)
    expected = clean(x.nan_to_num(), mask=mask)
    assert quantized[~mask].isnan().all() and (indices[~mask] == 0).all()
    torch.testing.assert_close(quantized[mask], expected[0][mask])
    torch.testing.assert_close(loss, expected[2])
    assert_same_state(fused, clean)


def test_replacement_without_asking_the_device_follows_the_same_rules():
    """What runs on a GPU: distinct rows for the dead codes, no row twice, never a masked or broken one."""
    from lamkernels.compat.vector_quantize_pytorch import _codebook

    fused, _ = pair({"threshold_ema_dead_code": 2})
    codebook = fused._codebook
    codebook.cluster_size[0, ::2] = 5.0
    before, rows, mask = codebook.embed.clone(), torch.randn(1, 12, 8), torch.arange(12)[None] != 3
    rows[0, 7] = torch.nan
    dead = codebook.cluster_size < 2
    _codebook._replace_without_asking(codebook, dead, rows, mask)
    assert torch.equal(codebook.embed[~dead], before[~dead])
    chosen = torch.cdist(codebook.embed[dead], rows[0, [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]])
    assert (chosen.min(1).values == 0).all() and chosen.argmin(1).unique().numel() == 8
    assert (codebook.cluster_size[dead] == 2).all()
    torch.testing.assert_close(codebook.embed_avg[dead], codebook.embed[dead] * 2)
    # fewer rows than dead codes: some wait
    codebook.cluster_size[0, :] = 0.0
    _codebook._replace_without_asking(codebook, codebook.cluster_size < 2, rows[:, :4], mask[:, :4])
    assert (codebook.cluster_size > 0).sum() == 3


def test_the_constructor_and_the_forward_have_upstreams_signatures():
    for name in ("VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "FSQ", "ResidualFSQ", "LFQ", "SimVQ"):
        for method in ("__init__", "forward"):
            mine = inspect.signature(getattr(getattr(ours, name), method)).parameters
            theirs = inspect.signature(getattr(getattr(upstream, name), method)).parameters
            extra = ["factorized_entropy"] if (name, method) == ("LFQ", "__init__") else []
            assert [*theirs, *extra] == list(mine)
            for key, parameter in theirs.items():
                assert mine[key].kind == parameter.kind
                if key not in ("straight_through_activation", "init_fn"):  # an identity, ours by another name
                    assert mine[key].default == parameter.default, (name, method, key)
        public = [key for key in vars(getattr(upstream, name)) if not key.startswith("_")]
        missing = [key for key in public if not hasattr(getattr(ours, name), key)]
        assert missing == [], (name, missing)


def test_attributes_are_upstreams():
    fused, stock = pair({"codebook_dim": 4, "heads": 2})
    for mine, theirs in ((fused, stock), (fused._codebook, stock._codebook)):
        lacking = {key for key in vars(theirs) if not hasattr(mine, key)}
        functions = {"gumbel_sample", "sample_fn", "replace_sample_fn", "kmeans_all_reduce_fn", "all_reduce_fn"}
        assert lacking <= functions | {"sync_affine_param"}, lacking


@pytest.mark.parametrize("name", ["default", "cosine", "image", "codebook per head"])
def test_compiled_without_a_break_trains_as_eager(name):
    options = OPTIONS[name]
    fused, _ = pair(options)
    compiled = torch.compile(copy.deepcopy(fused), fullgraph=True, backend="eager")
    for _ in range(2):
        x = rows_for(options, torch.Generator().manual_seed(1))
        mine, theirs = (module(x.clone().requires_grad_()) for module in (compiled, fused))
        torch.testing.assert_close(mine, theirs)
    assert_same_state(compiled._orig_mod, fused)
