"""Specs that somebody hostile would write, and what they become: a typed error, or source that passes an allow-list.

`main` runs in a process of its own: it hangs an audit hook on the interpreter, which cannot be taken off again.
"""

from __future__ import annotations

import json
import math
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlpdsl import MLPSpec, generate
from mlpdsl.codegen.expr.graph import ARITY
from mlpdsl.errors import MLPError
from mlpdsl.function import Function
from mlpdsl.names import ACTIVATIONS, ALIASES
from mlpdsl.target import TARGETS
from tests.faults.allowed import AllowList, Watch

BACKENDS = {name: "triton" if target.kind in ("cuda", "hip") else "pallas" for name, target in TARGETS.items()}
"""Who writes for each target."""

SECONDS = 20
"""For one spec; a machine shared by many is slow, and what hangs does so for good."""

# hostile parts

CODE = "__import__('os').system('touch mlpdsl-pwned')"
WORDS = (
    "", " ", "\n", "a\nb", "\r\n", "\x00", "a\x00b", "'", '"', '"""', "'''", "\\", "\\N{DIGIT ONE}", "{", "}", "{{ 7 * 7 }}",
    "{{ module }}", "{% include 'x' %}", "{% raw %}", "{# #}", "{0.__class__}", "%s", "$(id)", "`id`", "../../x", "/etc/passwd",
    "..", CODE, "eval(x)", "lambda: 0", "# x", "x # y", '"""\nimport os\n"""', "é", "ｘ", "Ω", "\u202e", "\u2028", "\ud800",
    "\U0001f40d", "x" * 70, "x" * 5000, "silu\n", "SiLU", " silu", "silu\u200b", "residual ", "None", "True", "nan", "inf", "1",
    "-1", "x.__class__", "tl.exp", "import os", "ſilu", "$x", "<script>", "x;y", "x,y", "x=1", "*x", "**x", "@x", "print",
    "float32; import os",
)  # fmt: skip
NAMES = (
    "acc", "M", "N", "K", "rows", "cols", "inside", "tl", "torch", "triton", "launch", "launch_hidden", "forward", "backward",
    "finish", "activate", "finish_grad", "operand0", "operand0_ptr", "t0", "t1", "f0", "x", "gate", "up", "grad", "tile", "out",
    "weight", "hidden", "self", "cls", "spec", "backend", "print", "eval", "exec", "open", "getattr", "type", "object", "range",
    "len", "_", "__", "__class__", "__init__", "__builtins__", "_x", "def", "None", "True", "lambda", "import", "async", "match",
    "PLANES", "BLOCK_M", "out_desc", "residual", "scale", "layer_scale", "gamma", "config", "pick", "needs", "args", "kwargs",
    "a" * 64, "a" * 65, "é", "ｘ", "1a", "a-b", "a b", "", "exp", "sigmoid", "where", "libdevice", "mlpdsl",
)  # fmt: skip
NUMBERS = (
    "0", "1", "-0.0", "1.5", "0.1", "2.5e-3", "1e30", "1e-45", "3.5e38", "1e308", "1e309", "5e-324", "1e999", "-1e999", "nan",
    "inf", "0x10", "1_000", "1j", "True", "None", "10" * 200, "9" * 5000, "00", "1.", ".5", "1e", "0b1", "'1'", "...", "b'1'",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**30, 2**30 + 1, 2**63, 10**400, -(10**20), 1.0, 1.5, math.nan, math.inf, -math.inf, 1e308, "",
    "64", [], {}, [64], [64, 64], [[64]], {"dims": 1}, [None], ["64", "64"], [True, True], [64.0, 64], list(range(1, 300)),
    {"expr": None}, {"expr": "x"}, {"expr": "x", "expr2": "x"}, {"": ""}, [[[[[[]]]]]],
)  # fmt: skip
BROKEN = (
    "({e}).__class__", "{e}; import os", "exec({e})", f"{CODE}", "lambda: {e}", "[{e}][0]", "{e} if 1 else 0", "{{{{ {e} }}}}",
    "{e}\n", "{e} # \n", "{e}\n{e}", "t1 = {e}; t1", "t1 = {e}; t1 = t1; t1", "x = {e}; x", "{e} ** 2", "{e} // 2", "'{e}'",
    '"""{e}"""', "{e} @ {e}", "f'{{{e}}}'", "(y := {e})", "{e}\x00", "sigmoid({e}, {e})", "sigmoid()", "sigmoid(*[{e}])",
    "sigmoid(x={e})", "where(x, x, x)", "le({e}, 0.0)", "tl.exp({e})", "x.exp()", "unknown({e})", "-" * 200 + "{e}",
    "(" * 60 + "{e}" + ")" * 60, "(" * 300 + "{e}" + ")" * 300, "{e}" + " + {e}" * 40, "y = {e}", "import os", "def f(): pass",
    "", " ", "{e},", "not {e}", "{e} < 1", "{e} and {e}", "~{e}", "+{e}",
    "t1 = {e}; t2 = t1 * t1; t3 = t2 * t2; t4 = t3 * t3; t5 = t4 * t4; t5", "open('x', 'w')", "getattr({e}, 'a')", "__builtins__",
)  # fmt: skip
SNIPPETS = (
    "tl.exp({x})", "{x} * tl.sigmoid({x})", "libdevice.tanh({x})", "tl.where({x} > 0.0, {x}, 0.0)", "{x} + 1.5", "tl.load({x})",
    "tl.exp", "tl.__class__", "tl.exp.__globals__", "libdevice.__dict__", "__import__('os')", "{x}.__class__",
    "tl.exp({x}); import os", "tl.exp({x})\n", "[{x}]", "lambda: {x}", "tl.inline_asm_elementwise({x})", "torch.exp({x})",
    "{x} if {x} else {x}", "'{x}'", "1e999", "tl.math.exp({x})", "tl.exp(*{x})", "tl.exp({x}, {x})",
    "libdevice.no_such_function({x})", "{{{{ {x} }}}}", "tl.static_print({x})", "launch.run({x})",
)  # fmt: skip


class Liar:
    """Claims to be anything, and raises when it is looked at."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return str

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __index__(self) -> int:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    def __hash__(self) -> int:
        raise RuntimeError("no")


class Name(str):
    """A string that says something else each time it is printed."""

    def __str__(self) -> str:
        return CODE

    def __format__(self, how: str) -> str:
        return CODE


class Mill:
    """Draws specs, valid parts mixed with hostile ones; `hostility` is how likely each part is to be one."""

    def __init__(self, seed: int, hostility: float) -> None:
        self.random, self.hostility = random.Random(seed), hostility

    def hostile(self) -> bool:
        return self.random.random() < self.hostility

    def formula(self, inputs: list[str], size: int) -> str:
        pick = self.random.choice
        if size <= 0:
            return pick(inputs) if self.random.random() < 0.8 else pick(NUMBERS[:8] if not self.hostile() else NUMBERS)
        op = pick((*sorted(ARITY), "add", "mul", "sigmoid", "tanh", "sub"))
        if op in ("add", "sub", "mul", "div"):
            left, right = (self.formula(inputs, size - 1 - self.random.randrange(2)) for _ in range(2))
            return f"({left} {dict(add='+', sub='-', mul='*', div='/')[op]} {right})"
        if op in ("lt", "le", "gt", "ge", "eq", "ne", "both", "either", "invert") and not self.hostile():
            op = "where"
        if op == "where" and not self.hostile():
            return f"where(gt({self.formula(inputs, size - 2)}, 0.5), {self.formula(inputs, size - 2)}, {self.formula(inputs, 0)})"
        return f"{op}({', '.join(self.formula(inputs, size - 1 - self.random.randrange(3)) for _ in range(ARITY[op]))})"

    def text(self, inputs: list[str]) -> Any:
        if self.hostile() and self.hostile():
            return self.random.choice((*WORDS, *VALUES))
        text = self.formula(inputs, self.random.choice((1, 1, 2, 2, 3, 4, 6)))
        if self.hostile():
            text = self.random.choice(BROKEN).replace("{e}", text).replace("{{", "{").replace("}}", "}")
        return text

    def function(self, inputs: list[str], operands: list[list[str]] | None) -> Any:
        content: dict[str, Any] = {"expr": self.text(inputs)}
        if operands is not None:
            content["operands"] = operands
        every = inputs if operands is not None or len(inputs) == 2 else ["x"]
        if len(inputs) == 2 or self.random.random() < 0.3:
            content["grads"] = [self.text(inputs) for _ in every]
        if self.random.random() < 0.15:
            filled = [self.random.choice(SNIPPETS[: 5 if not self.hostile() else None]) for _ in range(1 + len(every))]
            content["snippets"] = {"triton": [t.replace("{x}", self.random.choice(inputs)) for t in filled]}
        if self.hostile() and self.hostile():
            content[self.random.choice((*WORDS, "inputs", "kinds", "name"))] = self.random.choice(VALUES)
        return content

    def name(self) -> Any:
        return self.random.choice((*WORDS, *VALUES[:12]) if self.hostile() and self.hostile() else NAMES)

    def epilogue(self) -> Any:
        if self.random.random() < 0.4:
            return self.random.choice(
                ("residual", "layer_scale", "scale", "gelu", *WORDS) if self.hostile() else ("residual", "scale", "tanh")
            )
        pairs = [[self.name(), self.random.choice(("tile", "column", "row", "scalar"))] for _ in range(self.random.randrange(4))]
        if self.hostile() and pairs:
            pairs[0] = self.random.choice((pairs[-1], [], ["a"], ["a", "b"], ["a", "tile", "c"], None, "ab"))
        names = [p[0] for p in pairs if isinstance(p, list) and p and isinstance(p[0], str) and p[0].isidentifier()]
        return self.function(["tile", *names], pairs)

    def fields(self) -> dict[str, Any]:
        pick = self.random.choice
        gated = self.random.random() < 0.4
        widths = [pick((1, 2, 7, 16, 64, 100, 4096)) for _ in range(3 if gated else pick((2, 3, 3, 4, 5)))]
        drawn: dict[str, Any] = {"dims": widths, "gated": gated, "bias": pick((False, True))}
        drawn["dtype"] = pick(("float32", "bfloat16", "float16"))
        drawn["activation"] = "identity" if len(widths) == 2 else pick((*ACTIVATIONS, *ALIASES))
        if len(widths) > 2 and self.random.random() < 0.6:
            drawn["activation"] = self.function(pick((["x"], ["gate", "up"])) if gated else ["x"], None)
        drawn["epilogue"] = [self.epilogue() for _ in range(pick((0, 0, 1, 1, 2, 3)))]
        if drawn["dtype"] == "float32" and self.random.random() < 0.2:
            drawn["precision"] = pick(("tf32", "tf32x3"))
        for field in (*drawn, "layout", "precision"):
            if self.hostile() and self.hostile() and self.hostile():
                drawn[field] = pick((*WORDS, *VALUES))
        return drawn

    def json(self) -> str | bytes:
        content = self.fields()
        if self.hostile() and self.hostile():
            content[self.random.choice((*WORDS, "schema_version", "short_name", "_json", "__class__"))] = self.random.choice(VALUES)
        text = json.dumps(content, ensure_ascii=self.random.random() < 0.5)
        if self.hostile() and self.hostile():
            at = self.random.randrange(len(text))
            extra = self.random.choice((*WORDS, "[" * 100_000, '"dims": [1, 1],', "NaN", "1e999", "}", '{"a":'))
            text = self.random.choice((text[:at], text[:at] + extra + text[at:], extra, text + extra, "\ufeff" + text))
        data = text.encode("utf-8", "surrogatepass")
        return (
            self.random.choice((data[:-1] + b"\xff}", data.replace(b"a", b"\x80"))) if self.hostile() and self.hostile() else text
        )

    def declared(self) -> dict[str, Any]:
        """For the constructor, which takes objects."""
        content = self.fields()
        loop: list[Any] = [64]
        loop.append(loop)
        objects: tuple[Any, ...] = (
            Liar(), Name("silu"), Name("residual"), loop, object(), b"silu", {1: 2}, {"expr": Liar()}, {1, 2}, iter([1]), Ellipsis,
            int, type, range(3), (64, Liar()), [Name("a")], complex(1), 10**5000,
            Function(("x",), (), CODE, ("1.0",)), Function(("x",), (), "", (), (("triton", (CODE, "1.0")),)),
            Function((1,), (), 5, None), Function(("tile", 'g"""'), ("column",), "tile", ("1.0", "0.0")),
        )  # fmt: skip
        for field in list(content):
            if self.hostile() and self.hostile():
                content[field] = self.random.choice(objects)
        return content


LATE = (
    '{"dims": [8, 8, 8], "activation": {"expr": "x * sigmoid(x)", "snippets": {"triton": ["tl.exp(x)", "libdevice.tanh(x)"]}}}',
    '{"dims": [8, 8, 8], "gated": true, "activation": {"expr": "gate * up"}, "epilogue": ["residual", {"expr": "tanh(tile)"}]}',
)


def outcome(declare: Callable[[], MLPSpec], target: str, allowed: AllowList) -> tuple[str, list[str]]:
    """What became of one spec, and what is wrong with that."""
    try:
        spec = declare()
        made = generate(spec, target=target, backend=BACKENDS[target])
    except MLPError as error:
        str(error).encode("utf-8", "surrogatepass")
        return type(error).__name__, []
    found = allowed.objections(made.text)
    if MLPSpec.from_json(spec.to_json()) != spec:
        found.append("its JSON form is another spec")
    return "source", found


def main(count: int, root: Path, first: int = 0) -> dict[str, Any]:
    """Draw and try `count` specs, from the seed `first` on; say how many became what, and everything that went wrong."""
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    allowed, watch = AllowList(), Watch(root)
    for text in LATE:
        for target in ("sm_90", "cpu"):
            outcome(lambda text=text: MLPSpec.from_json(text), target, allowed)  # what is imported late is imported now
    counted: Counter[str] = Counter()
    wrong: list[str] = []
    slowest = 0.0

    def late(_signal: int, _frame: object) -> None:
        raise BaseException(f"took {SECONDS} s")  # nobody catches that on the way

    signal.signal(signal.SIGALRM, late)
    for seed in range(first, first + count):
        mill = Mill(seed, hostility=(0.0, 0.1, 0.3, 0.6)[seed % 4])
        kind = ("json", "constructor")[seed // 4 % 2]
        target = mill.random.choice(sorted(BACKENDS))
        if kind == "json":
            text = mill.json()
            declare = lambda text=text: MLPSpec.from_json(text)  # noqa: E731
        else:
            content = mill.declared()
            declare = lambda content=content: MLPSpec(**content)  # noqa: E731
        start = time.perf_counter()
        signal.alarm(SECONDS)
        watch.on = True
        try:
            became, found = outcome(declare, target, allowed)
        except BaseException as error:
            became, found = "untyped", [f"{type(error).__name__}: {error!s:.200}"]
        watch.on = False
        signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - start)
        counted[became] += 1
        found += watch.seen
        watch.seen.clear()
        wrong += [f"seed {seed} ({kind}, {target}): {f}" for f in found]
    return {"outcomes": dict(sorted(counted.items())), "wrong": wrong, "slowest_ms": round(slowest * 1e3)}
