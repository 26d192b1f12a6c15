"""`mlpdsl.warmup`: compile what calls will need, before the first of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from mlpdsl import on_jit
from mlpdsl.backends import interpreting
from mlpdsl.checks import torch_dtype
from mlpdsl.compiled import CompiledMLP, compile
from mlpdsl.errors import ShapeError, SpecError, UnsupportedError, describe
from mlpdsl.spec import MLPSpec, check_rows, check_spec

__all__ = ["warmup"]


def warmup(
    spec: MLPSpec,
    m: int | Iterable[int] = (1, 16, 4096),
    backward: bool = False,
    device: Any = None,
    *,
    batch_invariant: bool = False,
) -> None:
    """Compile and load every kernel that `compile(spec)` runs on each number of rows in `m` (or on the one), by such calls.

    Calls are made on contiguous random tensors at multiples of 16 bytes, with the configs in force (tables, `MLPDSL_TABLES`), on
    `device`, by default the current GPU: without gradients, and where `backward`, also with every gradient. Tensors that lie
    otherwise, gradients of some parameters only, and other numbers of rows may need other kernels: `MLPDSL_ON_JIT=warn` names them.
    `batch_invariant` as in `compile`; without gradients one number of rows is then enough. Takes the memory of one call at a time,
    and gives it back. MLPDSL_ON_JIT forbids it nothing.

    Raises `SpecError`; `ShapeError` for numbers of rows that are none, below 0, or missing; `UnsupportedError` where no GPU kernel
    can run.
    """
    check_spec(spec)
    counts = _counts(m)
    if type(backward) is not bool:
        raise SpecError(describe("backward", backward, "True or False", "Numbers of rows are all in m."))
    on_jit.policy()  # a mistake in it should be seen before there are calls
    mlp = compile(spec, backend="triton", batch_invariant=batch_invariant)
    place = _device(device)
    mlp.backend_for(place)
    reserved = torch.cuda.memory_reserved(place) if place.type == "cuda" else 0
    # As calls are made, whatever surrounds this one; and on this thread alone, which is the one that is allowed to. In this order:
    # inference_mode sets autograd's threads too.
    with (
        torch.inference_mode(False),
        torch.autocast(place.type, enabled=False),
        torch.autograd.set_multithreading_enabled(False),
        on_jit.allowing(),
    ):
        _call_each(mlp, counts, backward, place)
    if place.type == "cuda" and torch.cuda.memory_reserved(place) > reserved:
        torch.cuda.empty_cache()


def _counts(m: object) -> list[int]:
    """Numbers of rows, each once. Raises `ShapeError`."""
    if isinstance(m, Iterable) and not isinstance(m, str | bytes):
        counts = list(dict.fromkeys(check_rows(rows) for rows in m))
    else:
        counts = [check_rows(m)]
    if not counts:
        raise ShapeError(describe("m", m, "one number of rows or more", "Pass the numbers that calls will have."))
    return counts


def _device(given: Any) -> torch.device:
    """Where kernels are compiled: a GPU, or the CPU where Triton interprets. Raises `SpecError`, `UnsupportedError`."""
    if given is None:
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cuda", given) if type(given) is int else torch.device(given)
    except (RuntimeError, TypeError, ValueError) as error:
        step = "Leave it out for the current GPU."
        raise SpecError(describe("device", given, "a torch device, as 'cuda:1', or a GPU's number", step)) from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if interpreting() or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
        return device
    seen = f"{torch.cuda.device_count()} of them" if torch.cuda.is_available() else "none"
    raise UnsupportedError(
        f"mlpdsl.warmup compiles kernels for the GPU that will run them, and {device} is none of this process's",
        [
            f"torch sees {seen} here: `mlpdsl doctor` says more",
            "run it in the process that will make the calls; where PyTorch's own operations run, there is nothing to compile",
            "`mlpdsl show SPEC --stage resources --target sm_90` compiles without a GPU, to look at; TRITON_INTERPRET=1 interprets",
        ],
    )


def _call_each(mlp: CompiledMLP, counts: list[int], backward: bool, device: torch.device) -> None:
    spec = mlp.spec
    generator = torch.Generator(device).manual_seed(0)  # the user's own is left where it is

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch_dtype(spec.dtype), device=device)
        return drawn.requires_grad_(backward)

    params = [draw(*shape) for shape in spec.parameter_shapes().values()]
    for rows in counts:
        shapes: dict[str, tuple[int, ...]] = {"tile": (rows, spec.d_out), "column": (spec.d_out,), "row": (rows, 1), "scalar": ()}
        operands = {name: draw(*shapes[kind]) for name, kind in spec.operands().items()}
        x = draw(rows, spec.d_in)
        with torch.no_grad():
            mlp(x, *params, **operands)
        if backward:  # keeps what backward needs, which is another kernel
            with torch.enable_grad():
                y = mlp(x, *params, **operands)
            y.backward(torch.ones_like(y))
            del y
            for t in (x, *params, *operands.values()):
                t.grad = None
        del x, operands
