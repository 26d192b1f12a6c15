"""Calls to hold against the oracle: seeded tensors in poisoned memory, in any layout, and one check of what comes out.

    call = make_call(spec, (20,), seed=7, x="strided", pair="up_first")
    check_call(call)  # forward and backward by the generated kernels; raises AssertionError

A call is its recipe: the spec, a seed and a few words, which is what `repr(call)` prints. Every tensor lies in memory that is NaN
everywhere else, so that a kernel that reads beyond it gives NaN; what is allocated during the call lies between guard zones of NaN
as well, so that an element never written, or written beyond, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mlpdsl.compiled import CompiledMLP
from mlpdsl.compiled import compile as compile_spec
from mlpdsl.dispatch import library_stages
from mlpdsl.eager import reference
from mlpdsl.names import listed
from mlpdsl.spec import MLPSpec
from mlpdsl.testing import oracle
from mlpdsl.testing.memory import (
    BITS,
    GUARD,
    LAYOUTS,
    WEIGHT_LAYOUTS,
    CallError,
    Guards,
    bits,
    guarded_allocations,
    place,
    same_bits,
)

__all__ = [
    "BITS", "GPU_PATTERNS", "GUARD", "LAYOUTS", "PAIRS", "PATTERNS", "VALUES", "WEIGHT_LAYOUTS", "Call", "CallError", "Guards",
    "Verdict", "bits", "check_call", "guarded_allocations", "judge", "make_call", "place", "run_call", "same_bits", "written",
]  # fmt: skip

PAIRS = ("apart", "stacked", "up_first", "unlike", "tied")
"""How gate and up lie to each other: two allocations, halves of one, up before gate, unequal strides, one and the same."""

VALUES = ("normal", "tiny", "huge", "zeros", "specials")
"""Preactivations near 1; 1e-7 of that; up to about ±100; half of x, of the gradient and of the weights exactly ±0; x with NaN,
±inf, the dtype's largest and smallest numbers, subnormals among them, ±4096 and -0 in a few places."""

PATTERNS = ("once", "repeat", "retained", "warm")
"""How a call is made: once; twice and once without gradients, with equal bits; backward twice through one retained graph, with
equal bits; after a call of the same shape whose tensors are aligned differently, so that what was remembered must not fit."""

GPU_PATTERNS = ("captured", "side_stream")
"""Patterns that only a CUDA GPU has, each with the bits of a plain call: captured in a CUDA graph on other values, and replayed on
these; on a side stream, whose memory gets these values late, while the current stream is busy."""


@dataclass(repr=False)
class Call:
    """The arguments of one call, and the gradient of its result. Made by `make_call`."""

    spec: MLPSpec
    x: Tensor
    """(*lead, d_in)"""
    params: list[Tensor]
    """In the order of `spec.parameter_shapes()`."""
    operands: dict[str, Tensor]
    dy: Tensor
    """(*lead, d_out): the gradient of the result."""
    buffers: list[Tensor] = field(default_factory=list)
    """All memory that the call may only read."""
    values: str = "normal"
    requires_grad: tuple[str, ...] | None = None
    """The names, of those that `named` gives, whose gradients are asked for; None for all."""
    pattern: str = "once"
    """One of `PATTERNS` or `GPU_PATTERNS`."""
    recipe: dict[str, Any] = field(default_factory=dict)
    """`make_call(spec, **recipe)` makes this call again; empty where it was put together by hand."""

    def named(self) -> dict[str, Tensor]:
        """x, parameters and operands, in the order in which the oracle names their gradients."""
        return {"x": self.x, **dict(zip(self.spec.parameter_shapes(), self.params, strict=True)), **self.operands}

    def needing(self, names: Sequence[str] | None = None) -> Call:
        """The same tensors as leaves of a new graph; all of them, or those named, require grad."""

        def leaf(name: str, t: Tensor) -> Tensor:
            return t.detach().requires_grad_(names is None or name in names)

        leaves = {name: leaf(name, t) for name, t in self.named().items()}
        params = [leaves[name] for name in self.spec.parameter_shapes()]
        return replace(self, x=leaves["x"], params=params, operands={n: leaves[n] for n in self.operands})

    def run(self, mlp: Callable[..., Tensor]) -> Tensor:
        """`mlp(x, *params, **operands)`."""
        return mlp(self.x, *self.params, **self.operands)

    def gradients(self, mlp: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The result, and by name the gradients that `requires_grad` asks for."""
        y, grads = self._graph(mlp)
        return y, grads()

    def _graph(self, mlp: Callable[..., Tensor]) -> tuple[Tensor, Callable[..., dict[str, Tensor]]]:
        call = self.needing(self.requires_grad)
        y = call.run(mlp)
        wanted = {name: t for name, t in call.named().items() if t.requires_grad}

        def grads(retain_graph: bool = False) -> dict[str, Tensor]:
            if not wanted:
                return {}
            # A function may read an operand without having a derivative by it: eager has no gradient then, and kernels zeros.
            leaves = list(wanted.values())
            found = torch.autograd.grad(y, leaves, call.dy, retain_graph=retain_graph, materialize_grads=True)
            return dict(zip(wanted, found, strict=True))

        return y.detach(), grads

    def __repr__(self) -> str:
        if not self.recipe:
            return f"<Call of {self.spec!r}, x {tuple(self.x.shape)}>"
        return written(repr(self.spec), self.recipe)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For Hypothesis, which would print the fields of a dataclass, tensors and all."""
        printer.text(repr(self))


def written(spec: str, recipe: Mapping[str, Any]) -> str:
    """The Python source of `make_call(spec, **recipe)`, `spec` being source itself."""
    words = (f"{name}={value!r}" for name, value in recipe.items() if name not in ("lead", "seed"))
    return f"make_call({', '.join([spec, repr(recipe['lead']), repr(recipe['seed']), *words])})"


def make_call(
    spec: MLPSpec,
    lead: Sequence[int],
    seed: int,
    *,
    x: str = "dense",
    swap: bool = False,
    weights: str = "dense",
    pair: str = "apart",
    operands: str = "dense",
    dy: str = "dense",
    values: str = "normal",
    wide_operands: bool = False,
    requires_grad: Sequence[str] | None = None,
    pattern: str = "once",
    device: torch.device | str = "cpu",
    guard: int = GUARD,
) -> Call:
    """A call with x of shape (*lead, d_in): seeded values, and layouts by name. Equal arguments give equal bits on one device type.

    `x`, `weights`, `operands` (tiles and columns) and `dy` are names in `LAYOUTS`, `pair` in `PAIRS`, `values` in `VALUES`,
    `pattern` in `PATTERNS`, or on a CUDA device in `GPU_PATTERNS`; `swap` as in `place`. With `wide_operands`, operands but tiles
    are float32 whatever the spec's dtype. `requires_grad` names the tensors (see `Call.named`) whose gradients are asked for, None
    for all of them.

    Raises `ValueError` for a word that is none of these.
    """
    asked = None if requires_grad is None else tuple(requires_grad)
    given = dict(x=x, swap=swap, weights=weights, pair=pair, operands=operands, dy=dy, values=values, wide_operands=wide_operands,
                 requires_grad=asked, pattern=pattern, device=str(device), guard=guard)  # fmt: skip
    lead = tuple(lead)
    names = ("x", *spec.parameter_shapes(), *spec.operands())
    patterns = (*PATTERNS, *(GPU_PATTERNS if torch.device(device).type == "cuda" else ()))
    for what, words, allowed in (("x", (x,), LAYOUTS), ("weights", (weights,), WEIGHT_LAYOUTS), ("pair", (pair,), PAIRS),
                                 ("operands", (operands,), LAYOUTS), ("dy", (dy,), LAYOUTS), ("values", (values,), VALUES),
                                 ("pattern", (pattern,), patterns), ("requires_grad", asked or (), names)):  # fmt: skip
        for word in words:
            if word not in allowed:
                raise ValueError(f"make_call, {what}: got {word!r}; allowed: {listed(allowed)}")
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    factor = {"tiny": 1e-7, "huge": 35.0}.get(values, 1.0)

    def normal(shape: Sequence[int], scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(tuple(shape), generator=generator, device=device) * scale).to(dtype)

    def thinned(t: Tensor) -> Tensor:
        if values != "zeros":
            return t
        return t * (torch.rand(t.shape, generator=generator, device=device) < 0.5).to(t.dtype)  # ±0 by the sign

    params: dict[str, Tensor] = {}
    for name, shape in spec.parameter_shapes().items():
        if len(shape) == 2:
            params[name] = place(thinned(normal(shape, shape[1] ** -0.5)), weights, guard=guard)
        else:
            params[name] = place(normal(shape, min(factor, 2.0)), "strided" if weights == "strided" else "dense", guard=guard)
    if spec.gated:
        _pair(params, pair, weights, guard)
    shapes = {"tile": (*lead, spec.d_out), "column": (spec.d_out,), "row": (*lead, 1), "scalar": ()}
    named = {}
    for name, kind in spec.operands().items():
        wide = torch.float32 if wide_operands and kind != "tile" else dtype
        lies = operands if kind == "tile" else "strided" if operands == "strided" and kind == "column" else "dense"
        named[name] = place(normal(shapes[kind], dtype=wide), lies, swap and kind == "tile", guard)
    x_values = thinned(normal((*lead, spec.d_in), factor))
    if values == "specials":
        _sprinkle(x_values, generator)
    x_tensor = place(x_values, x, swap, guard)
    dy_tensor = place(thinned(normal((*lead, spec.d_out))), dy, swap, guard)
    everything = [x_tensor, *params.values(), *named.values(), dy_tensor]
    buffers = {t.untyped_storage().data_ptr(): t._base for t in everything if t._base is not None}
    defaults = make_call.__kwdefaults__ or {}
    recipe = {"lead": lead, "seed": seed, **{name: value for name, value in given.items() if value != defaults[name]}}
    return Call(spec, x_tensor, list(params.values()), named, dy_tensor, list(buffers.values()), values, asked, pattern, recipe)


def _pair(params: dict[str, Tensor], pair: str, weights: str, guard: int) -> None:
    gate, up = params["gate_proj.weight"], params["up_proj.weight"]
    if pair in ("stacked", "up_first"):
        both = place(torch.stack((gate, up) if pair == "stacked" else (up, gate)), "dense", guard=guard)
        gate, up = both.unbind(0) if pair == "stacked" else reversed(both.unbind(0))
    elif pair == "unlike":
        up = place(up.contiguous(), "transposed" if weights != "transposed" else "padded", guard=guard)
    elif pair == "tied":
        up = gate
    params["gate_proj.weight"], params["up_proj.weight"] = gate, up


def _sprinkle(x: Tensor, generator: torch.Generator) -> None:
    """Special numbers into a few places of x, in place."""
    info, flat = torch.finfo(x.dtype), x.view(-1)
    least = info.smallest_normal * info.eps
    special = [torch.nan, torch.inf, -torch.inf, info.max, -info.max, 4096.0, -4096.0, info.smallest_normal, least, -least, -0.0]
    count = min(len(special), flat.numel() // 4)
    at = torch.randperm(flat.numel(), generator=generator, device=x.device)[:count]
    which = torch.randperm(len(special), generator=generator, device=x.device)[:count]
    flat[at] = torch.tensor(special, dtype=x.dtype, device=x.device)[which]


@dataclass(frozen=True)
class Verdict:
    """How close a correct call came to its bounds, and how much its gradients say."""

    ratio: float
    """The largest error as a fraction of its bound, over the result and all gradients."""
    strength: Mapping[str, float]
    """For each gradient the largest |value|/bound: 1 or less would let a kernel pass that writes zeros."""


def check_call(
    call: Call, mlp: Callable[..., Tensor] | None = None, *, backward: bool = True, eager: bool = True, guard: int = GUARD
) -> Verdict:
    """Run a call as its pattern says, forward and backward, and hold everything against the oracle, which replays the roundings.

    `mlp` is `mlpdsl.compile(call.spec, backend="triton")` unless given. Also: inputs are not written, nothing is written outside
    what was allocated, and (`eager`) the root mean square error is no larger than `oracle.check` allows beside eager PyTorch.
    Raises `AssertionError` (`OracleError`, `CallError`), and what the call itself raises.
    """
    mlp = mlp or compile_spec(call.spec, backend="triton")
    before = [bits(b).clone() for b in call.buffers]
    with guarded_allocations(guard):
        y, grads = run_call(call, mlp) if backward else (call.run(mlp), {})
    for buffer, bits_before in zip(call.buffers, before, strict=True):
        if not torch.equal(bits(buffer), bits_before):
            raise CallError("an input was written")
    return judge(call, y, grads, eager=eager, library=_library(call, mlp))


def _library(call: Call, mlp: Callable[..., Tensor]) -> Collection[str]:
    """The stages of a call that the library multiplies."""
    if not isinstance(mlp, CompiledMLP) or not call.x.numel() or mlp.backend_for(call.x.device) != "triton":
        return ()
    rows = call.x.numel() // call.spec.d_in
    return library_stages(call.spec.to_json(), call.x.device, rows, mlp.batch_invariant)


def run_call(call: Call, mlp: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and the gradients asked for, made as `call.pattern` says. Raises `CallError` where bits differ that must not."""
    if call.pattern == "warm":
        other = "dense" if "offset" in (call.recipe.get("x"), call.recipe.get("weights")) else "offset"
        _other_values(call, x=other, weights=other).gradients(mlp)
    y, backward = call._graph(mlp)
    grads = backward(retain_graph=call.pattern == "retained")
    again: list[tuple[Tensor, dict[str, Tensor]]] = []
    if call.pattern == "retained":
        again = [(y, backward())]
    elif call.pattern == "repeat":
        # Three of each: a call that comes again is recorded, and then repeated from the recording.
        alone = replace(call, requires_grad=())
        again = [call.gradients(mlp), call.gradients(mlp), *((alone.gradients(mlp)[0], grads) for _ in range(3))]
    elif call.pattern in GPU_PATTERNS and call.x.numel():
        with torch.cuda.device(call.x.device):
            again = [(_captured if call.pattern == "captured" else _on_side_stream)(call, mlp)]
    how = {"captured": "replayed from a CUDA graph", "side_stream": "on a side stream"}.get(call.pattern, "the second time")
    for y_again, grads_again in again:
        if not same_bits(y, y_again):
            raise CallError(f"y has other bits {how}")
        for name, grad in grads_again.items():
            if not same_bits(grad, grads[name]):
                raise CallError(f"the gradient of {name} has other bits {how}")
    return y, grads


def _other_values(call: Call, **changes: str) -> Call:
    """A call like this one, in other memory, with other values."""
    if not call.recipe:
        raise ValueError(f"the pattern {call.pattern!r} needs a call that make_call made")
    return make_call(call.spec, **{**call.recipe, "seed": call.recipe["seed"] ^ 1, **changes, "pattern": "once"})


def _captured(call: Call, mlp: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward captured in a CUDA graph on other values, and replayed on the call's own."""
    stage = _other_values(call)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks before a capture: kernels compiled, autograd's streams known
        stage.gradients(mlp)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grads = stage.gradients(mlp)
    graph.replay()
    for buffer, values in zip(stage.buffers, call.buffers, strict=True):  # whole buffers: an expanded tensor takes no copy_
        buffer.copy_(values)
    graph.replay()
    found = y.clone(), {name: grad.clone() for name, grad in grads.items()}
    torch.cuda.synchronize()
    return found


def _on_side_stream(call: Call, mlp: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """On a stream that gets the call's values late. What is launched on another stream misses them, or is itself missed."""
    stage = _other_values(call)
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    torch.cuda._sleep(100_000_000)  # cycles, about 50 ms: longer than what follows takes on the side stream
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        for buffer, values in zip(stage.buffers, call.buffers, strict=True):
            buffer.copy_(values)
        y, grads = stage.gradients(mlp)
        found = y.clone(), {name: grad.clone() for name, grad in grads.items()}
    side.synchronize()
    current.wait_stream(side)
    return found


def judge(call: Call, y: Tensor, grads: Mapping[str, Tensor], *, eager: bool = True, library: Collection[str] = ()) -> Verdict:
    """Hold a result y (*lead, d_out), and the gradients by name that there are, against the oracle. Raises `OracleError`.

    `library` names the stages that the library multiplied, as for `oracle.forward`."""
    spec = call.spec
    # Root mean squares want many independent errors: not one row, one column, or subnormals. tf32 is not the CPU's.
    rows = call.dy.numel() // spec.d_out
    compare = eager and spec.precision == "ieee" and rows >= 8 and min(spec.dims) >= 8 and call.values == "normal"
    y_eager: Tensor | None = None
    eager_grads: dict[str, Tensor] = {}
    if compare:
        eager_mlp = reference(spec)
        y_eager, eager_grads = call.gradients(eager_mlp) if grads else (call.run(eager_mlp), {})
    what = f"{spec!r} x{tuple(call.x.shape)}"
    arguments = (spec, call.x, call.params, call.operands)
    report = oracle.check(y, oracle.forward(*arguments, replay=True, library=library), f"y of {what}", y_eager)
    ratio, strength = report.ratio, {}
    expected = oracle.backward(*arguments, call.dy, replay=True, library=library) if grads else {}
    for name, grad in grads.items():
        wanted = expected[name]
        many = wanted.value.numel() >= 8  # the error of one number beside another one's says nothing
        report = oracle.check(grad, wanted, f"gradient of {name} of {what}", eager_grads.get(name) if many else None)
        ratio = max(ratio, report.ratio)
        says = (wanted.value.abs() / wanted.bound.clamp(min=1e-300)).nan_to_num(nan=0.0, posinf=0.0)
        strength[name] = float(says.amax()) if says.numel() else 0.0
    return Verdict(ratio, strength)
