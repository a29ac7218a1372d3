from dataclasses import replace

import pytest
import torch

from lamkernels.lam import LAMConfig, LatentActionModel, StockVectorQuantize, TrainConfig, Trainer, compare, metrics
from lamkernels.nn import VectorQuantize

pytest.importorskip("safetensors")
MODEL = LAMConfig(size=32, latent_dim=8, tokens=2, codebook_size=8)
TRAINING = TrainConfig(steps=30, batch_size=16, learning_rate=2e-3)


def trainer(data, bottleneck="vq", training=TRAINING, **options):
    return Trainer(replace(MODEL, bottleneck=bottleneck, **options), data, training)


def advance(trainer, until):
    while trainer.step < until:
        trainer.train_step()
    return trainer


@pytest.mark.parametrize("bottleneck", ["vq", "stock-vq", "gaussian", "none"])
@pytest.mark.parametrize("forward_model", ["unet", "conv"])
def test_every_model_lowers_its_loss(moving_square, bottleneck, forward_model):
    run = advance(trainer(moving_square, bottleneck, TrainConfig(60, 16, 3e-3), forward_model=forward_model), 60)
    curve = run.curve("reconstruction_loss")
    assert curve[-5:].mean() < 0.8 * curve[:2].mean()


@pytest.mark.parametrize("bottleneck", ["vq", "stock-vq", "gaussian"])
def test_one_seed_gives_one_run(moving_square, bottleneck):
    torch.manual_seed(5)
    first = advance(trainer(moving_square, bottleneck), 12)
    torch.manual_seed(6)  # the global generator has no say, and no harm is done to it
    state = torch.get_rng_state()
    second = advance(trainer(moving_square, bottleneck), 12)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.curve(), second.curve())
    other = advance(trainer(moving_square, bottleneck, replace(TRAINING, seed=1)), 12)
    assert not torch.equal(first.curve(), other.curve())


@pytest.mark.parametrize("bottleneck", ["vq", "stock-vq", "gaussian", "none"])
@pytest.mark.parametrize("stop", [0, 9])
def test_a_resumed_run_is_the_uninterrupted_one(moving_square, bottleneck, stop, tmp_path):
    whole = advance(trainer(moving_square, bottleneck), 20)
    advance(trainer(moving_square, bottleneck), stop).save(tmp_path / "checkpoint.safetensors")
    resumed = trainer(moving_square, bottleneck)
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert resumed.step == stop
    advance(resumed, 20)
    assert torch.equal(whole.curve(), resumed.curve())
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_a_checkpoint_that_does_not_fit_is_refused(moving_square, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    trainer(moving_square).save(path)
    with pytest.raises(ValueError, match="train_config"):
        trainer(moving_square, training=replace(TRAINING, seed=7)).load(path)
    with pytest.raises(ValueError, match="model_config"):
        trainer(moving_square, "none").load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        trainer(moving_square).load(path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stock_and_fused_training_coincide(moving_square, dtype):
    kinds = {"stock": "stock-vq", "fused": "vq"}
    runs = {name: trainer(moving_square, kind, replace(TRAINING, dtype=dtype)) for name, kind in kinds.items()}
    assert runs["fused"].model.bottleneck.codebook.dtype == getattr(torch, dtype)
    states = [run.model.state_dict() for run in runs.values()]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with compare.reproducible():
        times = compare.train_in_turn(runs, progress=False)
    assert all(len(t) == TRAINING.steps for t in times.values())
    agreement = compare.curve_agreement(*(run.curve() for run in runs.values()))
    assert agreement["coincide"], agreement


@pytest.mark.parametrize("init", ["uniform", "kmeans"])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_stock_is_the_fused_module_in_plain_torch(init, threshold):
    options = {"init": init, "dead_code_threshold": threshold, "decay": 0.9, "commitment_weight": 0.25}
    modules = []
    for kind in (StockVectorQuantize, VectorQuantize):
        torch.manual_seed(0)
        modules.append(kind(8, 6, **options))
    stock, fused = modules
    assert stock.state_dict().keys() == fused.state_dict().keys()
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        x = torch.randn(16, 3, 8, generator=generator)
        agreement = compare.bottleneck_agreement(stock, fused, x)
        assert agreement.pop("index_agreement") == 1.0
        assert max(agreement.values()) < 1e-5, agreement
        for module in modules:
            torch.manual_seed(step)
            module(x)
        torch.testing.assert_close(stock.state_dict(), fused.state_dict(), rtol=1e-5, atol=1e-6)


def test_codes_recover_the_actions_of_a_moving_square(moving_square):
    run = advance(trainer(moving_square, training=TrainConfig(steps=200)), 200)
    pairs = moving_square.pairs
    with torch.no_grad():
        _, codes = run.model.eval().encode(moving_square.frames[pairs], moving_square.frames[pairs + 1])
    features, actions = metrics.one_hot_codes(codes, MODEL.codebook_size), moving_square.actions[pairs]
    result = metrics.linear_probe(features[:150], actions[:150], features[150:], actions[150:])
    assert result.accuracy > 0.9 > 0.6 > result.majority_accuracy


def test_prediction_under_the_encoded_latent_is_the_forward(moving_square):
    model = LatentActionModel(MODEL)
    frame, next_frame = moving_square.frames[:4], moving_square.frames[1:5]
    torch.nn.init.normal_(model.forward_model.last[0].weight)
    model.eval()
    output = model(frame, next_frame)
    latent, indices = model.encode(frame, next_frame)
    assert torch.equal(indices, output.indices) and output.latent.shape == (4, 2, 8)
    torch.testing.assert_close(model.predict(frame, latent), output.prediction)
    torch.testing.assert_close(model(frame.float() / 255, next_frame.float() / 255).loss, output.loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 20}, "size is 20"),
        ({"bottleneck": "vae"}, "bottleneck is 'vae'"),
        ({"forward_model": "transformer"}, "forward_model is 'transformer'"),
        ({"tokens": 0}, "tokens is 0"),
        ({"motion_weight": -1.0}, "motion_weight is -1.0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LAMConfig(**options)


def test_wrong_inputs_are_named(moving_square):
    with pytest.raises(ValueError, match=r"frame has shape \(2, 3, 16, 16\)"):
        LatentActionModel(MODEL)(torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="a batch takes 4096"):
        trainer(moving_square, training=TrainConfig(batch_size=4096))
    with pytest.raises(ValueError, match="steps is 0"):
        TrainConfig(steps=0)
    with pytest.raises(ValueError, match="learning_rate"):
        TrainConfig(learning_rate=0.0)
