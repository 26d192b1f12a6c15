"""From a plan to what the Pallas templates print: expressions in `jax.numpy`, and the names of every stage's tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlpdsl.codegen.blocks import GPU_ROWS
from mlpdsl.codegen.plan import Linear, Plan

from .functions import Function, Language, OperandView, device_functions, operand_views

TEMPLATE = "pallas/module.py.jinja"

_JAX = Language(
    calls={
        "abs": "jnp.abs({})", "floor": "jnp.floor({})", "exp": "jnp.exp({})", "log": "jnp.log({})", "sqrt": "jnp.sqrt({})",
        "sin": "jnp.sin({})", "cos": "jnp.cos({})", "erf": "lax.erf({})", "where": "jnp.where({}, {}, {})",
        "max": "jnp.maximum({}, {})", "min": "jnp.minimum({}, {})",
    },
    zeros_like="jnp.zeros_like({})",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One linear: its place in forward order, and its parameters as the entry points write them."""

    index: int
    linear: Linear

    @property
    def kept(self) -> str:
        """The slice of what forward saved that holds this stage's preactivations."""
        return f"{self.index * self.linear.planes}:{(self.index + 1) * self.linear.planes}"

    @property
    def weights(self) -> str:
        return _tuple(f"params[{i}]" for i in self.linear.weights)

    @property
    def biases(self) -> str:
        return _tuple(f"params[{i}]" for i in self.linear.biases)


def _tuple(items: Iterable[str]) -> str:
    texts = list(items)
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"


@dataclass(frozen=True)
class Module:
    """Everything the templates read."""

    plan: Plan
    functions: tuple[Function, ...]
    operands: tuple[OperandView, ...]
    stages: tuple[Stage, ...]

    @property
    def parameters(self) -> int:
        """How many parameters there are."""
        return sum(len(stage.linear.weights) + len(stage.linear.biases) for stage in self.stages)

    @property
    def indexes_zero(self) -> bool:
        """Whether some block is the first on an axis whatever the tile: of a bias, or of an operand smaller than a tile."""
        return self.plan.bias or any(o.kind != "tile" for o in self.operands)

    @property
    def pads(self) -> bool:
        """Whether kernels are for a GPU, and take whole tiles of rows alone."""
        return self.plan.target.kind == "cuda"

    @property
    def rows(self) -> int:
        """Rows that kernels for a GPU take together."""
        return GPU_ROWS

    @property
    def loads_columns(self) -> bool:
        return self.plan.bias or any(o.kind == "column" for o in self.operands)

    @property
    def loads_rows(self) -> bool:
        return any(o.kind == "row" for o in self.operands)

    @property
    def keeps_tile(self) -> bool:
        """Whether backward reads the output before its epilogue."""
        return self.plan.epilogue.tile_needed

    @property
    def epilogue_grad(self) -> bool:
        """Whether the epilogue changes the gradient, or has gradients of its own to give."""
        return not self.plan.epilogue.passes_grad_through or any(o.grad == "own" for o in self.operands)


def emit(plan: Plan) -> Module:
    """The Pallas view of a plan."""
    operands = operand_views(plan)
    return Module(
        plan=plan,
        functions=tuple(device_functions(plan, operands, _JAX)),
        operands=operands,
        stages=tuple(Stage(i, linear) for i, linear in enumerate(plan.linears)),
    )
