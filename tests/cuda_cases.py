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
from lamkernels.ops.vector_quantize import cuda

HERE = Path(__file__).parent / "cuda_host"
COMPILER = shutil.which("g++")
KERNELS = ("vector_quantize_fwd", "vector_quantize_bwd")


class Host:
    """Launches kernels on CPU tensors, in the order of blocks and threads that ``shuffle`` draws."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: dict[tuple[torch.dtype, torch.dtype], ctypes.CDLL] = {}
        self.random: random.Random | None = None
        self.launches: list[str] = []
        self.counters = torch.zeros(64, dtype=torch.int32)

    def shuffle(self, seed: int | None) -> None:
        """From now on blocks and threads run in an order of this seed; None is their own."""
        self.random = None if seed is None else random.Random(seed)

    def launch(
        self, kernel: str, source: str, dtypes: tuple[torch.dtype, torch.dtype], grid: int, arguments: bytes,
        shared: int, device: torch.device,
    ) -> None:  # fmt: skip
        """Stands in for :func:`lamkernels.ops.cuda_common.launch`."""
        library, number = self._library(dtypes), KERNELS.index(kernel)
        assert len(arguments) == library.argument_bytes(number), f"the arguments of {kernel} are not its struct"
        assert source == cuda.SOURCE and device.type == "cpu" and grid > 0
        blocks, threads = list(range(grid)), list(range(cuda_common.THREADS))
        if self.random:
            self.random.shuffle(blocks)
            self.random.shuffle(threads)
        state = library.run(
            number, arguments, grid, shared, (ctypes.c_int * grid)(*blocks), (ctypes.c_int * len(threads))(*threads)
        )
        assert state == 0, ("", "threads wait for each other for ever", "written past the shared memory")[state]
        assert not self.counters.any(), "a ticket is left behind"
        self.launches.append(kernel)

    def tickets(self, device: torch.device, heads: int) -> int:
        """Stands in for :func:`lamkernels.ops.cuda_common.tickets`."""
        return self.counters.data_ptr()

    def _library(self, dtypes: tuple[torch.dtype, torch.dtype]) -> ctypes.CDLL:
        if dtypes not in self.libraries:
            defines = [f"-D{side}_TYPE={cuda_common.TYPES[t]}" for side, t in zip("XC", dtypes, strict=True)]
            path = self.folder / f"{'_'.join(cuda_common.TYPES[t] for t in dtypes)}.so"
            options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror"]
            assert COMPILER is not None
            subprocess.run(
                [COMPILER, *options, "-Wno-unknown-pragmas", *defines, HERE / "vector_quantize.cpp", "-o", path],
                check=True,
            )
            self.libraries[dtypes] = ctypes.CDLL(str(path))
        return self.libraries[dtypes]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The kernels of csrc/ on CPU tensors, in place of launches on a GPU."""
    if COMPILER is None:
        pytest.skip("csrc/ is compiled for the CPU by g++, which is not installed")
    found = Host(tmp_path_factory.mktemp("cuda_host"))
    with mock.patch.object(cuda, "launch", found.launch), mock.patch.object(cuda, "tickets", found.tickets):
        yield found
