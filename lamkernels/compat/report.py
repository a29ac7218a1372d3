"""What a swap reports."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import nn

from lamkernels.compat.in_place import restore


@dataclass(frozen=True)
class SwapEntry:
    """What :func:`swap` did with one module.

    Attributes:
        name: where it is in the model, as in ``named_modules()``; "" is the model itself.
        upstream: its class, with the module it comes from.
        fused: the class of lamkernels it is now, or would be; None where there is none.
        why: the reason it was refused; "" where it was not.
    """

    name: str
    upstream: str
    fused: str | None = None
    why: str = ""


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap` did, as a table when printed.

    Attributes:
        swapped: the modules that are fused now, or would be with ``dry_run``.
        refused: the modules of a known name that stay as they are, and why.
        already: the modules that were fused before.
        unknown: other modules whose class is named as a bottleneck is: nothing is known about them.
        verified: whether both forms were run and compared.
        dry_run: whether nothing was changed.
    """

    swapped: tuple[SwapEntry, ...] = ()
    refused: tuple[SwapEntry, ...] = ()
    already: tuple[SwapEntry, ...] = ()
    unknown: tuple[SwapEntry, ...] = ()
    verified: bool = True
    dry_run: bool = False
    _modules: tuple[weakref.ref[nn.Module], ...] = field(default=(), repr=False, compare=False)

    def unswap(self) -> tuple[str, ...]:
        """Gives the modules of ``swapped`` their classes back, and returns the names of those that were still swapped.

        Raises:
            ValueError: as :func:`unswap`.
        """
        modules = [(entry.name, ref()) for entry, ref in zip(self.swapped, self._modules, strict=not self.dry_run)]
        return restore([(name, module) for name, module in modules if module is not None])

    def __str__(self) -> str:
        how = "verified" if self.verified else "not verified"
        groups = (
            (f"would swap ({how})" if self.dry_run else f"swapped ({how})", self.swapped),
            ("refused", self.refused),
            ("fused already", self.already),
            ("unknown", self.unknown),
        )
        lines = []
        for title, entries in groups:
            if entries:
                lines.append(f"{title}: {len(entries)}")
                lines += [f"  {row}" for row in _rows(entries)]
        if not self.swapped and not self.refused:
            lines.insert(0, "nothing to swap")
        return "\n".join(lines)


def _rows(entries: tuple[SwapEntry, ...]) -> list[str]:
    cells = [(entry.name or "(the model)", entry.upstream) for entry in entries]
    widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
    rows = []
    for entry, (name, upstream) in zip(entries, cells, strict=True):
        result = f"-> {entry.fused}" if entry.fused else entry.why
        rows.append(f"{name:{widths[0]}}  {upstream:{widths[1]}}  {result}".rstrip())
    return rows
