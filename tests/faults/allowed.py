"""What a generated file may be made of, and what the interpreter may be asked to do on the way there."""

from __future__ import annotations

import ast
import math
import os
import re
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

from mlpdsl.codegen.expr.torch_code import functions

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"

_ELEMENTARY = {"abs", "floor", "exp", "log", "sqrt", "sin", "cos", "erf", "where", "maximum", "minimum", "zeros_like"}
_SNIPPET = {"sigmoid", "tanh", "libdevice", "math"}
_OPERANDS = ("operand0", "residual", "layer_scale", "scale")
_FORMS = (
    "{}", "{}_ptr", "{}_desc", "{}_tile", "{}_row", "{}_rows", "{}_column", "{}_row_ptr", "{}_rows_ptr", "{}_sum", "{}_grad",
    "{}_ref", "{}_grad_ptr", "{}_grad_desc", "{}_grad_tile", "stride_{}_m", "stride_{}_n", "stride_{}_grad_m", "stride_{}_grad_n",
)  # fmt: skip
_IMPORTS = {"import torch", "import triton", "import triton.language as tl", "from mlpdsl import launch"}
_IMPORTS |= {
    "import functools", "import jax.numpy as jnp", "from jax import lax", "from jax.experimental import pallas as pl",
    "from jax.experimental.pallas import tpu as pltpu", "from jax.experimental.pallas import mosaic_gpu as plgpu",
    "SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))", "from mlpdsl.jax.launch import like",
    "ORDER = pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary'))",
}  # fmt: skip
_LIBDEVICE = "from triton.language.extra import libdevice"


def numbered(name: str) -> str:
    return re.sub(r"\d+", "0", name)


class AllowList:
    """Everything that the reviewed golden files are made of, by kind; numbers inside names do not count."""

    def __init__(self) -> None:
        self.nodes: set[str] = {"BitOr", "Invert", "NotEq", "Sub", "Or"}
        self.names: set[str] = {"libdevice", *(form.format(operand) for operand in _OPERANDS for form in _FORMS)}
        self.attributes = _ELEMENTARY | _SNIPPET
        self.keywords: set[str | None] = set()
        self.texts: set[str] = {"tf32x3"}
        for file in sorted(GOLDENS.iterdir()):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            documents = _documents(tree)
            for node in ast.walk(tree):
                self.nodes.add(type(node).__name__)
                for name in _named(node):
                    self.names.add(numbered(name))
                if isinstance(node, ast.Attribute):
                    self.attributes.add(node.attr)
                if isinstance(node, ast.keyword):
                    self.keywords.add(node.arg)
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
                    self.texts.add(node.value)
        banned = {"eval", "exec", "open", "getattr", "setattr", "compile", "globals", "vars", "type", "os", "sys"}
        assert not banned & self.names and not any(a.startswith("_") for a in self.attributes)

    def objections(self, text: str) -> list[str]:
        """What of a generated file is on no list; empty where all is."""
        try:
            tree = ast.parse(text)
            compile(text, "generated", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return [f"no Python: {error!r}"]
        found = []
        documents = _documents(tree)
        for statement in tree.body:
            plain = isinstance(statement, ast.Assign) and not any(isinstance(n, ast.Call) for n in ast.walk(statement))
            document = isinstance(statement, ast.Expr) and id(statement.value) in documents
            if not (
                isinstance(statement, ast.FunctionDef) or ast.unparse(statement) in _IMPORTS | {_LIBDEVICE} or plain or document
            ):
                found.append(f"statement {ast.unparse(statement)[:80]!r}")
        for node in ast.walk(tree):
            kind = type(node).__name__
            if kind not in self.nodes:
                found.append(f"node {kind}")
            found += [f"name {name!r}" for name in _named(node) if numbered(name) not in self.names]
            if isinstance(node, ast.Attribute) and not self._attribute(node):
                found.append(f"attribute {node.attr!r}")
            if isinstance(node, ast.keyword) and node.arg not in self.keywords:
                found.append(f"keyword {node.arg!r}")
            if isinstance(node, ast.FunctionDef):
                found += [f"decorator {ast.unparse(d)!r}" for d in node.decorator_list if not _DECORATOR.fullmatch(ast.unparse(d))]
            if isinstance(node, ast.Constant):
                found += self._constant(node, id(node) in documents)
        return found

    def _attribute(self, node: ast.Attribute) -> bool:
        external = isinstance(node.value, ast.Name) and node.value.id == "libdevice"
        return node.attr in self.attributes or (external and re.fullmatch(r"[a-z][a-z0-9_]*", node.attr) is not None)

    def _constant(self, node: ast.Constant, document: bool) -> list[str]:
        value = node.value
        if isinstance(value, str):
            return [] if document or value in self.texts else [f"text {value[:60]!r}"]
        if isinstance(value, bool | None | types.EllipsisType) or (isinstance(value, int | float) and math.isfinite(value)):
            return []
        return [f"constant {value!r:.60}"]


_DECORATOR = re.compile(r"triton\.jit(\(do_not_specialize=\[('\w+'(, )?)+\]\))?|pl\.when\(step == (0|steps - 1)\)")


def _documents(tree: ast.Module) -> set[int]:
    """The strings that are documentation of the module or of a function."""
    owners = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.FunctionDef)]
    firsts = [n.body[0] for n in owners if n.body]
    return {
        id(f.value)
        for f in firsts
        if isinstance(f, ast.Expr) and isinstance(f.value, ast.Constant) and isinstance(f.value.value, str)
    }


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.arg):
        return [node.arg]
    return [node.name] if isinstance(node, ast.FunctionDef) else []


# what the interpreter was asked to do


@cache
def allow_list() -> AllowList:
    """One for all who ask: reading every golden file takes a second or two."""
    return AllowList()


class Watch:
    """An audit hook: what is written outside the root, what is run that no file holds, what is started."""

    OWN = re.compile(
        r"v1|kernel\.py|manifest\.json|\.(kernel\.py|manifest\.json)\.\d+-[0-9a-f]{16}\.tmp|[A-Za-z0-9_.-]+-[0-9a-f]{16}"
    )
    STARTS = (
        "subprocess.Popen",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "socket.connect",
        "ctypes.dlopen",
        "shutil.rmtree",
    )

    def __init__(self, root: Path) -> None:
        self.root, self.on, self.seen = str(root), False, []
        self.printed = {f"f_{op}" for op in functions()} | {"torch", "zeros_like", "full_like"}
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) or (mode or "r")[0] in "wax+"
            if writes and not self._ours(path):
                self.seen.append(f"open {path!r}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"):
            paths = [a for a in args if isinstance(a, str | bytes)]
            self.seen += [f"{event} {p!r}" for p in paths if not self._ours(p)]
        elif event in self.STARTS:
            self.seen.append(f"{event} {args!r:.80}")
        elif event == "exec" and isinstance(args[0], types.CodeType):
            self._runs(args[0])

    def _ours(self, path: Any) -> bool:
        if not isinstance(path, str):
            return False
        return path == self.root or path.startswith(self.root + os.sep) or self.OWN.fullmatch(path) is not None

    def _runs(self, code: types.CodeType) -> None:
        if code.co_filename == "<mlpdsl formula>":  # printed for torch: of checked words
            for inner in (c for c in code.co_consts if isinstance(c, types.CodeType)):
                self.seen += [f"formula names {n!r}" for n in inner.co_names if n not in self.printed]
                texts = [c for c in inner.co_consts if not isinstance(c, int | float | None)]
                self.seen += [f"formula holds {t!r:.60}" for t in texts]
        elif not os.path.exists(code.co_filename) and not code.co_filename.startswith("<frozen"):
            self.seen.append(f"exec {code.co_filename!r} {code.co_names!r:.80}")
