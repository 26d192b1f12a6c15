"""The plan: everything decided about one spec on one target, frozen, before any text is printed.

A plan speaks of linear stages, expressions and operands, never of "the two weights": a norm before the first linear, more
operands or more stages are new entries, not new branches. Tile sizes are not in it: those are a `Config`, chosen at each call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from mlpdsl.target import Target

from .expr.graph import Expr, walk


@dataclass(frozen=True)
class Operand:
    """A tensor the epilogue reads: `tile` (M, N), `column` (N,), `row` (M, 1) or `scalar`."""

    name: str
    kind: str


@dataclass(frozen=True)
class Linear:
    """One GEMM stage, x (M, width_in) times each weight (width_out, width_in) transposed.

    `weights` and `biases` are positions in the parameter list. Two weights are gate and up, computed by one product.
    """

    width_in: int
    width_out: int
    weights: tuple[int, ...]
    biases: tuple[int, ...]

    @property
    def planes(self) -> int:
        """How many products the stage computes side by side: 2 where gated, else 1."""
        return len(self.weights)


@dataclass(frozen=True)
class Hidden:
    """What stands between two linears: h = value(inputs), and `grads[i]` = d loss / d inputs[i] given `grad` = d loss / d h.

    `inputs` are ("x",) or ("gate", "up"), the preactivations with their bias; `text` is the formula as people write it.
    """

    text: str
    inputs: tuple[str, ...]
    value: Expr
    grads: tuple[Expr, ...]


@dataclass(frozen=True)
class Epilogue:
    """What is done to the output tile: y = value(tile, operands).

    `tile_grad` and `operand_grads` are the gradients given `grad` = d loss / d y. `tile_needed` says whether any of them reads
    the tile, which must then be saved. `same_as` tells, for each operand, whether its gradient is the very tensor `grad`
    ("grad") or the gradient of the tile ("tile"), so that nothing need be written for it; else it is "". `text` is the formula as
    people write it, `notes` what the users' functions in it are.
    """

    text: str
    notes: tuple[str, ...]
    entries: tuple[str, ...]
    operands: tuple[Operand, ...]
    value: Expr
    tile_grad: Expr
    operand_grads: tuple[Expr, ...]
    tile_needed: bool
    same_as: tuple[str, ...]

    @property
    def passes_grad_through(self) -> bool:
        """Whether the gradient of the tile is the gradient of the output, unchanged."""
        return self.tile_grad.op == "symbol"


@dataclass(frozen=True)
class Plan:
    """One spec on one target. `linears` are in forward order; `hidden` is None for a single linear."""

    name: str
    spec_json: str
    target: Target
    dtype: str
    precision: str
    linears: tuple[Linear, ...]
    hidden: Hidden | None
    epilogue: Epilogue

    @property
    def gated(self) -> bool:
        return self.linears[0].planes == 2

    @property
    def bias(self) -> bool:
        return bool(self.linears[0].biases)

    @property
    def bias_pass(self) -> bool:
        """Whether a pass over a product of the library's may add its biases, in every linear. In 16 bits what it would add them to
        is rounded."""
        return self.bias and self.dtype == "float32"

    @property
    def uses_libdevice(self) -> bool:
        """Whether hand-written text calls functions of libdevice."""
        hidden = (self.hidden.value, *self.hidden.grads) if self.hidden else ()
        roots = (*hidden, self.epilogue.value, self.epilogue.tile_grad, *self.epilogue.operand_grads)
        return any(node.op == "snippet" and "libdevice." in node.name for node in walk(*roots))

    @property
    def tma_reasons(self) -> list[str]:
        """Why no kernels on tensor descriptors are printed. Else empty."""
        reasons = [] if self.target.has_tma else [f"{self.target.name} has no tensor memory accelerator"]
        if self.dtype == "float32":
            reasons.append("float32 takes masked loads")
        return reasons

    def finishes(self, role: str) -> bool:
        """Whether anything follows the role's product in an epilogue."""
        return role == "output" and bool(self.epilogue.entries)

    @property
    def uses_tma(self) -> bool:
        """Whether kernels on tensor descriptors are printed beside the masked ones, for tensors that they fit."""
        return not self.tma_reasons

    @property
    def copies_reasons(self) -> list[str]:
        """Why no kernels on descriptors of copies are printed. Else empty.

        In TF32 on Hopper they are, of forward's products. There tensors take masked loads unless a config says otherwise, and then
        what fits as it lies is not copied."""
        if self.precision == "tf32" and self.target.name == "sm_90":
            return []
        return self.tma_reasons or ([] if self.ragged else ["every row of every tensor is of whole 16 bytes"])

    @property
    def copies(self) -> bool:
        """Whether they are printed for copies as well, or for those alone."""
        return not self.copies_reasons

    @property
    def ragged(self) -> bool:
        """Whether some width is no multiple of 8, so that not every tensor's rows are of whole 16 bytes, as descriptors want them
        in 16 bits."""
        return any(w % 8 for linear in self.linears for w in (linear.width_in, linear.width_out))


def products(plan: Plan, rows: int) -> Iterator[tuple[str, int, int, int, int]]:
    """Every product of a training step with so many rows of x: role, stage, and its M, N, K."""
    last = len(plan.linears) - 1
    for i, linear in enumerate(plan.linears):
        yield "output" if i == last else "hidden", i, rows, linear.width_out, linear.width_in
    for i in range(last, -1, -1):
        linear = plan.linears[i]
        if i > 0:
            yield "hidden_grad", i, rows, linear.width_in, linear.width_out
        yield "weight_grad", i, linear.width_out, linear.width_in, rows
    yield "input_grad", 0, rows, plan.linears[0].width_in, plan.linears[0].width_out


@dataclass(frozen=True)
class Config:
    """The tunables of one launch: tile sizes in elements, rows of tiles walked together, warps, pipeline stages,
    splits of K, persistent programs a multiprocessor, and how many registers a thread may take (0: as ptxas thinks best).

    `strategy` is "two_stage", a generated kernel with everything in its epilogue; "skinny", one for few rows (block_m 1: for one
    row, else padded to block_m; there `splits` are groups of warps of one program); "padded", as two_stage, on copies of what has
    rows of no whole 16 bytes; "library": torch's product, and a generated pass over its result in blocks of block_m rows and
    block_n columns (with `batched`, gate and up by one batched product in place of two; with `bias_pass`, biases of float32 are
    added by the pass, not in the product); "whole_network": every linear of a narrow
    MLP in one launch, block_m rows at a time; or "blocks", those of a Pallas kernel.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    splits: int = 1
    residency: int = 1
    registers: int = 0
    strategy: str = "two_stage"
    batched: bool = False
    bias_pass: bool = False

    def to_dict(self) -> dict[str, int | str | bool]:
        return asdict(self)
