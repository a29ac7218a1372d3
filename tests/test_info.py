"""``lamkernels info``: what it shows is what would happen."""

import json
import subprocess
import sys

import torch

import lamkernels
from lamkernels import info
from lamkernels.backend import resolve


def test_text_names_versions_devices_and_backends(capsys):
    assert info.main([]) == 0
    shown = capsys.readouterr().out
    for word in ("python", "torch", "numba", "numpy", "cpu", "gpu", "reference", "triton", "nearest_code"):
        assert word in shown
    for status in lamkernels.available_backends().values():
        assert status.reason in shown


def test_json_holds_the_same(capsys):
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["lamkernels"] == lamkernels.__version__
    assert found["cpu"]["vector_bits"] in (128, 256, 512) and found["cpu"]["cores"] >= 1
    assert found["backends"]["reference"]["available"] is True
    assert {(c["op"], c["device"]) for c in found["auto"]} >= {("nearest_code", "cpu"), ("vector_quantize", "cuda")}


def test_auto_is_what_resolve_picks_and_each_other_has_a_reason():
    for choice in info.choices():
        assert choice["auto"] == resolve("auto", choice["device"])
        others = set(lamkernels.available_backends()) - {choice["auto"]}
        assert set(choice["not_the_others"]) == others and all(choice["not_the_others"].values())


def test_a_missing_kernel_is_said(monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", "reference")
    monkeypatch.setattr(info, "has_kernel", lambda operator, backend: False)
    assert all("no reference kernel" in choice["error"] for choice in info.choices())


def test_an_unknown_backend_in_the_environment_is_an_error_in_the_report(monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", "fpga")
    choices = info.choices()
    assert all(choice["auto"] == "" and "fpga" in choice["error"] for choice in choices)
    assert "fpga" in info.render(info.collect())


def test_a_package_that_is_missing_is_shown_as_such(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("no-such-package",))
    assert info.versions()["no-such-package"] is None
    assert "not installed" in info.render(info.collect())


def test_threads_are_those_of_torch():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert info.collect()["numba_threads"].startswith("2 threads of torch's OpenMP runtime")
    finally:
        torch.set_num_threads(threads)


def test_versions_and_devices_import_neither_numba_nor_triton():
    """Only asking whether a backend works imports it: ``available_backends`` does, to say why an import fails."""
    program = (
        "import sys; from lamkernels import info\n"
        "info.versions(), info.cpu(), info.gpus(), info.operators()\n"
        "print([m for m in ('numba', 'llvmlite', 'triton', 'cupy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
