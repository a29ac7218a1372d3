"""The swap in place: what it finds, refuses, keeps and restores."""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import toy_upstream as toy
from torch import nn
from torch.nn.utils import parametrize
from toy_compat import ResidualToyFused, ToyFused, why

import lamkernels as lk
from lamkernels.compat import swap, unswap

# what it does


def test_a_swapped_model_is_the_same_object_with_the_same_parameters_and_does_the_same():
    model = toy.Model(toy.ToyQuantizer())
    plain = copy.deepcopy(model)
    optimizer, plain_optimizer = (torch.optim.Adam(m.parameters(), 0.05) for m in (model, plain))
    bottleneck, before = model.bottleneck, {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}

    report = lk.compat.swap(model)

    assert [(e.name, e.upstream) for e in report.swapped] == [("bottleneck", "toy_upstream.ToyQuantizer")]
    assert report.swapped[0].fused == "toy_compat.ToyFused" and report.verified and not report.refused
    assert model.bottleneck is bottleneck is model.same["again"]
    assert isinstance(bottleneck, ToyFused) and isinstance(bottleneck, toy.ToyQuantizer)
    assert {k: id(v) for k, v in model.state_dict(keep_vars=True).items()} == before
    for step in range(5):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        losses = []
        for each, its in ((model, optimizer), (plain, plain_optimizer)):
            loss = each(x)
            its.zero_grad()
            loss.backward()
            its.step()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert model.bottleneck.usage.sum() == 80


def test_the_root_itself_is_swapped():
    root = toy.ToyQuantizer()
    report = swap(root)
    assert isinstance(root, ToyFused) and report.swapped[0].name == "" and "(the model)" in str(report)


def test_hooks_stay_and_do_not_run_on_the_probe():
    module, calls = toy.ToyQuantizer(), []
    module.register_forward_hook(lambda *_: calls.append("forward"))
    module.register_full_backward_hook(lambda *_: calls.append("backward"))
    module.embedding.register_forward_pre_hook(lambda *_: calls.append("embedding"))
    swap(module)
    assert calls == []
    module(torch.randn(2, 4, requires_grad=True))[2].backward()
    assert calls == ["forward", "backward"]


def test_a_hook_of_a_large_object_is_not_copied():
    class Trainer:
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

        def hook(self, *_):
            pass

    module = toy.ToyQuantizer()
    module.register_forward_hook(Trainer().hook)
    assert swap(module).swapped


def test_swapping_twice_changes_nothing_and_says_so():
    model = toy.Model(toy.ToyQuantizer())
    swap(model)
    kind = type(model.bottleneck)
    report = swap(model)
    assert not report.swapped and not report.refused and type(model.bottleneck) is kind
    assert [e.name for e in report.already] == ["bottleneck"] and "fused already: 1" in str(report)
    assert report.unswap() == () and isinstance(model.bottleneck, ToyFused)


def test_a_dry_run_reports_the_same_and_changes_nothing():
    model = toy.Model(toy.ToyQuantizer())
    dry = swap(model, dry_run=True)
    assert type(model.bottleneck) is toy.ToyQuantizer and "would swap (verified): 1" in str(dry)
    assert dry.swapped == swap(model).swapped
    assert dry.unswap() == () and isinstance(model.bottleneck, ToyFused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    module = toy.ToyQuantizer().to(dtype)
    assert swap(module).swapped and module.embedding.weight.dtype == dtype


def test_frozen_parameters_and_inference_mode():
    module = toy.ToyQuantizer().requires_grad_(False)
    with torch.inference_mode():
        assert swap(module).swapped
    assert not module.embedding.weight.requires_grad


# classes


def test_a_class_that_adds_to_upstream_is_swapped_and_keeps_what_it_adds():
    module = toy.Renamed()
    assert swap(module).swapped and isinstance(module, toy.Renamed)
    assert torch.equal(module.decode(torch.tensor([3]))[0], module.embedding.weight[3])


@pytest.mark.parametrize(("kind", "name"), [(toy.Overriding, "forward"), (toy.OverridingAHelper, "combine")])
@pytest.mark.parametrize("verify", [True, False])
def test_a_class_that_overrides_something_is_refused(kind, name, verify):
    module = kind()
    assert f"{kind.__name__} overrides {name} of ToyQuantizer" in why(swap(module, verify=verify))
    assert type(module) is kind


def test_another_structure_under_a_known_name_is_refused():
    class Other(nn.Module):
        pass

    Other.__name__ = "ToyQuantizer"
    assert "it has no beta" in why(swap(Other()))
    module = toy.ToyQuantizer()
    del module.embedding
    assert "its structure is another ('ToyQuantizer' object has no attribute 'embedding')" in why(swap(module))


def test_a_method_that_would_be_hidden():
    class ToyQuantizer(toy.ToyQuantizer):
        def probe(self):
            return "a linear probe"

    assert "its probe would be hidden" in why(swap(ToyQuantizer()))


def test_slots_are_kept_and_a_class_that_allows_no_subclass_is_refused():
    class ToyQuantizer(toy.ToyQuantizer):
        __slots__ = ("kept",)

    module = ToyQuantizer()
    module.kept = 3
    assert swap(module).swapped and module.kept == 3

    class Final(toy.ToyQuantizer):
        def __init_subclass__(cls) -> None:
            raise TypeError("it is final")

    assert "its class cannot be replaced (it is final)" in why(swap(Final()))


def test_a_residual_module_is_swapped_as_one_or_layer_by_layer():
    model = toy.Model(toy.ResidualToy())
    report = swap(model)
    assert [e.name for e in report.swapped] == ["bottleneck"] and isinstance(model.bottleneck, ResidualToyFused)
    assert type(model.bottleneck.layers[0]) is toy.ToyQuantizer
    assert [e.name for e in swap(model).already] == ["bottleneck"]
    model = toy.Model(toy.ResidualToy(broken=True))
    report = swap(model)
    assert [e.name for e in report.swapped] == ["bottleneck.layers.0", "bottleneck.layers.1"]
    assert [e.name for e in report.refused] == ["bottleneck"] and "output[0] differs" in report.refused[0].why


def test_unknown_bottlenecks_are_listed_once_where_they_are_innermost():
    class VQModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = toy.UnheardOfCodebook()

    model = nn.ModuleDict({"known": toy.ToyQuantizer(), "other": VQModel()})
    report = swap(model)
    assert [e.name for e in report.unknown] == ["other.codes"] and "unknown: 1" in str(report)
    assert str(swap(nn.Linear(2, 2))) == "nothing to swap"


# wrappers


def test_a_forward_on_the_instance_is_refused():
    module = toy.ToyQuantizer()
    module.forward = module.forward
    assert "set on the instance" in why(swap(module))


def test_a_parametrized_module_is_refused_and_a_parametrized_child_is_verified():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = toy.ToyQuantizer()
    parametrize.register_parametrization(module.embedding, "weight", Double())
    assert swap(module).swapped
    module = toy.ToyQuantizer()
    module.gain = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(module, "gain", Double())
    assert "it is parametrized" in why(swap(module))


def test_a_scripted_module_is_refused():
    scripted = torch.jit.script(toy.ToyQuantizer())
    assert "it is scripted" in why(swap(scripted))


def test_a_compiled_model_compiles_again(one_thread):
    torch._dynamo.reset()
    model = toy.Model(toy.ToyQuantizer())
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(5, 6)
    before = compiled(x)
    report = swap(compiled)
    assert [e.name for e in report.swapped] == ["_orig_mod.bottleneck"]
    ToyFused.forward, original = _shifted(ToyFused.forward), ToyFused.forward
    try:
        shifted = compiled(x)
    finally:
        ToyFused.forward = original
    torch.testing.assert_close(shifted, before + 10)
    torch._dynamo.reset()
    unswap(compiled)
    torch.testing.assert_close(compiled(x), before)


def _shifted(forward):
    def shifted(self, z):
        quantized, indices, loss = forward(self, z)
        return quantized, indices, loss + 10

    return shifted


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_in_ddp_is_swapped_in_it(one_process):
    wrapped = nn.parallel.DistributedDataParallel(toy.Model(toy.ToyQuantizer()))
    assert [e.name for e in swap(wrapped).swapped] == ["module.bottleneck"]
    wrapped(torch.randn(5, 6)).backward()
    assert wrapped.module.bottleneck.embedding.weight.grad.abs().sum() > 0


def test_sharded_parameters_are_refused_and_a_swapped_model_is_sharded(one_process):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = toy.Model(toy.ToyQuantizer())
    fully_shard(model, mesh=mesh)
    assert "embedding.weight is a DTensor; swap before sharding" in why(swap(model))
    model = toy.Model(toy.ToyQuantizer())
    expected = model(x := torch.randn(5, 6))
    swap(model)
    fully_shard(model, mesh=mesh)
    torch.testing.assert_close(model(x), expected)
    assert unswap(model) == ("bottleneck",)
    torch.testing.assert_close(model(x), expected)


# undoing, copies and files


def test_unswap_restores_the_classes():
    model = nn.ModuleList([toy.ToyQuantizer(), toy.Renamed(), toy.ResidualToy()])
    assert len(swap(model).swapped) == 3
    assert unswap(model) == ("0", "1", "2")
    assert [type(m) for m in model] == [toy.ToyQuantizer, toy.Renamed, toy.ResidualToy]
    assert unswap(model) == ()


def test_a_report_unswaps_what_it_swapped():
    model = nn.ModuleList([toy.ToyQuantizer(), toy.ToyQuantizer()])
    first = swap(model[0])
    second = swap(model)
    assert second.unswap() == ("1",) and isinstance(model[0], ToyFused)
    assert first.unswap() == ("",) and first.unswap() == ()
    gone = swap(toy.ToyQuantizer())
    assert gone.unswap() == ()


def test_unswap_changes_nothing_where_a_class_was_changed_since():
    model = nn.ModuleList([toy.ToyQuantizer(), toy.ToyQuantizer()])
    swap(model)
    model[1].gain = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(model[1], "gain", nn.Identity())
    with pytest.raises(ValueError, match="1 became a ParametrizedToyQuantizer after the swap; undo that before unswap"):
        unswap(model)
    assert isinstance(model[0], ToyFused)
    assert isinstance(copy.deepcopy(model[1]), ToyFused)


def test_copies_stay_swapped():
    model = toy.Model(toy.ToyQuantizer())
    model.bottleneck.owner = [model]
    swap(model)
    copied = copy.deepcopy(model)
    assert type(copied.bottleneck) is type(model.bottleneck) and copied.bottleneck is copied.same["again"]
    assert copied.bottleneck.owner[0] is copied
    assert copied.bottleneck.embedding.weight is not model.bottleneck.embedding.weight
    shallow = copy.copy(model.bottleneck)
    assert type(shallow) is type(model.bottleneck) and shallow.embedding is model.bottleneck.embedding
    assert unswap(copied) == ("bottleneck",) and isinstance(model.bottleneck, ToyFused)


class CopiesItself(toy.ToyQuantizer):
    def __deepcopy__(self, memo):
        copied = toy.ToyQuantizer(*self.embedding.weight.shape)
        copied.load_state_dict(self.state_dict())
        copied.__class__ = CopiesItself
        return copied


def test_an_upstream_deepcopy_is_followed():
    module = CopiesItself()
    swap(module)
    copied = copy.deepcopy(module)
    assert type(copied) is type(module) and torch.equal(copied.embedding.weight, module.embedding.weight)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_one_of_the_upstream_class(protocol):
    module = toy.ToyQuantizer()
    swap(module)
    loaded = pickle.loads(pickle.dumps(module, protocol))
    assert type(loaded) is toy.ToyQuantizer and loaded.beta == 0.25
    assert torch.equal(loaded.embedding.weight, module.embedding.weight)


def test_a_saved_model_opens_where_lamkernels_is_not_installed(tmp_path):
    model = toy.Model(toy.ToyQuantizer())
    swap(model)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    toy.Model(toy.ToyQuantizer()).load_state_dict(torch.load(tmp_path / "state.pt"), strict=True)
    code = f"""
import sys
sys.modules["lamkernels"] = None
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
print(type(model.bottleneck).__module__, type(model.bottleneck).__name__, model(torch.zeros(2, 6)).isfinite().item())
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(toy.__file__).parent)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["toy_upstream", "ToyQuantizer", "True"]


def test_a_state_dict_is_unchanged():
    model = toy.Model(toy.ToyQuantizer())
    before = list(model.state_dict())
    swap(model)
    assert list(model.state_dict()) == before


# the report and the package


def test_the_report_is_frozen_and_prints_as_a_table():
    model = nn.ModuleDict({"a": toy.ToyQuantizer(), "longer": toy.Renamed(), "bad": toy.fork("Fails")})
    report = swap(model)
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.swapped = ()
    lines = str(report).splitlines()
    assert lines[:3] == [
        "swapped (verified): 2",
        "  a       toy_upstream.ToyQuantizer  -> toy_compat.ToyFused",
        "  longer  toy_upstream.Renamed       -> toy_compat.ToyFused",
    ]
    assert lines[3] == "refused: 1" and lines[4].startswith(
        "  bad  toy_upstream.Forks.Fails.ToyQuantizer  not toy_compat"
    )
    assert "ToyQuantizer (fused)(" in repr(model["a"])


def test_arguments():
    with pytest.raises(TypeError, match=r"model is a list; it must be a torch\.nn\.Module"):
        swap([toy.ToyQuantizer()])
    with pytest.raises(TypeError, match="model is a dict"):
        unswap({})
