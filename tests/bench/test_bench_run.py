"""The runner and the reports: every outcome of a provider is a row, and files have fixed columns."""

import csv
import json
import os
import time

import pytest
import torch
from lamkernels.bench import cli, labelling, report, runner, worker
from lamkernels.bench.peaks import Peaks
from lamkernels.bench.providers import PROVIDERS
from lamkernels.bench.report import Row
from lamkernels.bench.workloads import Workload

import lamkernels as lk

LOOKUP = Workload("custom", "nearest_code", 64, 4, 3)
SETTINGS = runner.Settings(rounds=2, seconds=0.02, timeout=120)


class Answers:
    """Stands in for the processes: what each provider answers to each request."""

    def __init__(self, **answers):
        self.answers, self.asked, self.graphs = answers, [], []

    def __call__(self, provider, settings):
        test = self

        class Process:
            process = object()

            def start(self):
                test.asked.append(("start", provider))

            def ask(self, do, **request):
                test.asked.append((do, provider))
                test.graphs += [request["graph"]] if do == "time" else []
                answer = test.answers[provider][do] if do != "drop" else {}
                return dict(answer)

            def close(self):
                test.asked.append(("close", provider))

        return Process()


RIGHT = {
    "error": "",
    "mismatch_rate": 0.0,
    "max_regret": 0.0,
    "contract": True,
    "checked_rows": 64,
    "bandwidth": 1e9,
    "flops": 1e9,
}


@pytest.fixture
def everything_present(monkeypatch):
    monkeypatch.setattr(type(PROVIDERS["numba"]), "absent", lambda self, device: "")


def run_with(monkeypatch, **answers):
    fake = Answers(**answers)
    monkeypatch.setattr(runner, "ProviderProcess", fake)
    monkeypatch.setattr(runner, "PAUSE", 0)
    (rows,) = runner.run([LOOKUP], list(answers), SETTINGS)
    return {row.provider: row for row in rows}, fake.asked


def test_times_are_medians_over_rounds_and_a_loss_is_marked(monkeypatch, everything_present):
    rows, asked = run_with(
        monkeypatch,
        numba={"prepare": RIGHT, "time": {"samples": [4.0, 2.0, 3.0]}},
        eager={"prepare": RIGHT, "time": {"samples": [1.0, 1.0, 7.0]}},
        reference={"prepare": RIGHT, "time": {"samples": [0.5]}},
    )
    assert rows["numba"].time_ms == 3.0 and rows["eager"].time_ms == 1.0 and rows["numba"].calls == 6
    assert rows["numba"].speedup == pytest.approx(1 / 3) and rows["numba"].note == "loss"
    assert rows["reference"].note == "" and rows["eager"].note == ""  # the reference is no peer, and enters no race
    assert rows["eager"].gflops == pytest.approx(LOOKUP.flops / 1e-3 / 1e9)
    assert rows["eager"].roofline == pytest.approx(max(LOOKUP.bytes, LOOKUP.flops) / 1e9 / 1e-3)
    turns = [name for do, name in asked if do == "time"]
    assert turns == ["numba", "eager", "reference", "eager", "reference", "numba"]


def test_on_a_gpu_the_processes_start_together_and_both_clocks_are_kept(monkeypatch, everything_present):
    monkeypatch.setattr(runner, "_free_memory", lambda device: None)
    fake = Answers(
        triton={"prepare": RIGHT, "time": {"samples": [2.0], "wall": 9.0, "graph": 1.0}},
        eager={"prepare": RIGHT, "time": {"samples": [3.0], "wall": 5.0, "graph": None}},
    )
    monkeypatch.setattr(runner, "ProviderProcess", fake)
    monkeypatch.setattr(runner, "PAUSE", 0)
    settings = runner.Settings(device="cuda", rounds=2)
    both = list(runner.run([LOOKUP, LOOKUP], ["triton", "eager"], settings))
    ours, theirs = both[1]
    assert (ours.time_ms, ours.wall_ms, ours.graph_ms) == (2.0, 9.0, 1.0) and theirs.graph_ms is None
    assert fake.asked[:3] == [("start", "triton"), ("start", "eager"), ("prepare", "triton")]
    assert sum(do == "start" for do, _ in fake.asked) == 2
    assert fake.graphs == [True, True, False, False] * 2  # replays do not wander


def test_inputs_too_large_to_lie_side_by_side_take_turns_as_wholes(monkeypatch, everything_present):
    monkeypatch.setattr(runner, "_free_memory", lambda device: 3 * LOOKUP.peak_bytes)
    answers = {"prepare": RIGHT, "time": {"samples": [1.0]}}
    rows, asked = run_with(monkeypatch, numba=answers, eager=answers)
    assert [row.status for row in rows.values()] == ["ok", "ok"] and rows["numba"].speedup == 1.0
    assert asked == [(do, name) for name in ("numba", "eager") for do in ("prepare", "time", "time", "drop")] + [
        ("close", name) for name in ("numba", "eager")
    ]


def test_a_wrong_result_and_a_failure_are_rows_without_times(monkeypatch, everything_present):
    wrong = {**RIGHT, "error": "wrong codes", "mismatch_rate": 0.5}
    rows, asked = run_with(
        monkeypatch,
        numba={"prepare": wrong},
        faiss={"prepare": {"error": "ModuleNotFoundError: no such kernel"}},
        eager={"prepare": RIGHT, "time": {"error": "its process was killed by signal 9"}},
    )
    assert (rows["numba"].status, rows["numba"].mismatch_rate) == ("wrong", 0.5)
    assert (rows["faiss"].status, rows["faiss"].note) == ("error", "ModuleNotFoundError: no such kernel")
    assert rows["eager"].status == "error" and "signal 9" in rows["eager"].note
    assert all(row.time_ms is None for row in rows.values())
    assert asked.count(("time", "eager")) == 1  # the second round leaves it out


def test_an_absent_provider_is_a_row_and_starts_no_process(monkeypatch):
    monkeypatch.setattr(type(PROVIDERS["faiss"]), "absent", lambda self, device: "faiss is not installed")
    rows, asked = run_with(monkeypatch, faiss={})
    assert (rows["faiss"].status, rows["faiss"].note) == ("absent", "faiss is not installed")
    assert asked == []


def test_providers_say_why_they_are_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert PROVIDERS["faiss"].absent("cpu") == "faiss is not installed; pip install faiss-cpu"
    monkeypatch.undo()
    assert "cpu only" in PROVIDERS["faiss"].absent("cuda") or "not installed" in PROVIDERS["faiss"].absent("cuda")
    assert "CPU tensors only" in PROVIDERS["numba"].absent("cuda")


def test_what_does_not_fit_is_skipped(monkeypatch, everything_present):
    monkeypatch.setattr(runner, "_free_memory", lambda device: 1000)
    rows, _ = run_with(monkeypatch, cdist={})
    assert rows["cdist"].status == "skipped" and "free" in rows["cdist"].note


def test_a_lookup_in_blocks_holds_no_matrix_of_scores():
    matrices = {
        op: PROVIDERS["compile"].score_bytes(Workload("custom", op, 1000, 50, 3))
        for op in ("nearest_code", "train_step")
    }
    assert matrices == {"nearest_code": 0, "train_step": 2 * 4 * 1000 * 50}


def test_a_type_that_a_provider_does_not_take_is_absent(everything_present):
    half = Workload("custom", "nearest_code", 64, 4, 3, "bfloat16")
    ((row,),) = runner.run([half], ["faiss"], SETTINGS)
    assert (row.status, row.note) == ("absent", "takes float32 only")


def test_a_workload_that_a_provider_refuses_is_absent(monkeypatch, everything_present):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for num_codes, absent in ((64, False), (1024, True)):
        workload = Workload("custom", "train_step", 64, num_codes, 16)
        row = runner._new_row(workload, PROVIDERS["cuda"], SETTINGS)
        assert (row.status == "absent") is absent and ("shared memory" in row.note) is absent


def test_a_spin_covers_the_launches_of_a_call(monkeypatch):
    spins = []
    event = type(
        "Event", (), dict.fromkeys(("record", "synchronize"), lambda self: None) | {"elapsed_time": lambda *_: 1.0}
    )
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", spins.append)
    for host, least in ((0.0, 1e-3), (3e-3, 6e-3), (0.05, worker.LONGEST_SPIN)):
        spins.clear()
        worker._sample_gpu(lambda _, host=host: time.sleep(host), 1, 0.01)
        assert least <= spins[0] / worker.CYCLES <= worker.LONGEST_SPIN and len(set(spins)) == 1


def test_what_one_workload_allowed_does_not_serve_the_next():
    session = worker.Session("eager", "cpu", 1)
    session.peaks["float32", ""] = Peaks(1.0, 1.0)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert not session.prepare(LOOKUP)["error"] and not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_a_real_process_answers_fails_and_comes_back():
    process = runner.ProviderProcess("reference", SETTINGS)
    try:
        unknown = process.ask("no_such_request")
        assert unknown["error"].startswith("AttributeError")
        process.process.kill()
        process.process.wait()
        assert "killed by signal 9" in process.ask("drop")["error"]
        assert process.ask("drop") == {}
    finally:
        process.close()


def test_command_line_measures_and_writes(tmp_path, capsys):
    argv = ["--shape", "64,4,3", "--op", "nearest_code", "--providers", "reference", "--rounds", "2"]
    argv += ["--seconds", "0.02", "--device", "cpu", "--threads", "1"]
    files = ["--json", str(tmp_path / "a" / "b.json"), "--csv", str(tmp_path / "b.csv")]
    assert cli.main(argv + files) == 0
    shown = capsys.readouterr().out
    assert "nearest_code  N=64  K=4  D=3  float32" in shown and "reference" in shown
    written = json.loads((tmp_path / "a" / "b.json").read_text())
    assert written["context"]["versions"]["torch"] and written["context"]["command"].startswith("lamkernels bench")
    (row,) = written["rows"]
    assert row["status"] == "ok" and row["time_ms"] > 0 and row["mismatch_rate"] == 0 and row["checked_rows"] == 64
    (line,) = csv.DictReader((tmp_path / "b.csv").read_text().splitlines())
    assert float(line["time_ms"]) == pytest.approx(row["time_ms"], rel=1e-4)
    assert not list(tmp_path.rglob("*.part"))


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_COMMIT", "abc")
    path = tmp_path / "bench.json"
    argv = ["--providers", "reference,eager", "--rounds", "1", "--seconds", "0.01", "--device", "cpu", "--resume"]
    argv += ["--op", "nearest_code", "--shape", "50,4,3", "--shape", "60,4,3", "--shape", "70,4,3", "--json", str(path)]
    measured = []

    def measure(workload, providers, processes, settings):
        measured.append(workload.N)
        if workload.N == 60 and len(measured) == 2:
            raise KeyboardInterrupt
        rows = [runner._new_row(workload, provider, settings) for provider in providers]
        for row in rows:
            row.status = "error" if workload.N == 50 and len(measured) < 3 else "ok"
            row.time_ms, row.p10_ms, row.p90_ms, row.kind = (
                1.0,
                1.0,
                1.0,
                "ours" if row.provider == "reference" else "peer",
            )
        return rows

    monkeypatch.setattr(runner, "_time", measure)
    monkeypatch.setattr(report, "commit", lambda: "abc")
    assert cli.main(argv) == 130 and [row["N"] for row in json.loads(path.read_text())["rows"]] == [50, 50]
    assert cli.main(argv) == 0 and measured == [50, 60, 50, 60, 70]  # the one that failed, and those not reached
    assert cli.main(argv) == 0 and len(measured) == 5
    assert [row["N"] for row in json.loads(path.read_text())["rows"]] == [50, 50, 60, 60, 70, 70]
    path.write_text(path.read_text().replace('"kind"', '"sort"'))  # of a version that no longer reads
    assert cli.main(argv) == 0 and len(measured) == 8
    monkeypatch.setattr(report, "commit", lambda: "abc-dirty")
    assert cli.main(argv) == 0 and len(measured) == 11
    with pytest.raises(SystemExit):
        cli.main(argv[:-2])
    assert "--resume goes on with what --json (or --out) holds" in capsys.readouterr().err


def test_csv_columns_are_fixed(tmp_path):
    row = Row("lam", "nearest_code", 1, 2, 3, "float32", "cpu", 2, "numba", "ours", status="absent", note="a, b")
    about = report.context("cpu", ["--quick"])
    report.write_csv(tmp_path / "rows.csv", [row], about)
    header, line = csv.reader((tmp_path / "rows.csv").read_text().splitlines())
    assert " ".join(header) == (
        "suite op N K D dtype device threads provider kind version status note time_ms best_round_ms p10_ms p90_ms "
        "wall_ms graph_ms calls speedup gflops gbytes_s roofline bound bandwidth_gbs peak_gflops "
        "checked_rows mismatch_rate max_regret contract peak_extra_mb output_mb score_matrix_mb "
        "hardware lamkernels torch commit date command"
    )
    cells = dict(zip(header, line, strict=True))
    assert cells["note"] == "a, b" and cells["time_ms"] == "" and cells["command"] == "lamkernels bench --quick"


def test_table_shows_losses_and_absences():
    fields = ("lam", "nearest_code", 1, 2, 3, "float32", "cpu", 2)
    timed = {"status": "ok", "p10_ms": 1.0, "p90_ms": 2.0, "roofline": 0.5, "mismatch_rate": 0.0, "max_regret": 0.0}
    rows = [
        Row(*fields, "numba", "ours", time_ms=2.0, **timed),
        Row(*fields, "eager", "peer", time_ms=1.0, **timed),
        Row(*fields, "faiss", "peer", status="absent", note="not installed"),
    ]
    text = report.table(report.rank(rows))
    assert "0.50× LOSS" in text and "absent: not installed" in text
    assert "0 of 1" in report.summary(rows) and "loss  nearest_code" in report.summary(rows)


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    fields = ("lam", "nearest_code", 1, 2, 3, "float32", "cpu", 2)
    rows = [Row(*fields, "eager", "peer", status="ok", time_ms=1.0), Row(*fields, "numba", "ours", status="absent")]
    report.write_plot(tmp_path / "rows.svg", rows, report.context("cpu", []))
    drawn = (tmp_path / "rows.svg").read_text()
    assert "<svg" in drawn


def test_plot_needs_matplotlib(monkeypatch, capsys):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit):
        cli.main(["--device", "cpu", "--plot", "x.png"])
    assert "pip install 'lamkernels[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--suite", "lamm"], "--suite is 'lamm'; allowed are lam, tokenizer, targets, memory"),
        (["--op", "x,nearest_code"], "--op is 'x'; allowed are nearest_code, vector_quantize"),
        (
            ["--providers", "nope"],
            "--providers is 'nope'; allowed are numba, numba-exact, numba-batches, triton, cuda, reference",
        ),
        (["--providers", ","], "--providers is empty; allowed are numba"),
        (
            ["--dtype", "float32,float16"],
            "--dtype is 'float32,float16'; allowed are float32, float16, bfloat16, one of",
        ),
        (["--device", "tpu"], "--device is 'tpu'; allowed are cpu, cuda"),
        (["--dtype", "int8"], "--dtype is 'int8'; allowed are float32"),
        (["--threads", "0"], "--threads is '0'; it must be a positive number"),
        (["--shape", "1,2"], "--shape is '1,2'; it must be three positive integers N,K,D"),
        (["--suite", "memory", "--op", "train_step"], "no workload of suite memory has op train_step"),
        (["--plot", "x.exe"], "--plot is 'x.exe'; allowed are names in .png, .svg or .pdf"),
    ],
)
def test_a_bad_argument_gets_one_line(argv, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--device", "cpu", *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.count("\n") == 1


def test_list_runs_nothing(capsys):
    assert cli.main(["--list", "--suite", "memory", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "nearest_code N=262144 K=8192 D=32" in shown and "faiss" in shown


def test_hard_data_names_who_goes_wrong(tmp_path, capsys):
    assert cli.main(["--hard-data", "--providers", "reference,eager", "--json", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "| NaN and infinity | 113 | 0 | 113 + 87 n |" in printed
    outcomes = json.loads((tmp_path / "found.json").read_text())["outcomes"]
    assert {outcome["wrong"] for outcome in outcomes if outcome["provider"] == "reference"} == {0}
    assert any(outcome["wrong"] for outcome in outcomes if outcome["provider"] == "eager")


def test_the_first_call_is_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LAMKERNELS_BACKEND", "reference")  # nothing to compile
    assert cli.main(["--first-call", "--json", str(tmp_path / "first.json")]) == 0
    seconds = json.loads((tmp_path / "first.json").read_text())["seconds"]
    assert all(value > 0 for times in seconds.values() for value in times.values())
    assert "nearest_code" in capsys.readouterr().out


def test_the_time_of_the_host_is_measured_without_a_gpu(tmp_path, capsys):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing: TRITON_INTERPRET=1 is set")
    before = lk.available_backends()
    assert cli.main(["--host-time", "--quick", "--json", str(tmp_path / "host.json")]) == 0
    rows = json.loads((tmp_path / "host.json").read_text())["microseconds"]
    assert {row["call"]: row["launches"] for row in rows if "step" in row["call"]} == {
        "VectorQuantize, EMA step": 3,
        "VectorQuantize, gradient step": 3,
        "VectorQuantize, gradient step, cosine": 5,
    }
    assert all(row["without_triton"] > 0 and row["microseconds"] > 0 for row in rows)
    assert "less Triton" in capsys.readouterr().out
    x = torch.randn(20, 4)
    assert lk.nearest_code(x, x).tolist() == list(range(20))  # everything is as it was
    assert lk.available_backends() == before


def test_the_one_pass_forward_is_compared_with_the_lookup(tmp_path, capsys):
    argv = ["--one-pass", "--shape", "2000,8,4", "--shape", "500,1024,4", "--quick", "--json", str(tmp_path / "f.json")]
    assert cli.main(argv) == 0
    small, large = json.loads((tmp_path / "f.json").read_text())["milliseconds"]
    assert small["allowed"] == pytest.approx(small["lookup"] + 1.2 * small["copy"])
    assert large["allowed"] == pytest.approx(1.1 * large["lookup"])
    assert "(2000, 8, 4)" in capsys.readouterr().out


def test_labelling_is_compared_with_one_pair_at_a_time(tmp_path, capsys):
    pytest.importorskip("safetensors")
    assert cli.main(["--labelling", "--quick", "--json", str(tmp_path / "labelling.json")]) == 0
    rows = json.loads((tmp_path / "labelling.json").read_text())["microseconds_per_pair"]
    assert [row["encoder"] for row in rows] == ["linear", "features", "frames"]
    for row in rows:
        assert row["compared"] == 100 and row["wrong"] == 0 and row["unequal"] <= 1
        assert row["speedup"] == pytest.approx(row["pattern"] / row["label"])
    assert "one by one" in capsys.readouterr().out


def test_a_wrong_code_is_told_from_a_near_tie():
    given = labelling.case("features", 300)
    theirs = torch.tensor(labelling.one_by_one(given, 20))
    wrong = (theirs + 1) % len(given.codebook)
    everywhere = torch.ones(20, dtype=torch.bool)
    assert labelling._wrong(given, everywhere, wrong, theirs) == 20
    assert labelling._wrong(given, everywhere, theirs, theirs) == 0
