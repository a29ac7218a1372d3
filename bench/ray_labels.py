"""Runs the Ray Data recipe of docs/labelling.md on a local cluster, and compares its labels with those of ``label``.

pip install 'ray[data]' 'lamkernels[label]'; python bench/ray_labels.py RESULT.json
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from safetensors.torch import load_file, save_file

import lamkernels as lk

DOCUMENT = Path(__file__).parents[1] / "docs" / "labelling.md"


def python_of(document: str, part: str) -> str:
    """The one block of Python that holds ``part``."""
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", document, re.DOTALL) if part in block)
    return str(block)


def labels(folder: str) -> list[tuple[str, int, int, int, tuple[int, ...]]]:
    """Source, episode, t, row and indices of every pair, sorted."""
    found = []
    for file in Path(folder).glob("*.parquet"):
        table = pq.read_table(file)
        source, episode, t, row, indices = (
            table[name].to_pylist() for name in ("source", "episode", "t", "row", "indices")
        )
        codes = [tuple(np.ravel(entry).tolist()) for entry in indices]
        found += list(zip(source, episode, t, row, codes, strict=True))
    return sorted(found)


def main() -> int:
    """Returns 1 where the labels differ."""
    document = DOCUMENT.read_text(encoding="utf-8")
    result = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("my_lam.py").write_text(python_of(document, "class Encoder"), encoding="utf-8")
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # of the cluster's processes too
        rng = np.random.default_rng(0)
        Path("data").mkdir()
        for index, count in enumerate((3000, 3500, 4000, 4500)):
            features = rng.standard_normal((count, 64)).astype(np.float32)
            np.savez(f"data/{index}.npz", features=features, starts=np.arange(count) % 190 == 0)
        torch.manual_seed(0)
        save_file({"weight": torch.randn(128, 128) / 11, "codebook": torch.randn(16, 32)}, "lam.safetensors")
        ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False)
        exec(compile(python_of(document, "class Label:"), "labelling.md", "exec"), {"__name__": "__main__"})
        ray.shutdown()
        from my_lam import Encoder

        lk.label("data", Encoder().eval(), load_file("lam.safetensors")["codebook"], "labels")
        theirs, ours = labels("ray-labels"), labels("labels")
        os.chdir("/")
    found = {
        "ray": ray.__version__,
        "torch": torch.__version__,
        "pairs": len(ours),
        "pairs_by_ray": len(theirs),
        "unequal": len(set(ours) ^ set(theirs)),
        "codes_in_use": len({code for *_, codes in ours for code in codes}),
        "command": "python bench/ray_labels.py RESULT.json",
    }
    print(json.dumps(found, indent=1))
    if result is not None:
        result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(ours != theirs)


if __name__ == "__main__":
    sys.exit(main())
