"""Training on several processes is training on one, but for rounding; autocast and compilation keep the statistics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import distributed, multiprocessing
from train_process_cases import KINDS, MODEL, TRAINING, trained, work

from lamkernels.lam import TrainConfig, Trainer
from lamkernels.processes import Processes

pytest.importorskip("safetensors")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork and spawn, not ours
def test_two_processes_train_what_one_does(moving_square, tmp_path):
    torch.save(moving_square, tmp_path / "data.pt")
    multiprocessing.spawn(work, (2, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for kind in KINDS:
        losses, state = trained(moving_square, kind)
        for rank in ranks:
            torch.testing.assert_close(rank[kind][0], losses, rtol=1e-7, atol=1e-9)
            for name, value in state.items():
                torch.testing.assert_close(rank[kind][1][name], value, rtol=1e-6, atol=1e-8, msg=f"{kind} {name}")
        for name, value in ranks[0][kind][1].items():
            assert torch.equal(value, ranks[1][kind][1][name]), (kind, name)


def test_processes_that_cannot_share_a_batch_are_named(moving_square, monkeypatch):
    monkeypatch.setattr(Processes, "size", 5)
    with pytest.raises(ValueError, match="batch_size is 24; 5 processes must share it evenly"):
        Trainer(MODEL, moving_square, TRAINING)
    assert not distributed.is_initialized()


def test_autocast_is_for_the_layers_and_not_for_the_codebook(moving_square):
    training = replace(TRAINING, dtype="float32", steps=15)
    plain, mixed = (Trainer(MODEL, moving_square, replace(training, amp=amp)) for amp in (False, True))
    seen = []
    mixed.model.inverse_dynamics.head.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    for trainer in (plain, mixed):
        trainer.run(progress=False)
    assert set(seen) == {torch.bfloat16}
    for name, value in mixed.model.state_dict().items():
        assert value.dtype == plain.model.state_dict()[name].dtype, name
    curves = [trainer.curve("reconstruction_loss") for trainer in (plain, mixed)]
    assert curves[1].dtype == torch.float32
    torch.testing.assert_close(curves[1][:3], curves[0][:3], rtol=0.02, atol=0.02)
    assert curves[1][-5:].mean() < 0.9 * curves[1][:2].mean()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own question
def test_a_compiled_training_is_the_eager_one(moving_square, monkeypatch):
    compiled, compile_ = [], torch.nn.Module.compile

    def traced(module):  # without the minute of a C++ compiler
        compiled.append(type(module).__name__)
        compile_(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    runs = [Trainer(MODEL, moving_square, replace(TRAINING, steps=6, compile=flag)) for flag in (False, True)]
    for run in runs:
        run.run(progress=False)
    assert compiled == ["InverseDynamics", "ForwardModel"]
    torch.testing.assert_close(runs[1].curve(), runs[0].curve(), rtol=1e-7, atol=0)
    assert runs[1].model.state_dict().keys() == runs[0].model.state_dict().keys()


def test_autocast_of_float64_is_refused():
    with pytest.raises(ValueError, match="amp is for dtype 'float32', and it is 'float64'"):
        TrainConfig(dtype="float64", amp=True)
