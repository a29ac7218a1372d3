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
