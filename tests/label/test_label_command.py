"""Messages, the command, and the document."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from label_cases import CODEBOOK, STARTS, D, K, encoder, expected, features, labels_of, parquet, read
from safetensors.torch import save_file
from torch import nn

import lamkernels as lk
from lamkernels.cli import main
from lamkernels.labelling import Labeller, Labels


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"encoder": 3}, TypeError, "encoder is a int; it must be callable"),
        ({"encoder": nn.Linear(3, 3)}, ValueError, r"encoder is in training mode.*\.eval\(\)"),
        ({"encoder": nn.Linear(3, 3).forward}, ValueError, "encoder is in training mode"),
        ({"encoder": lambda o, n: o.long()}, TypeError, "what the encoder returns is torch.int64"),
        ({"encoder": lambda o, n: o.sum()}, ValueError, "what the encoder returns is a scalar"),
        (
            {"encoder": lambda o, n: o[:5, :3]},
            ValueError,
            r"returns shape \(5, 3\) for 256 pairs; it must be \(256, ...",
        ),
        (
            {"encoder": lambda o, n: o},
            ValueError,
            r"returns shape \(256, 6\); for this codebook it must be \(256, ..., 3",
        ),
        ({"codebook": torch.zeros(4, K, D)}, ValueError, r"for this codebook it must be \(256, 4, ..., 3\)"),
        ({"codebook": "a.safetensors"}, TypeError, "codebook is 'a.safetensors'; it must be a tensor"),
        ({"codebook": []}, TypeError, "it must be a tensor"),
        ({"codebook": torch.zeros(3)}, ValueError, r"codebook has shape \(3,\); it must be \(K, D\)"),
        ({"codebook": torch.zeros(3, 3).int()}, TypeError, "codebook is torch.int32"),
        ({"codebook": [CODEBOOK, CODEBOOK[:, :2]]}, ValueError, r"codebook\[1\] has shape \(7, 2\)"),
        ({"codebook": lk.VectorQuantize(D, K)}, ValueError, "codebook is in training mode"),
        ({"codebook": nn.Linear(3, 3).eval()}, TypeError, "does not return"),
        ({"codebook": lk.LFQ(D).eval(), "metric": "dot"}, ValueError, "metric is 'dot'.*both must be None"),
        ({"metric": "l1"}, ValueError, "metric is 'l1'; it must be one of 'l2'"),
        ({"precision": "half"}, ValueError, "precision is 'half'"),
        ({"format": "csv"}, ValueError, "format is 'csv'; it must be one of 'parquet', 'safetensors'"),
        ({"lag": 0}, ValueError, "lag is 0; it must be at least 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size is 2.0; it must be an int"),
        ({"shard_rows": -1}, ValueError, "shard_rows is -1"),
        ({"shape": (3, 0)}, ValueError, "an entry of shape is 0"),
        ({"shape": (2, 2)}, ValueError, r"shape is \(2, 2\), and the rows of .* have 6 entries"),
        (
            {"device": "meta", "encoder": nn.Linear(3, 3).eval()},
            ValueError,
            "encoder is on cpu; it must be on device meta",
        ),
        ({"rows": "pixels"}, ValueError, "no rows could be read; .*but not pixels for the rows"),
        ({"sources": "nowhere.npy"}, FileNotFoundError, "there is no file or folder nowhere.npy"),
    ],
)
def test_messages(tmp_path, data, changed, error, message):
    given = {"sources": data / "b.safetensors", "encoder": encoder, "codebook": CODEBOOK, "out": tmp_path / "out"}
    with pytest.raises(error, match=message):
        lk.label(**given | changed)
    assert not labels_of(tmp_path / "out")


# the command


def test_the_command(tmp_path, arguments, data, capsys):
    assert main([*arguments, "--out", "out", "--lag", "2", "--vectors"]) == 0
    printed = capsys.readouterr().out
    found, vectors = read(tmp_path / "out")
    wanted = [pair for seed in (0, 1) for pair in expected(features(seed), STARTS, 2)]
    wanted += expected(features(2, 90), np.arange(90) == 0, 2)
    assert [pair[1:] for pair in found] == wanted and len(vectors) == len(wanted)
    assert f"{len(wanted)} pairs of 1090 rows in 11 shards" in printed
    options = json.loads((tmp_path / "out" / "_options.json").read_text())
    assert options["about"] == {"encoder": "labelfactory:make", "encoder_option": {}}


def test_the_command_with_a_module_and_a_residual_list(tmp_path, arguments, capsys):
    arguments[arguments.index("labelfactory:make")] = "labelfactory:module"
    arguments += ["--codebook", f"{tmp_path / 'codebook.safetensors'}:other", "--encoder-option", "weight=0.5"]
    assert main([*arguments, "--out", "out"]) == 0
    pair = read(tmp_path / "out")[0][0]
    rows = torch.from_numpy(features(0))[:2]
    wanted = Labeller(lambda o, n: 0.5 * encoder(o, n), [CODEBOOK, CODEBOOK])(rows[:1], rows[1:])
    assert isinstance(wanted, Labels) and pair[4] == wanted.indices.flatten().tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--encoder", "labelfactory"], "it must be MODULE:FACTORY"),
        (["--encoder", "labelfactory:nothing"], "labelfactory has no callable nothing"),
        (["--encoder", "no_such_module:make"], "No module named 'no_such_module'"),
        (["--encoder-option", "delay=1"], "unexpected keyword argument 'delay'"),
        (["--encoder-option", "delay"], "'delay' is not NAME=VALUE"),
        (["--codebook", "codebook.pt"], "it must be FILE.safetensors"),
        (["--codebook", "codebook.safetensors"], "holds codes, other, but not codebook"),
        (["--codebook", "absent.safetensors"], "there is no file absent.safetensors"),
        (["--shape", "3,x"], "'3,x' is not positive integers"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--device", "cuda:99"], "--device is 'cuda:99', which torch"),
        (["--lag", "1", "--rows", "pixels"], "no rows could be read"),
    ],
)
def test_wrong_arguments_are_explained(arguments, capsys, changed, message):
    try:
        status = main([*arguments, *changed, "--out", "out"])
    except SystemExit as stop:
        status = stop.code
    assert status and message in capsys.readouterr().err


def test_label_is_loaded_when_it_is_used():
    code = "import sys, lamkernels as lk; assert 'lamkernels.labelling' not in sys.modules; print(lk.label.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "lamkernels.labelling.run"


def test_the_document_runs_as_written(tmp_path):
    document = (Path(__file__).parents[2] / "docs" / "labelling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|bash)\n(.*?)```", document, re.DOTALL)
    call, module = (
        next(text for kind, text in blocks if kind == "python" and part in text) for part in ("lk.label(", "class Enc")
    )
    commands = next(text for kind, text in blocks if kind == "bash").partition("\n")[2]  # behind the installation
    commands = commands.replace("torchrun", f"{sys.executable} -m torch.distributed.run --standalone")
    commands = commands.replace("\nlamkernels", "lamkernels")
    commands = re.sub("^lamkernels ", f"{sys.executable} -m lamkernels.cli ", commands, flags=re.MULTILINE)
    (tmp_path / "my_lam.py").write_text(module)
    (tmp_path / "call.py").write_text(call)
    (tmp_path / "data").mkdir()
    for name in "abc":
        np.save(tmp_path / "data" / f"{name}.npy", np.random.default_rng(0).standard_normal((300, 64), np.float32))
    save_file({"weight": torch.randn(128, 128) / 11, "codebook": torch.randn(16, 32)}, tmp_path / "lam.safetensors")
    printed = subprocess.run(
        ["bash", "-ec", f"{sys.executable} call.py; mv labels called; {commands}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.startswith("897 0\n")
    tables = [parquet.read_table(tmp_path / folder) for folder in ("called", "labels", "labels-2")]
    columns = [{name: table[name].to_pylist() for name in table.column_names[1:]} for table in tables]
    assert columns[0] == columns[1] == columns[2] and len(columns[0]["t"]) == 897
    assert [set(table["source"].to_pylist()) for table in tables] == [{f"data/{name}.npy" for name in "abc"}] * 3
