"""The profile of a training step: its model is one step, its parts are parts of it, and it says what it reduced."""

import json

import pytest
import torch
from lamkernels.bench import cli, profile_step
from lamkernels.bench.peaks import Peaks
from lamkernels.bench.step_models import SIZES, Sizes, cut, loss_of, make_model

SMALL = {
    "lapa": Sizes(batch=2, image=32, patch=4, dim=32, heads=2, depth=1, frozen=0),
    "univla": Sizes(batch=2, image=28, patch=14, dim=32, heads=2, depth=1, frozen=1),
}


@pytest.fixture(autouse=True)
def known_peaks(monkeypatch):
    monkeypatch.setattr(profile_step, "measure_peaks", lambda device, dtype: Peaks(1e10, 1e11))


def test_patches_are_the_pixels_of_a_square():
    frames = torch.rand(2, 2, 3, 6, 8)
    patches = cut(frames, 2)
    assert patches.shape == (2, 2, 12, 12)
    assert torch.equal(patches[1, 0, 5].view(3, 2, 2), frames[1, 0, :, 2:4, 2:4])


@pytest.mark.parametrize("project", SIZES)
def test_every_bottleneck_gives_the_same_step(project):
    """Stock and fused: the loss, and the gradient of each parameter, which all have one but for frozen ones."""
    frames, found = torch.rand(2, 2, 3, SMALL[project].image, SMALL[project].image), []
    for bottleneck in ("stock", "fused"):
        model = make_model(project, SMALL[project], bottleneck, "cpu")
        torch.manual_seed(1)
        loss = loss_of(model, frames)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(grad is not None for grad in grads.values()) and len(grads) > 20
        found.append((loss.detach(), grads))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("project", SIZES)
def test_the_parts_are_those_of_the_step(project):
    kept = []
    found = profile_step.profile(
        project, "cpu", 0.0, SMALL[project], lambda so_far: kept.append((len(so_far.steps), len(so_far.parts)))
    )
    assert kept[0] == (1, 0) and kept[-1] == (len(found.steps), len(found.parts))  # nothing is lost when it is cut off
    assert [step.bottleneck for step in found.steps if step.form == "eager"][:2] == ["stock", "fused"]
    assert all(step.ms > 0 and step.operators > 200 and step.launches is None for step in found.steps)
    names = [part.name for part in found.parts]
    for word in ("temporal attention, T = 2", "spatial attention", "bottleneck", "decoder: ", "optimiser"):
        assert any(word in name for name in names), word
    assert names[-1] == "the rest" and sum(part.share for part in found.parts) == pytest.approx(1.0)
    headroom = [part.headroom_ms for part in found.parts[:-1]]
    assert headroom == sorted(headroom, reverse=True)
    # the products of a layer, forward and twice that backward: four square matrices over the tokens, and the scores
    sizes, part = SMALL[project], next(p for p in found.parts if "temporal attention" in p.name)
    tokens = 2 * sizes.batch * (sizes.side**2 + (4 if project == "univla" else 0))
    assert part.gflop * 1e9 == pytest.approx(3 * tokens * (8 * sizes.dim**2 + 8 * sizes.dim), rel=0.2)
    assert found.reduced["dim"] == 32 and "reduced: batch 2" in profile_step.table(found)


def test_what_a_form_does_not_take_is_a_row():
    harness = profile_step.Harness("univla", SMALL["univla"], "fused", "cpu")
    harness.frames = harness.frames[:, :, :2]
    step = profile_step._attempt(profile_step.Step("fused", "compiled"), harness, 0.0)
    assert step.ms is None and step.note.startswith("RuntimeError")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_the_compiled_step_is_the_eager_one(monkeypatch):
    compiled = torch.nn.Module.compile
    # the whole of what Dynamo and autograd make of it, without the minutes of a C++ compiler
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, backend="aot_eager", **how))
    losses = []
    for wrap in (lambda harness: None, profile_step.Harness.compile):
        harness = profile_step.Harness("lapa", SMALL["lapa"], "fused", "cpu")
        wrap(harness)
        torch.manual_seed(1)
        frames = torch.rand_like(harness.frames)
        losses.append(torch.stack([harness.step(frames) for _ in range(2)]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    found = profile_step.Profile("univla", SMALL["univla"], {}, "fp32", [], [])
    steps = profile_step.with_compiled(found, "cpu", 0.0).steps
    assert [step[:2] for step in steps] == [("stock", "compiled"), ("fused", "compiled")]
    assert not any(step.note for step in steps)
    assert all(step.ms is not None and step.ms > 0 for step in steps)


def test_the_command_writes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SIZES, "univla", SMALL["univla"])
    monkeypatch.setitem(profile_step.ON_CPU, "univla", {})
    path = tmp_path / "bench.json"
    command = ["--profile", "univla", "--device", "cpu", "--quick", "--seconds", "0.01", "--json", str(path)]
    assert cli.main(command) == 0
    assert "frozen image encoder" in capsys.readouterr().out
    found = json.loads(path.read_text())["profile"]
    assert found["sizes"]["dim"] == 32 and found["reduced"] == {} and found["parts"][-1]["name"] == "the rest"
