"""Drop-in forms of the bottlenecks of other projects, one module per project, and the swap that puts them in place."""

from lamkernels.compat.base import Compat
from lamkernels.compat.report import SwapEntry, SwapReport
from lamkernels.compat.swap import swap, unswap

__all__ = ["Compat", "SwapEntry", "SwapReport", "swap", "unswap"]
