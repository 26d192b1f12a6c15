"""The loader: what runs, and what Triton reads, is the text in memory and never the file."""

from __future__ import annotations

import inspect
import linecache
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mlpdsl import loader
from mlpdsl.cache import SourceCache, digest

REPOSITORY = Path(loader.__file__).parents[1]
PLAIN = "def f(x):\n    return x + 1\n"
KEY = digest("plain")
needs_compiler = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton's compile mode")


@pytest.fixture(autouse=True)
def _forget_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(loader, "_loaded", {})
    yield
    for name in [n for n in sys.modules if n.startswith("mlpdsl_generated_")]:
        del sys.modules[name]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where there is no file, nor a directory for one."""
    return tmp_path / "v1" / "mlp" / "kernel.py"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# one module


def test_the_module(path: Path) -> None:
    module = loader.load(path, PLAIN, KEY)
    assert module.f(1) == 2
    assert module.__name__ == module.f.__module__ == f"mlpdsl_generated_{KEY[:16]}"
    assert module.__file__ == module.f.__code__.co_filename == str(path)
    assert sys.modules[module.__name__] is module


def test_it_runs_once_a_key_and_path(path: Path) -> None:
    first = loader.load(path, PLAIN, KEY)
    assert loader.load(str(path), PLAIN, KEY) is first
    assert loader.load(path.with_name("other.py"), PLAIN, KEY) is not first
    assert loader.load(path.with_name("third.py"), PLAIN, digest("other")) is not first
    assert loader.load(path, PLAIN, KEY) is first


def test_a_changed_cache_directory_is_another_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, modules = SourceCache(), []
    for name in ("one", "two"):
        monkeypatch.setenv("MLPDSL_CACHE_DIR", str(tmp_path / name))
        modules.append(loader.load(cache.publish("mlp", KEY, PLAIN, {}), PLAIN, KEY))
    assert [Path(m.__file__ or "").parents[2].name for m in modules] == ["one", "two"]


def test_a_key_that_stands_for_two_texts_is_an_error(path: Path) -> None:
    loader.load(path, PLAIN, KEY)
    with pytest.raises(RuntimeError, match="two different texts"):
        loader.load(path, PLAIN + "#", KEY)


def test_the_text_is_compiled_for_itself(path: Path) -> None:
    """This file's ``from __future__ import annotations`` must not leak into it."""
    assert loader.load(path, "def f(x: int): pass\n", KEY).f.__annotations__ == {"x": int}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("def f(:\n", SyntaxError),
        ("x = 1\n1 / 0\n", ZeroDivisionError),
        ("raise KeyboardInterrupt\n", KeyboardInterrupt),
        ("a\0b", (ValueError, SyntaxError)),
    ],
)
def test_nothing_stays_of_a_text_that_raises(path: Path, text: str, error: type[BaseException]) -> None:
    modules, lines = dict(sys.modules), dict(linecache.cache)
    with pytest.raises(error):
        loader.load(path, text, KEY)
    assert {n for n in sys.modules if n.startswith("mlpdsl_generated")} == {n for n in modules if n.startswith("mlpdsl_generated")}
    assert (str(path) in linecache.cache) == (str(path) in lines)
    assert loader.load(path, PLAIN, KEY).f(1) == 2


def test_a_text_that_raises_does_not_displace_its_namesake(path: Path) -> None:
    first = loader.load(path, PLAIN, KEY)
    with pytest.raises(ZeroDivisionError):
        loader.load(path.with_name("other.py"), "1 / 0", KEY)
    assert sys.modules[first.__name__] is first


def test_no_file_is_read_or_written(path: Path) -> None:
    write(path, "raise SystemExit('a foreign byte was executed')\n")
    assert loader.load(path, PLAIN, KEY).f(1) == 2
    assert [p.name for p in path.parent.iterdir()] == ["kernel.py"]  # no __pycache__


def test_generated_source_may_load_generated_source(path: Path) -> None:
    inner = f"from mlpdsl import loader\nG = loader.load({str(path) + '2'!r}, 'X = 5', {digest('inner')!r})\n"
    assert loader.load(path, inner, KEY).G.X == 5


def test_threads_share_one_module(path: Path) -> None:
    barrier, found = threading.Barrier(32), []

    def work() -> None:
        barrier.wait()
        found.append(loader.load(path, "import time\ntime.sleep(0.05)\n" + PLAIN, KEY))

    threads = [threading.Thread(target=work) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    assert len({id(module) for module in found}) == 1
    assert found[0].f(1) == 2  # nobody got it half done


FORK = """
import os, sys, threading, signal, warnings
from mlpdsl import loader
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads about, which is the point
signal.alarm(20)
done = loader.load("/nowhere/done.py", "X = 1", "d" * 16)
sys.started, sys.go_on = threading.Event(), threading.Event()
slow = "import sys\\nX = 2\\nsys.started.set()\\nsys.go_on.wait()\\nY = 3\\n"
thread = threading.Thread(target=loader.load, args=("/nowhere/slow.py", slow, "5" * 16))
thread.start()
sys.started.wait()  # the thread is in the middle of its text, and holds the lock
if (pid := os.fork()) == 0:
    status = 1
    try:
        signal.alarm(10)
        assert loader.load("/nowhere/done.py", "X = 1", "d" * 16) is done
        assert "mlpdsl_generated_" + "5" * 16 not in sys.modules, "half a module"
        sys.go_on = threading.Event(); sys.go_on.set()
        assert loader.load("/nowhere/slow.py", slow, "5" * 16).Y == 3
        status = 0
    finally:
        os._exit(status)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
sys.go_on.set()
thread.join()
assert loader.load("/nowhere/slow.py", slow, "5" * 16).Y == 3
sys.exit(status)
"""


def test_fork_while_another_thread_loads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# what inspect sees


@pytest.mark.parametrize("root", [None, "root"])
def test_inspect_works_without_a_file(tmp_path: Path, root: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLPDSL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/")
    where = SourceCache(None if root is None else tmp_path / root).path("mlp", KEY)
    assert not where.exists()
    module = loader.load(where, "import inspect\n" + PLAIN + "SEEN = inspect.getsource(f)\n", KEY)
    assert PLAIN == module.SEEN
    linecache.checkcache()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()  # inspect calls os.path.abspath, which fails here for a relative path
    assert inspect.getsource(module.f) == PLAIN
    assert inspect.getsourcelines(module.f)[1] == 2


@pytest.mark.parametrize("text", [PLAIN, "# \x0c\x1c\u2028\x85\r\n\n" + PLAIN, "\r\r" + PLAIN, PLAIN.rstrip("\n")])
def test_lines_are_counted_as_the_compiler_does(path: Path, text: str) -> None:
    assert inspect.getsource(loader.load(path, text, KEY).f) == PLAIN


def test_tracebacks_show_the_generated_line(path: Path) -> None:
    with pytest.raises(TypeError) as caught:
        loader.load(path, PLAIN, KEY).f("a")
    assert "return x + 1" in "".join(traceback.format_exception(caught.value))


def test_clearing_linecache_is_made_good_by_the_next_load(path: Path) -> None:
    module = loader.load(path, PLAIN, KEY)
    linecache.clearcache()
    with pytest.raises(OSError, match="source"):
        inspect.getsource(module.f)
    assert inspect.getsource(loader.load(path, PLAIN, KEY).f) == PLAIN


# what Triton sees

KERNEL = """\
import triton
import triton.language as tl


@triton.jit
def add(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1.0, mask=i < n)


import sys
sys.mlpdsl_test_hook()


@triton.jit
def later(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) + 1.0, mask=i < n)
"""
EVIL = KERNEL.replace("+ 1.0", "- 1.0")
assert len(EVIL) == len(KERNEL)
assert EVIL != KERNEL


def tamper(path: Path, *, new_time: bool = False) -> None:
    """Put the other kernel in the file: of equal size and, unless ``new_time``, equal modification time."""
    status = path.stat() if path.exists() else None
    write(path, EVIL)
    if status is not None:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + new_time * 10**9))


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


MEANWHILE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "tampered": tamper,
    "tampered, new time": lambda path: tamper(path, new_time=True),
    "tampered, checked": lambda path: (tamper(path, new_time=True), linecache.checkcache()),
    "tampered, then read by a debugger": lambda path: (tamper(path), linecache.getline(str(path), 8)),
    "deleted": remove,
    "deleted, checked": lambda path: (remove(path), linecache.checkcache()),
}


def load_kernel(path: Path, before: str, during: str, load: Callable[[Path], ModuleType]) -> ModuleType:
    pytest.importorskip("triton")
    write(path, KERNEL)
    linecache.getlines(str(path))  # an entry of linecache's own is there already
    MEANWHILE[before](path)
    sys.mlpdsl_test_hook = lambda: MEANWHILE[during](path)  # type: ignore[attr-defined]
    try:
        return load(path)
    finally:
        del sys.mlpdsl_test_hook  # type: ignore[attr-defined]


@needs_compiler
@pytest.mark.parametrize("during", MEANWHILE)
@pytest.mark.parametrize("before", MEANWHILE)
def test_a_tampered_file_does_not_reach_triton(path: Path, before: str, during: str) -> None:
    module = load_kernel(path, before, during, lambda p: loader.load(p, KERNEL, KEY))
    linecache.checkcache()
    assert "+ 1.0" in module.add.src
    assert "+ 1.0" in module.later.src
    assert "+ 1.0" in inspect.getsource(module.later.fn)
    assert (module.add.starting_line_number, module.later.starting_line_number) == (5, 15)


@needs_compiler
def test_a_tampered_file_does_reach_triton_if_one_just_runs_the_text(path: Path) -> None:
    """The control: without the loader, the attack works."""

    def naive(where: Path) -> ModuleType:
        module = ModuleType("naive")
        exec(compile(KERNEL, str(where), "exec"), module.__dict__)
        return module

    module = load_kernel(path, "nothing", "tampered, checked", naive)
    assert "+ 1.0" in module.add.src
    assert "- 1.0" in module.later.src


@needs_compiler
def test_triton_compiles_from_a_path_that_does_not_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(path.parents[2] / "triton"))
    module = loader.load(path, KERNEL.replace("sys.mlpdsl_test_hook()", ""), KEY)
    source = triton.compiler.ASTSource(
        module.add, signature={"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constexprs={"BLOCK": 128}
    )
    start = time.monotonic()
    compiled = triton.compile(source, target=compiler.GPUTarget("cuda", 90, 32))
    assert "add.f32" in compiled.asm["ptx"]
    assert str(path.parent) in compiled.asm["ptx"]  # the line table names the file that a profiler will look for
    assert time.monotonic() - start < 30
    assert not path.exists()
