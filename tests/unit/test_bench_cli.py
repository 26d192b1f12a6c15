"""`mlpdsl bench`: what it prints, draws and keeps, its exit statuses, and what it says of mistakes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("click")

from mlpdsl import SpecError, UnsupportedError, bench, cli, cli_bench, cli_fuzz
from mlpdsl.bench import peers, table, timing
from mlpdsl.cli_bench import read_rows
from tests.unit.test_bench import ONE, OTHER, SPEC, Fake, ask, one_thread, twice

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("mlpdsl-bench.json")
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """The GPU that the command finds, and candidates that tell it who they are: mlpdsl is the slowest but at 4 rows."""
    device = Fake()
    base = {"mlpdsl": 60.0, "eager": 50.0, "compile": 40.0, "max-autotune": 45.0, "liger": 55.0}
    device.us = lambda name, m, launch: base.get(name, 5.0) / (2 if name == "mlpdsl" and m == 4 else 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_bench, "_device", lambda: device)
    for name in base:
        monkeypatch.setitem(peers.CANDIDATES, name, device.candidate(name))
    with one_thread():
        yield device


@pytest.fixture
def run(device: Fake, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command: exit status, stdout, stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["bench", *args])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def state() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(OUT.read_text())
    return found


def test_a_run(run: Bench) -> None:
    status, out, err = run(SPEC.to_json(), "--m", "3,4", "--m", "5", "--passes", "forward,train")
    assert status == 0, err
    assert [(row["m"], row["passes"]) for row in state()["rows"]] == [(m, p) for p in ("forward", "train") for m in (3, 4, 5)]
    assert state()["settings"]["peers"] == ["eager", "compile", "max-autotune", "liger"] and state()["command"].startswith(
        "mlpdsl "
    )
    lines = out.splitlines()
    assert lines[0].startswith("NVIDIA H200; mlpdsl 1, torch ")
    assert lines[4].split() == [*table.TITLES, "mlpdsl", "eager", "compile", "max-autotune", "liger", "ratio", "interval"]
    rows = [line.split() for line in lines if line.startswith(SPEC.short_name)]
    first = rows[0]
    assert first[:6] == [SPEC.short_name, "3", "forward", "eager", "hot", "sustained"]
    assert first[7:] == ["60.0", "50.0", "40.0", "45.0", "55.0", "0.67", "0.67", "to", "0.67", "slower"]
    assert rows[2][7] == "30.0" and rows[2][-5:] == ["1.33", "1.33", "to", "1.33", "faster"]
    assert rows[-1] == [SPEC.short_name, "5", "train", "10.0", "30.0", "(3.0)", *["10.0", "(1.0)"] * 4]  # the host's table
    done = [line for line in err.splitlines() if "M = 4, forward: eager hot sustained 30.0 µs 1.33x, graph hot" in line]
    assert len(done) == 1 and err.count("mlpdsl: ") == 6


def test_suites_and_specs_together(run: Bench, tmp_path: Path) -> None:
    (tmp_path / "bench_models.py").write_text(f"import mlpdsl\nspec = mlpdsl.MLPSpec.from_json({OTHER.to_json()!r})\n")
    status, _, err = run("small", "bench_models", "--m", "2", "--no-compile", "--launch", "graph", "--regime", "sustained")
    assert status == 0, err
    rows = state()["rows"]
    assert [row["name"] for row in rows][-2:] == ["digits-fp32", "bench_models::spec"] and len(rows) == 11
    assert state()["settings"] == {"peers": ["eager", "liger"], "launches": ["graph"], "regimes": ["sustained"], "seed": 0}
    sys.modules.pop("bench_models", None)


def test_ctrl_c_and_resume(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = table.lines
    made: list[str] = []

    def interrupted(spec: Any) -> Any:
        made.append("x")
        if len(made) == 3:
            raise KeyboardInterrupt
        return peers.plain(spec)

    monkeypatch.setitem(peers.CANDIDATES, "compile", interrupted)
    arguments = (SPEC.to_json(), "--m", "1,2,3,4", "--peers", "eager,compile", "--launch", "eager")
    status, out, err = run(*arguments)
    assert status == 130 and out == "" and "what was measured is in mlpdsl-bench.json" in err
    assert [row["m"] for row in state()["rows"]] == [1, 2]
    status, _, err = run(*arguments)
    assert status == 2 and "mlpdsl-bench.json is there already: --resume goes on with it" in err
    assert run(*arguments, "--resume")[0] == 0
    assert [row["m"] for row in state()["rows"]] == [1, 2, 3, 4] and len(right(state())) == 4 and len(made) == 5
    status, _, err = run(*arguments[:-2], "--resume")
    assert status == 2 and "settings.launches is ['eager'] there and ['eager', 'graph'] here" in err


def test_the_time_is_up(run: Bench, device: Fake) -> None:
    device.us = lambda name, m, launch: 50e3
    status, out, err = run(SPEC.to_json(), "--m", "1,2,3", "--seconds", "1", "--peers", "eager", "--launch", "eager")
    assert status == 0 and "the time is up: 2 of 3 rows are left, and the same command with --resume goes on" in err
    assert out.count(SPEC.short_name) == 2  # in both tables


def test_ours_failing_is_exit_status_1(run: Bench, device: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.CANDIDATES, "mlpdsl", device.candidate("mlpdsl", twice))
    status, out, err = run(SPEC.to_json(), "--m", "1", "--peers", "eager")
    assert (
        status == 1 and "mlpdsl failed on" in err and "M = 1, forward: mlpdsl failed: its result differs from that of eager" in out
    )
    monkeypatch.setitem(peers.CANDIDATES, "mlpdsl", device.candidate("mlpdsl"))
    monkeypatch.setitem(peers.CANDIDATES, "eager", device.candidate("eager", lambda spec: 1 / 0))  # type: ignore[arg-type, return-value]
    status, out, err = run(SPEC.to_json(), "--m", "1", "--peers", "eager", "--out", "b.json")
    assert status == 0 and "eager failed: ZeroDivisionError: division by zero" in out and "failed on" not in err


def test_without_a_gpu(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    status, out, err = run("seeds", "--out", str(OUT.absolute()))
    assert status == cli_fuzz.NOTHING_RAN == 3 and out == "" and "`mlpdsl doctor` says why" in err and not OUT.exists()
    assert err.startswith("mlpdsl: ") and err.count("\n") == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run("seeds")[0] == 3
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET is set: unset it"):
        bench.run(ONE)


def test_list(run: Bench) -> None:
    status, out, err = run("--list")
    assert (status, err) == (0, "") and [line.split(":")[0] for line in out.splitlines() if line[:1].isalpha()] == list(
        bench.SUITES
    )
    assert re.search(
        r"^  swiglu-4096x14336 +gated-silu-4096x14336x4096-bf16  M = 1, 16, 64, 128, 256, 512, 4096, 16384$", out, re.M
    )
    assert out.count("\n  ") == sum(len(suite.entries) for suite in bench.SUITES.values())


def test_one_mlp_of_a_suite(run: Bench) -> None:
    found = read_rows(["llm/gpt-2", "small/minilm-l6"], (128,), ())
    assert [(row.name, row.m) for row in found] == [("gpt-2", 128), ("minilm-l6", 128)]
    assert read_rows(["llm/gpt-2"], (), ()) == [row for row in bench.rows(["llm"]) if row.name == "gpt-2"]
    status, _, err = run("llm/gpt2", "--m", "1")
    assert status == 2 and "Did you mean 'gpt-2'?" in err
    for text in ("llm/", "llm/nothing-like-it"):
        with pytest.raises(SpecError, match=r"`mlpdsl bench --list` has those of llm"):
            read_rows([text], (1,), ())
    with pytest.raises(SpecError, match=r"llm/nowhere\.json"):  # a path
        read_rows(["llm/nowhere.json"], (1,), ())


def test_rows_of_earlier_results(run: Bench) -> None:
    """All, or those below a ratio, the least first; each once; what is wrong with a file is said before anything is timed."""
    before, after = "before.json", ("--out", "after.json")
    assert run(SPEC.to_json(), "--m", "3,4", "--passes", "forward,train", "--out", before)[0] == 0

    def timed() -> list[tuple[int, str]]:
        return [(row["m"], row["passes"]) for row in json.loads(Path("after.json").read_text())["rows"]]

    assert run("--rows-of", before, "--rows-of", before, *after)[0] == 0
    assert sorted(timed()) == [(3, "forward"), (3, "train"), (4, "forward"), (4, "train")]
    Path("after.json").unlink()
    assert run("--rows-of", before, "--below", "1", *after)[0] == 0  # the fake is slower but at 4 rows
    assert sorted(timed()) == [(3, "forward"), (3, "train")]
    Path("after.json").unlink()
    status, out, err = run("--rows-of", before, "--below", "0.1", *after)
    assert (status, out) == (0, "") and "nothing to time" in err and before in err and not Path("after.json").exists()
    assert run(SPEC.to_json(), "--m", "4,5", "--rows-of", before, "--below", "1", *after)[0] == 0
    assert sorted(timed()) == [(3, "forward"), (3, "train"), (4, "forward"), (5, "forward")]

    data = json.loads(Path(before).read_text())
    for at, (row, ratio) in enumerate(zip(data["rows"], (0.9, 0.7, None, None), strict=True)):
        row["measured"] = [{"ratio": ratio}, {"ratio": None}, {"ratio": 0.95 + at}]
    data["rows"][2]["candidates"]["mlpdsl"]["failed"] = "out of memory"
    Path(before).write_text(json.dumps(data))
    found = cli_bench.rows_again([Path(before)], 0.99)
    assert [row.key for row in found] == [data["rows"][at]["key"] for at in (2, 1, 0)]
    Path(before).write_text(json.dumps({**data, "rows": []}))
    assert run("--rows-of", before, *after) == (0, "", f"mlpdsl: nothing to time: '{before}' has no row\n")


def test_rows_of_what_is_no_file_of_results(run: Bench) -> None:
    """Said with the file and the row, before anything is timed or written."""
    before = Path("before.json")
    assert run(SPEC.to_json(), "--m", "3", "--out", str(before))[0] == 0
    data = json.loads(before.read_text())
    for wrong, said in (
        ({"m": -1}, "m -1"), ({"m": 0}, "m 0"), ({"m": None}, "m None"), ({"m": True}, "m True"), ({"name": None}, "name None"),
        ({"passes": "back"}, "passes 'back'"), ({"passes": []}, "passes []"), ({"measured": 3}, "not iterable"),
        ({"measured": [{"ratio": "fast"}]}, "ratios ['fast']"), ({"measured": [{"ratio": float("nan")}]}, "ratios [nan]"),
        ({"measured": [{"ratio": 0.5}, 3]}, "'int'"),
        ({"candidates": None}, "'NoneType'"), ({"spec": {"dims": [8]}}, "dims"), ({"spec": 3}, "from_json"),
    ):  # fmt: skip
        before.write_text(json.dumps({**data, "rows": [data["rows"][0], data["rows"][0] | wrong]}))
        for chosen in ((), ("--below", "0.5")):
            status, out, err = run("--rows-of", str(before), "--out", "after.json", *chosen)
            assert (status, out) == (2, "") and f"mlpdsl: {before}, row 2, cannot be timed again: " in err and said in err, (
                wrong,
                err,
            )
    before.write_text(json.dumps({**data, "rows": [{"name": "x"}]}))
    assert "row 1, cannot be timed again: it has no spec, m, passes, candidates, measured" in run("--rows-of", str(before))[2]
    before.write_text("[" * 100_000)
    status, out, err = run("--rows-of", str(before), "--out", "after.json")
    assert (status, out) == (2, "") and f"mlpdsl: {before} cannot be read" in err
    assert not Path("after.json").exists() and not OUT.exists()


def test_help(run: Bench) -> None:
    status, out, _ = run("--help")
    words = " ".join(out.split())
    assert (
        status == 0 and "Suites: seeds, llm, vision, small, odd, float32." in words and "3 there is no GPU to run on; 130" in words
    )
    for option in (
        "--m",
        "--passes",
        "--peers",
        "--launch",
        "--seconds-a-row",
        "--seconds",
        "--out",
        "--resume",
        "--plot",
        "--list",
        "--rows-of",
        "--below",
    ):
        assert f"{option} " in words


def test_a_report(run: Bench) -> None:
    told = run(SPEC.to_json(), "--m", "3,4", "--launch", "graph")[1]
    before = OUT.read_bytes()
    assert run("--report", str(OUT)) == (0, told, "") and OUT.read_bytes() == before
    status, out, _ = run("--report", str(OUT), "--markdown")
    assert status == 0 and out == table.markdown(state()) and out.count("|---|---:|---|---|---|---|---:|") == 1
    assert f"| {SPEC.short_name} | 3 | forward | graph | hot | sustained |" in out and "| slower |" in out
    widths = {line.count("|") for line in out.split("\n\n")[1].splitlines()}
    assert len(widths) == 1


def test_what_is_absent_is_said_once() -> None:
    def absent(spec: Any) -> Any:
        raise peers.AbsentError("it is not installed")

    device = Fake()
    rows = [*ONE, *bench.rows([SPEC], ms=(9,))]
    data = ask(device, rows, candidates={**device.candidates("mlpdsl", "eager"), "liger": absent}).data
    assert table.notes(data) == ["liger: it is not installed (2 rows)"] and "liger " not in table.cells(data)[0]
    assert table.text(data).endswith("liger: it is not installed (2 rows)\n")
    data["rows"][0]["measured"][0] |= {"ratio": 1.234, "interval": [0.987, 1.321]}
    assert table.cells(data)[1][-3:] == ["1.23", "0.99 to 1.32", "even"]
    assert [table.microseconds(us) for us in (None, 0.8512, 12.44, 105.4, 6584.2)] == ["-", "0.85", "12.4", "105", "6584"]


def test_rows_too_short_for_bursts_say_so(run: Bench, device: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "too short for a burst: time it with --regime sustained"
    built: list[str] = []
    monkeypatch.setitem(peers.CANDIDATES, "eager", lambda spec: built.append("x") or peers.plain(spec))  # type: ignore[func-returns-value]
    arguments = (SPEC.to_json(), "--m", "1,2", "--peers", "eager", "--launch", "eager")
    status, out, err = run(*arguments, "--regime", "burst")
    assert (status, built) == (0, [])
    assert [row["skipped"] for row in state()["rows"]] == [said] * 2
    assert err.count(f"not timed: {said}") == out.count(f"not timed: {said}") == 2 and "mlpdsl was not timed" not in err
    assert run("--report", str(OUT), "--markdown")[1].count(f"not timed: {said}") == 2
    OUT.unlink()
    status, out, err = run(*arguments)  # sustained as well: nothing is missing that anybody would look for
    assert status == 0 and "too short" not in out + err and len(built) == 2
    assert [part["regime"] for row in state()["rows"] for part in row["measured"]] == ["sustained"] * 2
    OUT.unlink()
    monkeypatch.setattr(timing, "BURST_FLOOR_US", 0.0)
    status, out, err = run(*arguments, "--regime", "burst")
    assert status == 0 and "too short" not in out + err
    assert [part["regime"] for row in state()["rows"] for part in row["measured"]] == ["burst"] * 2


PNG = b"\x89PNG\r\n\x1a\n"


def test_plots(run: Bench, device: Fake) -> None:
    pytest.importorskip("matplotlib")
    device.l2_bytes = 60_000
    status, _, err = run(
        SPEC.to_json(), OTHER.to_json(), "--m", "1,16", "--m", "4096", "--passes", "forward,train", "--plot", "deep/plots"
    )
    assert status == 0 and "mlpdsl: 5 pictures in deep/plots" in err
    made = sorted(Path("deep/plots").iterdir())
    names = {f"{spec.short_name}-{word}.png" for spec in (SPEC, OTHER) for word in ("forward", "train")}
    assert {path.name for path in made} == names | {"roofline.png"}
    for path in made:
        content = path.read_bytes()
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        assert content.startswith(PNG) and width > 800 and height > 600 and len(content) > 20_000
    # One launch mode, one row, another's candidate.
    data = ask(device, ONE, "mlpdsl", "quack").data
    from mlpdsl.bench.plots import plot

    assert [path.name for path in plot(data, Path("one"))] == ["one-forward.png", "roofline.png"]
    assert plot({**data, "rows": []}, Path("none")) == []


def test_the_curves_of_a_plot(device: Fake) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from mlpdsl.bench import plots

    rows = bench.rows([SPEC], ms=(1, 4, 16))
    data = ask(device, rows, "mlpdsl", "eager").data
    figure = plots._times(pyplot, data, SPEC.short_name, "forward", table.lines(data))
    upper, lower = figure.axes
    curves = {line.get_color(): list(line.get_ydata()) for line in upper.lines}
    assert curves[plots._COLOURS["mlpdsl"]] == [60.0, 30.0, 60.0] and curves[plots._COLOURS["eager"]] == [50.0] * 3
    floors = [row["floor_us"] for row in data["rows"]]
    assert curves["0.45"] == floors
    over = {line.get_color(): list(line.get_ydata()) for line in lower.lines}
    assert over[plots._COLOURS["eager"]] == pytest.approx([50.0 / floor for floor in floors])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mlpdsl", "eager", "floor"]
    pyplot.close(figure)
    figure = plots._roofline(pyplot, data, table.lines(data))
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines if line.get_marker() == "o"]
    first = data["rows"][0]
    assert points[0] == (pytest.approx(first["flops"] / first["bytes"]), pytest.approx(first["flops"] / 60.0 / 1e6))
    pyplot.close(figure)


def test_without_matplotlib_it_says_what_to_install(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = run(SPEC.to_json(), "--plot", "plots")
    assert status == 2 and "pip install 'mlpdsl[bench]'" in err and not OUT.exists()  # said before anything is timed


def test_on_a_terminal_it_is_live_and_coloured(run: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(type(getattr(sys, stream)), "isatty", lambda self: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = run(SPEC.to_json(), "--m", "3,4", "--launch", "eager")
    assert status == 0 and "slower" in out and "F.linear" in out
    assert "M = 4, forward: eager hot sustained 30.0 µs 1.33x" in err.replace("\n", "")


def test_mistakes(run: Bench, tmp_path: Path) -> None:
    for arguments, said in (
        ((), "--list shows the suites"),
        (("seeds", "--m", "0"), "--m"),
        (("seeds", "--m", "1,x"), "'x' is not a valid"),
        (("seeds", "--peers", "quack"), "'quack' is not one of 'eager'"),
        (("seeds", "--passes", "backward"), "--passes"),
        (("seeds", "--launch", "graphs"), "--launch"),
        (("seeds", "--seconds", "0"), "--seconds"),
        (("seeds", "--report", "x.json"), "--report shows a file as it is"),
        (("--rows-of", "x.json", "--m", "3"), "--rows-of has rows and passes of its own"),
        (("--rows-of", "x.json", "--report", "x.json"), "--report shows a file as it is"),
        (("--rows-of", str(OUT)), "mlpdsl-bench.json has those rows already"),
        (("--rows-of", "x.json", "--below", "nan"), "--below is a number"),
        (("--report", "x.json", "--below", "1"), "name one with --rows-of"),
        (("seeds", "--below", "1"), "name one with --rows-of"),
        (("--rows-of", "x.json", "--below", "0"), "--below"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and "Usage: mlpdsl bench" in err and said in err, arguments
    for arguments, said in (
        (("seed",), "there is no module 'seed' in "),
        (("seed",), "Did you mean 'seeds'?"),
        (("xyz",), "Suites are 'seeds', 'llm', 'vision', 'small', 'odd', 'float32'."),
        (("--report", "none.json"), "none.json cannot be read"),
        (("--rows-of", "none.json"), "none.json cannot be read"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "") and said in err and err.startswith("mlpdsl: "), arguments
    assert not OUT.exists()


# The page


def test_the_page() -> None:
    """Its commands parse, its suites and candidates are all there are, its keys are those of a file, its Python compiles."""
    page = (ROOT / "docs" / "benchmarking.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    mlpdsl (bench .*?)(?: +#.*)?$", page, re.M)
    assert len(commands) == 7
    for text in commands:
        cli_bench.command().make_context("bench", shlex.split(text)[1:])
    assert re.findall(r"^\| `(\w+)` \|", page.split("| suite |")[1].split("\n\n")[0], re.M) == list(bench.SUITES)
    assert re.findall(r"^\| `([\w-]+)` \|", page.split("| candidate |")[1].split("\n\n")[0], re.M) == list(peers.CANDIDATES)
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S):
        compile(code, "benchmarking.md", "exec")
    device = Fake()
    device.l2_bytes = 10_000
    data = ask(device, ONE).data
    (row,) = data["rows"]
    measured = row["measured"][0]
    keys = {*data, *data["ceilings"], *row, *row["candidates"]["mlpdsl"], *measured, *measured["times"]["mlpdsl"]}
    told = page.split("## The file")[1]
    assert {key for key in keys if f"`{key}`" not in told} == set()
