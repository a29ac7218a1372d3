import math

import pytest
import torch

from lamkernels.lam import metrics


def test_probe_names_every_class_that_is_linearly_readable():
    labels = torch.arange(300) % 3
    features = torch.eye(3)[labels] + 0.01 * torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    result = metrics.linear_probe(features[:200], labels[:200], features[200:], labels[200:])
    assert result.accuracy == 1.0 and result.balanced_accuracy == 1.0
    assert torch.equal(result.confusion, torch.diag(torch.bincount(labels[200:])))
    assert (result.train_rows, result.test_rows) == (200, 100)


def test_probe_on_noise_is_no_better_than_the_majority():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(4000, generator=generator) < 0.3).long()
    features = torch.randn(4000, 4, generator=generator)
    result = metrics.linear_probe(features[:2000], labels[:2000], features[2000:], labels[2000:])
    assert abs(result.accuracy - result.majority_accuracy) < 0.01
    assert result.majority_accuracy == float((labels[2000:] == 0).double().mean())
    assert abs(result.balanced_accuracy - 0.5) < 0.01


def test_majority_is_that_of_the_training_rows():
    features = torch.zeros(5, 1)
    result = metrics.linear_probe(features, torch.tensor([1, 1, 1, 0, 0]), features, torch.tensor([0, 0, 0, 0, 1]))
    assert result.majority_accuracy == pytest.approx(0.2)
    assert result.accuracy == pytest.approx(0.2)  # constant features: only the bias is left


def test_probe_is_deterministic():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(200, 5, generator=generator), torch.randint(3, (200,), generator=generator)
    first, second = (metrics.linear_probe(x[:100], y[:100], x[100:], y[100:]) for _ in range(2))
    assert torch.equal(first.confusion, second.confusion)


def test_probe_rejects_what_does_not_fit():
    x, y = torch.randn(4, 2), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="train_features has shape"):
        metrics.linear_probe(x, y[:3], x, y)
    with pytest.raises(ValueError, match="test_features has shape"):
        metrics.linear_probe(x, y, x[:0], y[:0])
    with pytest.raises(ValueError, match="columns"):
        metrics.linear_probe(x, y, x[:, :1], y)


def test_usage_counts_codes_and_words():
    usage = metrics.code_usage(torch.tensor([[0, 1], [0, 1], [0, 3], [2, 3]]), 5)
    assert usage.counts.tolist() == [[3, 0, 1, 0, 0], [0, 2, 0, 2, 0]]
    assert usage.used == 4 and usage.words == 3
    entropy = -sum(p * math.log(p) for p in (3 / 8, 2 / 8, 1 / 8, 2 / 8))
    assert usage.perplexity == pytest.approx(math.exp(entropy))
    assert usage.token_perplexity[1] == pytest.approx(2.0)


def test_even_usage_has_the_perplexity_of_the_codebook():
    assert metrics.code_usage(torch.arange(64).reshape(32, 2) % 16, 16).perplexity == pytest.approx(16.0)


def test_one_hot_codes():
    assert metrics.one_hot_codes(torch.tensor([[0, 2]]), 3).tolist() == [[1, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("function", [metrics.code_usage, metrics.one_hot_codes])
@pytest.mark.parametrize("indices", [[[3]], [[-1]], [0], []])
def test_codes_out_of_range_are_refused(function, indices):
    with pytest.raises(ValueError, match="indices"):
        function(torch.tensor(indices, dtype=torch.long), 3)
