"""From a plan to what the Triton templates print: device functions, and kernels with their arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mlpdsl.codegen import narrow
from mlpdsl.codegen.expr.graph import Expr
from mlpdsl.codegen.few_rows import granule
from mlpdsl.codegen.plan import Plan

from .functions import Function, Idiom, Language, OperandView, device_functions, operand_views
from .triton_kernels import Kernel, Stage, by_pointer, kernels, stages, strips

TEMPLATE = "triton/module.py.jinja"

_TL_DTYPE = {"float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16"}
_TRITON = Language(
    calls={
        "abs": "tl.abs({})", "floor": "tl.floor({})", "exp": "tl.exp({})", "log": "tl.log({})", "sqrt": "tl.sqrt({})",
        "sin": "tl.sin({})", "cos": "tl.cos({})", "erf": "tl.erf({})", "where": "tl.where({}, {}, {})",
        # NaN goes through, as in torch; plain tl.maximum(NaN, 0) is 0 on a GPU.
        "max": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
        "min": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    },
    zeros_like="tl.zeros_like({})",
)  # fmt: skip


def _idiom(node: Expr) -> Idiom | None:
    """What NVIDIA GPUs do in fewer instructions than Triton writes, which has to allow for what cannot be here.

    1 / (1 + q), for a q = exp(-|x|) or c·|x|, is one instruction where the quotient is seven: the sum is neither tiny nor, but at
    infinity, huge. exp(c·x·x) for c < 0 may flush what float32 holds only as a denormal; 2 to the power of it takes four less.
    """
    if node.op == "div" and node.args[0].is_const(1.0):
        total = node.args[1]
        if total.op == "add" and any(a.is_const(1.0) for a in total.args) and any(map(_small, total.args)):
            return "reciprocal({})", (total,)
    if node.op == "exp" and node.args[0].op == "mul":
        square, c = node.args[0].args
        if c.is_const() and c.value < 0.0 and square.op == "mul" and square.args[0] is square.args[1]:
            return f"tl.exp2(({{}}) * {c.value / math.log(2.0)!r})", (square,)
    return None


def _small(q: Expr) -> bool:
    """Whether q is exp(-|x|), or |x| times a positive number."""
    if q.op == "exp":
        return q.args[0].op == "neg" and q.args[0].args[0].op == "abs"
    return q.op == "mul" and q.args[0].op == "abs" and q.args[1].is_const() and q.args[1].value > 0.0


_CUDA = replace(_TRITON, idiom=_idiom)


@dataclass(frozen=True)
class Module:
    """Everything the templates read."""

    plan: Plan
    functions: tuple[Function, ...]
    kernels: tuple[Kernel, ...]
    operands: tuple[OperandView, ...]
    dtype: str
    dot: str

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The linears, as the network in one kernel names them."""
        return stages(self.plan)

    @property
    def network(self) -> bool:
        """Whether there is a kernel for all linears at once."""
        return any(k.role == "network" for k in self.kernels)

    @property
    def resident(self) -> bool:
        """Whether that kernel has all weights in shared memory."""
        return narrow.resident(self.plan)

    def kernel(self, role: str, path: str) -> Kernel:
        return next(k for k in self.kernels if (k.role, k.path) == (role, path))

    def strips(self, role: str) -> int:
        """In how many strips of columns a forward kernel finishes its accumulator."""
        return strips(self.plan, role)

    def paths(self, role: str) -> tuple[str, ...]:
        return tuple(k.path for k in self.kernels if k.role == role)

    def padded(self, role: str) -> bool:
        """Whether a role's kernel on descriptors may be chosen for tensors that they fit only as copies."""
        return self.plan.copies and "tma" in self.paths(role)

    def by_pointer(self, role: str) -> bool:
        """Whether the role's kernels on descriptors write what they give to the caller by a pointer."""
        return by_pointer(self.plan, role)

    @property
    def granule(self) -> int:
        """How many elements are 16 bytes."""
        return granule(self.plan.dtype)

    @property
    def reciprocal(self) -> bool:
        """Whether any device function calls `reciprocal`."""
        return any("reciprocal(" in line for function in self.functions for line in (*function.lines, *function.returns))

    @property
    def epilogue_grad(self) -> bool:
        """Whether the output stage needs a pass of its own in backward: gradients to change, or to sum over rows."""
        epilogue = self.plan.epilogue
        return self.plan.bias or not epilogue.passes_grad_through or any(o.grad == "own" for o in self.operands)


def emit(plan: Plan) -> Module:
    """The Triton view of a plan."""
    operands = operand_views(plan)
    return Module(
        plan=plan,
        functions=tuple(device_functions(plan, operands, _CUDA if plan.target.kind == "cuda" else _TRITON)),
        kernels=kernels(plan, operands),
        operands=operands,
        dtype=_TL_DTYPE[plan.dtype],
        dot=f', input_precision="{plan.precision}"' if plan.dtype == "float32" else "",
    )
