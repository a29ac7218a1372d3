"""Which tile a kernel runs with: a static table by target, shape bucket and dtype; nothing is tuned at run time.

The partition decides the bits of sums, so a configuration may depend on shapes, dtypes and the device, never on timing
or on values. The rules come from compiled register and shared-memory use; they are not yet measured on a GPU. A row of
``MEASURED`` comes before them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import NamedTuple

import torch

# Entries of one tile that holds the whole codebook, and of the sums that go with it. Where products run on mma.sync
# the operands are replicated across warps, and larger tiles spill registers.
RESIDENT_ENTRIES = {"sm_90": 8192, "gfx942": 8192, "interpreter": 8192}
RESIDENT_ENTRIES_ELSEWHERE = 2048
# Rows whose length is not a multiple of this are loaded entry by entry, with an address in registers for each.
ALIGNED = 16
REGISTERS = 255
OF_TWO_PROGRAMS = 128  # registers of a thread, where two programs of eight warps share a multiprocessor
OF_THREE_SMALL, OF_FOUR_SMALL = 168, 128  # where three or four programs of four warps do
PROGRAMS = 4  # persistent programs on a multiprocessor
SMALL_BATCH = 4096  # rows below which more, smaller programs fill the device better


class Tile(NamedTuple):
    """One kernel configuration: rows, codes and entries of a tile, and how Triton compiles it."""

    rows: int
    codes: int
    dim: int
    warps: int
    stages: int
    registers: int = 0  # the most that a thread may use; 0 leaves it to the compiler

    def options(self) -> dict[str, int | bool]:
        """The compiler options of a launch. FP fusion is explicit: its default differs between Triton releases."""
        options: dict[str, int | bool] = {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }
        return {**options, "maxnreg": self.registers} if self.registers else options


# By (rule, target, *bucket of the shape): what `lamkernels bench --tune` proposed on a device, once it is reviewed.
# None is measured yet.
MEASURED: dict[tuple[Hashable, ...], Tile] = {}

ROWS_PER_SUM = 4096  # rows whose residuals a program adds in fp32 before the parts are merged in fp64

PLAIN = Tile(0, 0, 0, 4, 1)  # compiler options of the small kernels with tiles of their own


@functools.cache
def target_of(device: torch.device) -> str:
    """The device as "sm_90", "gfx942" and the like, or "interpreter" for CPU tensors."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def power(value: int, low: int = 16) -> int:
    """The power of two at or above the value, at least 16: the smallest side of a matrix product."""
    return max(low, 1 << (value - 1).bit_length())


def ceil_div(value: int, size: int) -> int:
    """How many blocks of a size hold so many; triton.cdiv takes twenty times as long."""
    return -(-value // size)


def resident(target: str, num_rows: int, num_codes: int, dim: int, apart: bool = False) -> Tile | None:
    """The tile of the kernels that keep the whole codebook in one tile; None where it does not fit.

    ``apart``: whether the entries of a row lie apart, each with its own address in registers.
    """
    codes, entries = power(num_codes), power(dim)
    if codes * entries > RESIDENT_ENTRIES.get(target, RESIDENT_ENTRIES_ELSEWHERE) or entries > 128:
        return None
    if target == "interpreter":
        return Tile(32, codes, entries, 4, 1)
    if dim % ALIGNED and max(codes, entries) > 64:
        return None
    row = MEASURED.get(("resident", target, codes, entries, num_rows <= SMALL_BATCH, dim % ALIGNED == 0))
    if row is not None and not apart:
        return row
    size = codes * entries
    if apart and size > 1024 and not target.startswith("gfx"):
        return Tile(16, codes, entries, 8, 1, registers(target)) if size <= 4096 else None
    narrow = size <= 2048 and (entries < 128 or target in RESIDENT_ENTRIES)
    warps = 4 if narrow or target.startswith("gfx") else 8  # a wave of gfx has 64 lanes
    # the sums, the one-hot factor and the rows are held at once: more rows than this spill registers
    if size > 4096 or max(codes, entries) > 64:
        return Tile(16, codes, entries, warps, 1, registers(target))
    if size >= (512 if target == "sm_120" else 1024) or num_rows <= SMALL_BATCH or dim % ALIGNED:
        return Tile(32, codes, entries, warps, 1, registers(target))
    return Tile(64, codes, entries, warps, 1, registers(target))


def lookup(target: str, num_rows: int, num_codes: int, dim: int, native: bool, apart: bool) -> Tile | None:
    """The tile of a lookup in a resident codebook; it holds no sums, so products of halves take whole warpgroups.

    On sm_90 small tiles hide the wait for memory: two to four programs share a multiprocessor, each with the next tiles
    of rows on their way; not where the entries of a row lie apart.
    """
    tile = resident(target, num_rows, num_codes, dim, apart)
    if apart and tile is not None and tile.dim > 64:
        return None  # distances with a cosine would spill
    plain = not native or num_rows <= SMALL_BATCH or dim % ALIGNED != 0 or apart
    if tile is None or target != "sm_90" or plain or tile.codes > 256:
        return tile
    size = tile.codes * tile.dim
    rows, stages = (128 if size <= 512 else 64), (4 if size == 256 else 3)
    if tile.codes == 256 or size > 4096:
        warps, most = 8, REGISTERS if tile.codes == 256 else OF_TWO_PROGRAMS
    elif tile.codes == 128:
        warps, most = 4, REGISTERS
    else:
        warps, most = 4, OF_THREE_SMALL if tile.dim == 128 or size == 4096 else OF_FOUR_SMALL
    given = Tile(rows, tile.codes, tile.dim, warps, stages, most)
    return MEASURED.get(("lookup", target, tile.codes, tile.dim), given)


def loads_ahead(target: str) -> bool:
    """Whether the one pass has registers for the next tile of rows, and for the halves of an fp32 product."""
    return target in ("sm_90", "interpreter")


def programs(tile: Tile) -> int:
    """How many persistent programs of a lookup share a multiprocessor; those that load ahead never wait for a place."""
    if tile.stages == 1 or not tile.registers:
        return PROGRAMS
    return max(1, min(PROGRAMS, 65536 // (32 * tile.warps * tile.registers)))


def streamed(target: str, num_codes: int, dim: int, dtype: torch.dtype, apart: bool = False) -> Tile:
    """The tile of the lookup that streams tiles of codes past a tile of rows; ``apart`` as in :func:`resident`."""
    half = dtype in (torch.float16, torch.bfloat16)
    if target == "interpreter":
        return Tile(32, 64, 32, 4, 1)
    scattered = apart or dim % ALIGNED != 0
    row = MEASURED.get(("streamed", target, power(num_codes), power(dim), dtype, scattered))
    if row is not None:
        return row
    if target.startswith("gfx"):
        return Tile(128, 64, 64, 4, 1) if half else Tile(64, 64, 32, 4, 1)
    if scattered and (half or target != "sm_90"):
        return Tile(64, 64, 64, 8, 2, REGISTERS) if half else Tile(32, 64, 32, 8, 2, REGISTERS)
    if half and target == "sm_90" and not scattered and power(dim) <= 256:
        # whole rows: they stay in shared memory, and only codes are streamed. Up to 128 entries two programs fit a
        # multiprocessor, so that the minimum of one is found while the other multiplies.
        entries = power(dim)
        return Tile(128, 128, entries, 8, 2, OF_TWO_PROGRAMS if entries <= 128 else REGISTERS)
    rows = 64 if target in ("sm_90", "sm_100", "sm_120") else 32  # 64 spill a register or two
    return Tile(128, 128, 64, 8, 3, REGISTERS) if half else Tile(rows, 64, 32, 4, 2, REGISTERS)


def exact(target: str) -> Tile:
    """The tile of the fp64 scan."""
    return Tile(32, 64 if target == "interpreter" else 32, 1, 4, 1, registers(target))


def segments(target: str, dim: int, dtype: torch.dtype) -> Tile:
    """The tile of the sums over rows sorted by code: ``codes`` equals ``rows``, one slot per row at most."""
    if target == "interpreter":
        return Tile(32, 32, 32, 4, 1)
    if dtype == torch.float64:
        return Tile(16, 16, 16, 4, 1, registers(target))
    row = MEASURED.get(("segments", target, power(dim), dtype, dim % ALIGNED == 0))
    if row is not None:
        return row
    wide = dim % ALIGNED == 0 and target in RESIDENT_ENTRIES
    return Tile(64, 64, min(power(dim), 64 if wide else 32), 4, 1, registers(target))


def by_row(target: str, dim: int) -> Tile:
    """The tile of a pass with fp64 sums over each row: half the entries of :func:`elementwise`."""
    entries = min(power(dim, 1), 256)
    return Tile(32 if target == "interpreter" else 1024 // entries, 1, entries, 4, 1, registers(target))


def elementwise(target: str, dim: int) -> Tile:
    """The tile of passes without a product: quantised rows, the keys of rows, the backward."""
    entries = min(power(dim, 1), 256)
    return Tile(32 if target == "interpreter" else 2048 // entries, 1, entries, 4, 1, registers(target))


def scalars(target: str, dim: int) -> Tile:
    """The tile of the quantisers that treat every entry on its own: a row has at most 62 entries."""
    entries = power(dim, 1)
    return Tile(32 if target == "interpreter" else 1024 // entries, 1, entries, 4, 1, registers(target))


def registers(target: str) -> int:
    """On NVIDIA all of them: left alone, the assembler spills a few for occupancy."""
    return REGISTERS if target.startswith("sm") else 0


def products(target: str, dim: int, other: int, wide: bool) -> Tile:
    """The tile of the products of rows: ``dim`` columns of either factor, ``rows`` at a time; ``wide`` is fp64."""
    columns = min(power(max(dim, other)), 64)
    if target == "interpreter":
        return Tile(32, 1, min(columns, 32), 4, 1)
    row = MEASURED.get(("products", target, power(max(dim, other)), wide))
    if row is not None:
        return row
    if wide:
        small = target.startswith("gfx")
        return Tile(16, 1, 16 if small else min(columns, 32), 4, 1, registers(target))
    scattered = dim % ALIGNED != 0 or other % ALIGNED != 0
    few = columns < 64 or target == "gfx942" or (target == "sm_90" and not scattered)
    warps = 4 if few else 8  # both factors' halves are held: 4 warps would spill
    rows = 32 if target in ("sm_100", "gfx942") or (few and not scattered) else 16
    stages = 1 if target == "gfx942" or (target == "sm_120" and scattered) else 3 if target == "sm_90" else 2
    return Tile(rows, 1, columns, warps, stages, registers(target))


MOST_WAVES = 8


@functools.cache
def splits(tiles: int, most: int, places: int) -> int:
    """Into how many ranges the rows of each of ``tiles`` go, ``most`` at most.

    As few as leave the last wave of programs nearly full, where ``places`` run at a time.
    """
    most = max(1, min(most, MOST_WAVES * places // tiles))
    return max(range(1, most + 1), key=lambda count: (_filled(tiles * count, places), -count))


def _filled(programs: int, places: int) -> float:
    """The share of the places that programs keep busy, in steps of 2 %."""
    return math.floor(50 * programs / (-(-programs // places) * places))
