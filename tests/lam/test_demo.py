import contextlib
import io
import json
import subprocess
import sys

import pytest
import torch
from browser import check_page

from lamkernels.lam import demo

SMALLEST = demo.Size(transitions=300, steps=8, timed_steps=6, repeats=2, tokenizer_rows=256)


for package in ("ale_py", "jinja2", "matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMKERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=["pong", "breakout"])
def smallest(request, tmp_path_factory):
    """The folder of a demonstration, what it returned and what it printed."""
    out, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = demo.run(SMALLEST, request.param, 1, torch.device("cpu"), out)
    return out, results, printed.getvalue()


def check(out):
    results = json.loads((out / "results.json").read_text())
    assert results["schema"] == demo.SCHEMA
    for name in ("stock", "fused"):
        assert len(results["curves"][name]["loss"]) == results["config"]["size"]["steps"]
        assert results["step_time_ms"][name]["median"] > 0
        assert 0 <= results["action_recovery"][name]["accuracy"] <= 1
        for shape in ("training_shape", "tokenizer_shape"):
            assert results["bottleneck"][shape][name]["time_ms"] > 0
    agreement = results["agreement"]
    assert agreement["same_initial_state"] and agreement["held_out_code_agreement"] == 1
    for curves, tolerance in (("curves", 1e-10), ("float32_curves", 1e-3)):
        assert agreement[curves]["coincide"] and agreement[curves]["max_relative_difference"] < tolerance
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "{{" not in page and "{%" not in page
    assert {path.name for path in out.iterdir()} == {
        "report.html", "results.json", "stock.safetensors", "fused.safetensors"
    }  # fmt: skip
    return results


def test_the_smallest_demonstration(smallest):
    out, results, printed = smallest
    assert check(out)["curves"] == results["curves"]
    assert "stock loss" in printed and "report.html" in printed and "actions recovered from codes" in printed


def test_the_page_in_a_browser(smallest, tmp_path):
    check_page(smallest[0] / "report.html", 4, tmp_path)


@pytest.mark.slow
def test_a_quick_demonstration(tmp_path):
    command = [sys.executable, "-m", "lamkernels.cli", "demo", "--quick", "--out", str(tmp_path / "out")]
    subprocess.run(command, check=True, timeout=600)
    results = check(tmp_path / "out")
    recovery = results["action_recovery"]["fused"]
    assert recovery["accuracy"] > recovery["majority_accuracy"] + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--game", "chess"], "invalid choice"),
        (["--seed", "-1"], "--seed is -1"),
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--device", "meta"], "--device is 'meta'"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unwritable_folder_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--quick", "--out", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err


def test_importing_lam_loads_none_of_its_extras():
    code = (
        "import sys, lamkernels.lam; "
        "print([m for m in ('ale_py', 'matplotlib', 'jinja2', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
