"""The cache when writers are killed at any moment, and when many processes and threads use it at once."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from mlpdsl import cache as cache_module
from mlpdsl import loader
from mlpdsl.cache import SourceCache, digest
from tests.faults import workers
from tests.faults.figures import Figures, rounds
from tests.faults.tools import litter, run_script, warnings_in
from tests.support import INTERPRETING

STORM = """
KEYS, stop = range(4), root.parent / "stop"

def naive(i):
    path = SourceCache(root).path("mlp", digest(str(i)))
    with contextlib.suppress(OSError):  # evicted meanwhile
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_of(i))

def write(publish):
    while True:
        i = random.choice(KEYS)
        publish(i)
        if random.random() < 0.3:
            shutil.rmtree(SourceCache(root).path("mlp", digest(str(i))).parent, ignore_errors=True)

def read():
    right = {i: text_of(i) for i in KEYS}
    seen = {"whole": 0, "torn": 0, "absent": 0}
    while not stop.exists():
        for i in KEYS:
            try: found = SourceCache(root).path("mlp", digest(str(i))).read_text()
            except FileNotFoundError: seen["absent"] += 1
            else: seen["whole" if found == right[i] else "torn"] += 1
    os.write(1, (json.dumps(seen) + "\\n").encode())

def start(job, *args):
    if pid := os.fork():
        return pid
    try:
        random.seed()
        job(*args)
    finally:
        os._exit(0)

def storm(publish, kills):
    readers, writers = [start(read) for _ in range(2)], [start(write, publish) for _ in range(6)]
    for n in range(kills):
        time.sleep(random.uniform(0.001, 0.02))
        victim = writers.pop(0)
        os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, "the writer had died by itself"
        writers.append(start(write, publish))
    for pid in writers:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    stop.touch()
    for pid in readers:
        os.waitpid(pid, 0)
"""


def storm(publish: str, kills: int, root: Path) -> tuple[dict[str, int], str]:
    """What two readers saw in all, and what was said."""
    stdout, stderr = run_script(f"{STORM}\nstorm({publish}, {kills})", root, timeout=60 + kills)
    readers = [json.loads(line) for line in stdout.splitlines()]
    assert len(readers) == 2
    return {kind: sum(r[kind] for r in readers) for kind in readers[0]}, stderr


def test_writers_killed_at_any_moment_never_show_half_a_file(root: Path, figures: Figures) -> None:
    kills = rounds(100, 1500)
    seen, stderr = storm("publish", kills, root)
    assert seen["torn"] == 0
    assert seen["whole"] > kills
    assert stderr == ""
    figures.note("kill storm", writers=6, readers=2, kills=kills, reads=sum(seen.values()), **seen)
    for file in litter(root):  # what the dead left is known as such, and goes in time
        assert cache_module._STAGE.fullmatch(file.name)
        os.utime(file, (0, 0))
    for i in range(4):
        text = f"# {i}\n" + f"x{i} = 'some text to tear'\n" * 2000
        path = SourceCache(root).publish("mlp", digest(str(i)), text, {})
        assert path.read_text() == text
        path.write_text("wrong")
        SourceCache(root).publish("mlp", digest(str(i)), text, {})
    assert litter(root) == []


def test_the_storm_finds_a_naive_writer_out(root: Path, figures: Figures) -> None:
    kills = rounds(40, 200)
    seen, _ = storm("naive", kills, root)
    assert seen["torn"] > 0
    figures.note("kill storm, naive writer", kills=kills, reads=sum(seen.values()), **seen)


BARRIER = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking, where an import has started a thread
import torch, jinja2, mlpdsl
from tests.faults import workers
from mlpdsl.source import source_text
processes, count, many = json.loads(os.environ["MLPDSL_TEST_BARRIER"])
specs = workers.specs(count)
mlpdsl.compile(workers.specs(1, 99)[0])  # imports and templates are the parent's, which makes the children faster
source_text.cache_clear()
for round in range(many):
    shutil.rmtree(root, ignore_errors=True)
    assert source_text.cache_info().currsize == 0, "the parent rendered: its children would not"
    gate, hold = os.pipe()
    answer, tell = os.pipe()
    children = []
    for n in range(processes):
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.close(hold)
                os.read(gate, 1)  # returns when the parent closes its end: for all of them at once
                mine = specs[n % count :] + specs[: n % count]  # half of them begin with the same, the others do not
                made = []
                for spec in mine if n % 2 else specs:
                    mlp = mlpdsl.compile(spec)
                    made.append(workers.generate(spec))
                os.write(tell, (json.dumps(made) + "\\n").encode())  # below PIPE_BUF, so in one piece
                status = 0
            finally:
                os._exit(status)
        children.append(pid)
    os.close(gate); os.close(hold); os.close(tell)
    told = b""
    while chunk := os.read(answer, 65536):
        told += chunk
    os.close(answer)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    files = sorted(p.name for p in root.rglob("*") if p.is_file())
    print(json.dumps([statuses, [json.loads(line) for line in told.splitlines()], files]))
"""


def test_processes_that_start_together_agree(root: Path, figures: Figures) -> None:
    """16 processes compile and generate 8 specs each, from a barrier, into an empty cache."""
    processes, count, many = 16, 8, rounds(2, 25)
    stdout, stderr = run_script(
        BARRIER,
        root,
        timeout=120 + 30 * many,
        MLPDSL_CACHE_DIR=str(root),
        MLPDSL_TARGET="sm_90",
        MLPDSL_TEST_BARRIER=json.dumps([processes, count, many]),
    )
    assert stderr == ""
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert len(lines) == many
    shas: dict[str, set[str]] = {}
    for statuses, answers, files in lines:
        assert statuses == [0] * processes
        assert len(answers) == processes
        for answer in answers:
            assert len(answer) == count
            for key, sha, right in answer:
                assert right, "the file did not hold the text"
                shas.setdefault(key, set()).add(sha)
        assert files == ["kernel.py"] * count + ["manifest.json"] * count
    assert len(shas) == count
    assert {len(s) for s in shas.values()} == {1}
    texts = processes * count * many
    figures.note("barrier", processes=processes, specs=count, rounds=many, texts=texts, errors=0, shas_per_key=1)


FORK = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads about, which is the point
import threading, torch, triton, mlpdsl
from mlpdsl.dispatch import runner
from tests.faults import workers
device = torch.device("cuda")
def use(spec):
    key, sha, right = workers.generate(spec)
    module = runner(spec.to_json(), device).module
    assert right and callable(module.forward) and module is runner(spec.to_json(), device).module
    return key, sha
specs = workers.specs(8)
before = [use(specs[0]), use(specs[1])]  # used already, and in use by a thread while it forks
stop = threading.Event()
thread = threading.Thread(target=lambda: [use(s) for s in workers.specs(200, 50) if not stop.is_set()])
thread.start()
children = []
for n in range(8):
    if (pid := os.fork()) == 0:
        status = 1
        try:
            signal.alarm(100)
            made = [use(s) for s in specs[n:] + specs[:n]]
            assert set(before) <= set(made)
            status = 0 if len(set(made)) == 8 else 2
        finally:
            os._exit(status)
    children.append(pid)
statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
stop.set()
thread.join()
print(json.dumps(statuses))
"""


@pytest.mark.skipif(INTERPRETING, reason="needs Triton's compile mode")
def test_forked_processes(root: Path, figures: Figures) -> None:
    many = rounds(1, 8)
    for _ in range(many):
        stdout, stderr = run_script(FORK, root, timeout=180, MLPDSL_CACHE_DIR=str(root), MLPDSL_TARGET="sm_90")
        assert json.loads(stdout) == [0] * 8
        assert stderr == ""
        assert litter(root) == []
    figures.note("fork", processes=8, specs=8, rounds=many, errors=0)


def test_spawned_processes(root: Path, figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 processes and 8 specs, each spec by all of them; specs travel by pickle."""
    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(root))
    specs = workers.specs(8)
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        made = pool.map(workers.generate, specs * 8, chunksize=1)
    assert all(right for _, _, right in made)
    assert len({key for key, _, _ in made}) == len({(key, sha) for key, sha, _ in made}) == 8
    assert litter(root) == []
    figures.note("spawn", processes=8, specs=8, texts=len(made), errors=0)


@pytest.mark.skipif(INTERPRETING, reason="needs Triton's compile mode")
def test_threads_share_one_module_a_spec(
    root: Path, figures: Figures, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """32 threads ask for the kernels of 8 specs as a call does; what they get is one object a spec."""
    pytest.importorskip("triton")
    torch = pytest.importorskip("torch")
    from mlpdsl import dispatch

    monkeypatch.setenv("MLPDSL_CACHE_DIR", str(root))
    monkeypatch.setenv("MLPDSL_TARGET", "sm_90")
    dispatch.target_of.cache_clear()
    many = rounds(1, 12)
    for n in range(many):
        specs = workers.specs(8, first=300 + 8 * n)
        monkeypatch.setattr(loader, "_loaded", {})
        monkeypatch.setattr(dispatch, "_runners", {})
        dispatch._load.cache_clear()
        barrier = threading.Barrier(32)

        def work(worker: int, specs: list = specs, barrier: threading.Barrier = barrier) -> list[tuple[str, int]]:
            barrier.wait()
            turned = specs[worker % 8 :] + specs[: worker % 8]
            return sorted((s.to_json(), id(dispatch.runner(s.to_json(), torch.device("cuda")).module)) for s in turned)

        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            found = list(pool.map(work, range(32)))
        assert all(f == found[0] for f in found), "threads got different modules"
        assert len({module for _, module in found[0]}) == 8
    assert litter(root) == []
    assert warnings_in(caplog) == []
    dispatch._load.cache_clear()
    dispatch.target_of.cache_clear()
    figures.note("threads", threads=32, specs=8, rounds=many, modules_per_spec=1)
