"""What the tests of the drop-in forms share: two modules side by side, training runs, traces of operators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# what a GPU would be waited for: a number, or a size, that the host has to know
SYNCS = {
    "_local_scalar_dense", "nonzero", "unique_dim", "_unique2", "masked_select", "item", "equal", "is_nonzero"
}  # fmt: skip


def twins(stock: Callable[..., Any], ours: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Any]:
    """Both forms, made with one seed."""
    torch.manual_seed(7)
    first = stock(*args, **options)
    torch.manual_seed(7)
    return first, ours(*args, **options)


def both(modules: tuple[Any, Any], call: Callable[[Any], Any], seed: int = 11) -> list[Any]:
    """``call`` of each module, from one seed; after it both have drawn as much."""
    results, following = [], []
    for module in modules:
        torch.manual_seed(seed)
        results.append(call(module))
        following.append(torch.rand(()))
    assert torch.equal(*following), "one form draws more random numbers than the other"
    return results


def copied(output: Any) -> Any:
    """Tensors detached, numpy arrays copied: what a later step does not change."""
    return torch.as_tensor(output).detach().clone()


def swapped(stock: nn.Module, ours: type[nn.Module]) -> Any:
    """A copy of an existing module that has got our class, whose constructor never ran."""
    module = copy.deepcopy(stock)
    module.__class__ = type(ours.__name__, (ours, type(stock)), {})
    return module


def gradients(module: nn.Module, x: Tensor, total: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Of a scalar made of the module's results: by x, then by each parameter in order."""
    leaf = x.detach().clone().requires_grad_()
    return list(torch.autograd.grad(total(module, leaf), [leaf, *module.parameters()]))


def training_run(
    module: nn.Module,
    encoder: nn.Module,
    batches: list[Tensor],
    step: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]],
    optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
    """An autoencoder of copies of both and a linear decoder: the indices and losses of every step, the end state.

    ``step`` maps module and rows to the quantised rows, the indices and the loss of the bottleneck.
    """
    module, encoder = copy.deepcopy((module, encoder))
    decoder = nn.Linear(encoder.out_features, encoder.in_features).to(batches[0].dtype)
    nn.init.eye_(decoder.weight), nn.init.zeros_(decoder.bias)
    parameters = [*encoder.parameters(), *decoder.parameters(), *module.parameters()]
    optimizer = optimiser(parameters)
    indices, losses = [], []
    for batch in batches:
        quantized, chosen, loss = step(module, encoder(batch))
        total = loss + (decoder(quantized) - batch).square().mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        indices.append(chosen), losses.append(total.detach())
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | dict(module.state_dict())
    return indices, torch.stack(losses), state


class Trace(TorchDispatchMode):
    """The operators that ran, those of them that would make the host wait, and the entries of their largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waiting: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names.append(name)
        lists = [arg for arg in args if isinstance(arg, (list, tuple))]
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for indices in lists for i in indices)
        if name in SYNCS or ("index" in name and by_mask):
            self.waiting.append(name)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@contextmanager
def no_host_sync() -> Iterator[Trace]:
    """Fails where an operator ran whose result the host has to wait for on a GPU; yields the trace."""
    with Trace() as trace:
        yield trace
    assert trace.names and not trace.waiting
