"""Data to label, and the arguments of the command."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from label_cases import CODEBOOK, FACTORY, STARTS, features
from safetensors.torch import save_file


@pytest.fixture
def data(tmp_path):
    """Two sources with episodes, and one without."""
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "a.npz", features=features(0), starts=STARTS)
    save_file({"rows": torch.from_numpy(features(1)), "starts": torch.from_numpy(STARTS)}, folder / "b.safetensors")
    np.save(folder / "c.npy", features(2, 90))
    return folder


@pytest.fixture
def arguments(tmp_path, data, monkeypatch):
    """Of the command, with a factory and a codebook in files."""
    (tmp_path / "labelfactory.py").write_text(FACTORY)
    save_file({"codes": CODEBOOK, "other": CODEBOOK.clone()}, tmp_path / "codebook.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "labelfactory", raising=False)
    codebook = f"{tmp_path / 'codebook.safetensors'}:codes"
    return ["label", str(data), "--encoder", "labelfactory:make", "--codebook", codebook, "--shard-rows", "100"]
