"""csrc/ on the CPU: its very source, compiled by g++ with the header of cuda_host/, behind the launcher's function."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from lamkernels.ops import cuda_common
from lamkernels.ops.covariance import cuda as covariance
from lamkernels.ops.nearest_code import cuda_hopper
from lamkernels.ops.vector_quantize import cuda

HERE = Path(__file__).parent / "cuda_host"
COMPILER = shutil.which("g++")
ERRORS = (
    "",
    "threads wait for each other for ever",
    "written past the shared memory",
    "what a GPU forbids",
    "no such kernel, or not its arguments",
)


class Host:
    """Launches kernels on CPU tensors, in the order of blocks and threads that ``shuffle`` draws."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: dict[tuple[str, ...], ctypes.CDLL] = {}
        self.random: random.Random | None = None
        self.eager = False
        self.launches: list[str] = []
        self.counters = torch.zeros(64, dtype=torch.int32)

    def shuffle(self, seed: int | None) -> None:
        """From now on blocks and threads run in an order of this seed, None is their own; an odd one copies at once."""
        self.random = None if seed is None else random.Random(seed)
        self.eager = seed is not None and seed % 2 == 1

    def launch(
        self, kernel: str, source: str, defines: tuple[str, ...], grid: int, arguments: bytes, shared: int,
        device: torch.device, threads: int = cuda_common.THREADS,
    ) -> None:  # fmt: skip
        """Stands in for :func:`lamkernels.ops.cuda_common.launch`."""
        assert device.type == "cpu" and grid > 0
        library = self._library(source, defines)
        orders = list(range(grid)), list(range(threads))
        if self.random:
            for order in orders:
                self.random.shuffle(order)
        blocks, lanes = ((ctypes.c_int * len(order))(*order) for order in orders)
        state = library.run(
            kernel.encode(), arguments, len(arguments), grid, threads, shared, blocks, lanes, self.eager
        )
        assert state == 0, f"{kernel}: {ERRORS[state]}"
        assert not self.counters.any(), "a ticket is left behind"
        self.launches.append(kernel)

    def tickets(self, device: torch.device, heads: int) -> int:
        """Stands in for :func:`lamkernels.ops.cuda_common.tickets`."""
        return self.counters.data_ptr()

    def _library(self, source: str, defines: tuple[str, ...]) -> ctypes.CDLL:
        key = source, *defines
        if key not in self.libraries:
            path = self.folder / f"{len(self.libraries)}.so"
            options = [
                "-std=c++17",
                "-O1",
                "-ffp-contract=off",
                "-fPIC",
                "-shared",
                "-fno-gnu-unique",
                "-Wall",
                "-Werror",
            ]
            assert COMPILER is not None
            subprocess.run(
                [
                    COMPILER,
                    *options,
                    "-Wno-unknown-pragmas",
                    *defines,
                    HERE / Path(source).with_suffix(".cpp"),
                    "-o",
                    path,
                ],
                check=True,
            )
            self.libraries[key] = ctypes.CDLL(str(path))
        return self.libraries[key]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The kernels of csrc/ on CPU tensors, in place of launches on a GPU."""
    if COMPILER is None:
        pytest.skip("csrc/ is compiled for the CPU by g++, which is not installed")
    found = Host(tmp_path_factory.mktemp("cuda_host"))
    with (
        mock.patch.object(cuda, "launch", found.launch),
        mock.patch.object(cuda, "tickets", found.tickets),
        mock.patch.object(cuda_hopper, "launch", found.launch),
        mock.patch.object(covariance, "launch", found.launch),
    ):
        yield found
