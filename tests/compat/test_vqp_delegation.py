"""Options without a fused form run in the installed package on the same state, or raise and name what is missing."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import vector_quantize_pytorch as upstream
from compat_cases import assert_same_state, compare_step, paired, train_both

from lamkernels.compat import vector_quantize_pytorch as ours

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


UNFUSED = {
    "stochastic_sample_codes": {"sample_codebook_temp": 0.5, "stochastic_sample_codes": True},
    "straight_through": {"straight_through": True, "rotation_trick": False},
    "commitment_use_cross_entropy_loss": {"commitment_use_cross_entropy_loss": True},
    "orthogonal_reg_weight": {"orthogonal_reg_weight": 0.5, "orthogonal_reg_active_codes_only": True},
    "codebook_diversity_loss_weight": {"codebook_diversity_loss_weight": 0.1},
    "directional_reparam": {"directional_reparam": True, "threshold_ema_dead_code": 1},
    "affine_param": {"affine_param": True},
    "vq_bridge": {"vq_bridge": torch.nn.Linear(8, 8)},
    "sync_update_v": {"sync_update_v": 0.2, "learnable_codebook": True, "ema_update": False},
    "in_place_codebook_optimizer": {
        "in_place_codebook_optimizer": sgd, "learnable_codebook": True, "ema_update": False,
    },
}  # fmt: skip


def make(options):
    return paired("VectorQuantize", dim=8, codebook_size=16, **options)


@pytest.mark.parametrize("name", UNFUSED)
def test_the_constructor_takes_the_option_to_upstream(name):
    fused, stock = make(UNFUSED[name])
    assert type(fused) is ours.VectorQuantize
    train_both((fused, stock), lambda generator: torch.randn(2, 20, 8, generator=generator), steps=5)
    fused.load_state_dict(stock.state_dict())
    reason = ours.VectorQuantize.refusal(stock)
    assert reason is not None and "has no fused form" in reason
    twin = pickle.loads(pickle.dumps(fused)) if name not in ("affine_param",) else copy.deepcopy(fused)
    compare_step((twin.eval(), stock.eval()), torch.randn(2, 20, 8))


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True}, {"heads": 2, "codebook_dim": 4}], ids=str)
def test_a_cross_entropy_over_given_indices(options):
    modules = make(options)
    shape = (2, 20, 2) if "heads" in options else (2, 20)
    compare_step(modules, torch.randn(2, 20, 8), indices=torch.randint(0, 16, shape))
    assert_same_state(*modules)


@pytest.mark.parametrize("training", [True, False])
def test_topk(training):
    modules = tuple(module.train(training) for module in make({"threshold_ema_dead_code": 1}))
    compare_step(modules, torch.randn(2, 20, 8), topk=3)
    assert_same_state(*modules)


def test_an_implicit_codebook():
    def transform(codes):
        return codes[:, None, None].expand(-1, 2, 20, -1, -1) * 1.5

    modules = make({"learnable_codebook": True, "ema_update": False})
    compare_step(modules, torch.randn(2, 20, 8), codebook_transform_fn=transform)
    assert_same_state(*modules)


def test_an_attribute_set_after_the_constructor_is_not_ignored():
    modules = make({})
    for module in modules:
        module.commitment_use_cross_entropy_loss = True
    compare_step(modules, torch.randn(2, 20, 8))


RESIDUAL = {
    "implicit_neural_codebook": {"implicit_neural_codebook": True, "mlp_kwargs": {"depth": 1}},
    "diveq": {"diveq": True},
    "beam_size": {"beam_size": 2},
    "beam_size, shared": {"beam_size": 2, "shared_codebook": True, "eval_beam_size": 3},
    "a stochastic layer": {"stochastic_sample_codes": True, "shared_codebook": True},
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_options(name):
    fused, stock = paired("ResidualVQ", dim=8, codebook_size=16, num_quantizers=3, **RESIDUAL[name])
    assert type(fused) is ours.ResidualVQ
    train_both((fused, stock), lambda generator: torch.randn(2, 20, 8, generator=generator), steps=4)
    compare_step((fused.eval(), stock.eval()), torch.randn(2, 20, 8))


def test_a_residual_cross_entropy_fails_as_in_upstream():
    """1.32.0 unpacks three values of the two that its layers return."""
    for module in paired("ResidualVQ", dim=8, codebook_size=16, num_quantizers=3):
        with pytest.raises(ValueError, match="not enough values to unpack"):
            module(torch.randn(2, 20, 8), indices=torch.randint(0, 16, (2, 20, 3)))


def test_noise_dropout():
    modules = paired("FSQ", levels=[5, 3], preserve_symmetry=True, noise_dropout=0.5)
    compare_step(modules, torch.randn(2, 20, 2))
    compare_step(tuple(module.eval() for module in modules), torch.randn(2, 20, 2))


def test_cosine_projection_of_lfq():
    fused, stock = paired("LFQ", codebook_size=16, dim=8, cosine_sim_project_in=True)
    compare_step((fused, stock), torch.randn(2, 20, 8))
    assert type(pickle.loads(pickle.dumps(fused))) is ours.LFQ


def test_names_without_a_fused_form_are_the_packages():
    assert ours.ResidualSimVQ is upstream.ResidualSimVQ
    with pytest.raises(AttributeError, match="NoSuchQuantizer"):
        _ = ours.NoSuchQuantizer


@pytest.fixture
def not_installed(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "vector_quantize_pytorch"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)


@pytest.mark.usefixtures("not_installed")
class TestWithoutThePackage:
    @pytest.mark.parametrize("name", UNFUSED)
    def test_an_option_raises_with_its_name_and_the_install_line(self, name):
        with pytest.raises(ImportError, match=f"{name}=.*pip install vector-quantize-pytorch"):
            ours.VectorQuantize(8, 16, **UNFUSED[name])

    @pytest.mark.parametrize("argument", ["indices", "topk", "codebook_transform_fn"])
    def test_an_argument_of_the_forward(self, argument):
        with pytest.raises(ImportError, match=f"{argument}.*pip install"):
            ours.VectorQuantize(8, 16)(torch.randn(2, 20, 8), **{argument: 1})

    @pytest.mark.parametrize("name", ["implicit_neural_codebook", "diveq", "beam_size"])
    def test_residual(self, name):
        with pytest.raises(ImportError, match=f"{name}=.*pip install"):
            ours.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, **RESIDUAL[name])

    def test_the_others(self):
        with pytest.raises(ImportError, match=r"noise_dropout=0.5.*pip install"):
            ours.FSQ([5, 3], preserve_symmetry=True, noise_dropout=0.5)
        with pytest.raises(ImportError, match=r"cosine_sim_project_in=True.*pip install"):
            ours.LFQ(dim=4, cosine_sim_project_in=True)
        with pytest.raises(AttributeError, match=r"ResidualSimVQ.*pip install"):
            _ = ours.ResidualSimVQ

    def test_what_is_fused_needs_nothing(self):
        x = torch.randn(2, 20, 8, requires_grad=True)
        for module in (
            ours.VectorQuantize(8, 16, threshold_ema_dead_code=2, kmeans_init=True, codebook_dim=4),
            ours.ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, quantize_dropout=True, shared_codebook=True),
            ours.GroupedResidualVQ(dim=8, groups=2, codebook_size=16, num_quantizers=2),
            ours.FSQ([5, 3], dim=8),
            ours.ResidualFSQ(levels=[5, 3], num_quantizers=2, dim=8),
            ours.LFQ(codebook_size=16, dim=8),
            ours.SimVQ(8, 16),
        ):
            quantized, *_ = module(x)
            assert quantized.shape == x.shape
            quantized.sum().backward()
