"""What the tests of the drop-in forms share: two modules side by side, training runs, traces of operators."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


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


class _Trace(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@contextmanager
def no_host_sync() -> Iterator[_Trace]:
    """Fails where an operator ran whose result the host has to wait for on a GPU; yields the trace."""
    trace = _Trace()
    with trace:
        yield trace
    assert trace.names
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero"}
    assert not waiting & set(trace.names), sorted(waiting & set(trace.names))
