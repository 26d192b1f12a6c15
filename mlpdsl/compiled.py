"""`mlpdsl.compile`: a spec and options in, a callable out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlpdsl import source
from mlpdsl.autograd import repeat, run
from mlpdsl.backends import BACKENDS, choose_backend, requested_backend
from mlpdsl.checks import Signature, torch_dtype
from mlpdsl.eager import Evaluation
from mlpdsl.errors import ShapeError, SpecError, UnsupportedError, describe
from mlpdsl.function import Function
from mlpdsl.names import DTYPES
from mlpdsl.shortcut import Shortcut
from mlpdsl.spec import MLPSpec, check_spec
from mlpdsl.target import TARGETS, Target, detect

__all__ = ["CompiledMLP", "compile"]


class CompiledMLP:
    """A callable for one spec: `y = mlp(x, *params, **operands)`. Made by `mlpdsl.compile`.

    x is (..., d_in); params come in the order of `spec.parameter_shapes()`; operands (see `spec.operands()`) by keyword; y is
    (..., d_out). All in the spec's dtype and on one device, which may change from call to call. Where x or a parameter or operand
    requires grad, so does y. Gradients come back in each tensor's own dtype; a second derivative raises RuntimeError.

    Under autocast a float32 spec runs in autocast's dtype, and arguments are cast as `nn.Linear` would cast them. Raises
    `ShapeError` before anything is launched, `UnsupportedError` where the chosen backend cannot run.
    """

    def __init__(
        self,
        spec: MLPSpec,
        backend: str | None,
        asked: str | None = None,
        batch_invariant: bool = False,
        of: CompiledMLP | None = None,
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.batch_invariant = batch_invariant
        self._backend = "triton" if batch_invariant else backend  # eager PyTorch is not batch-invariant: no falling back to it
        # All of this is worked out here, so that a call, and torch.compile's trace of it, only reads attributes.
        self._json = spec.to_json()
        self._signature = Signature(spec)
        self._evaluation = Evaluation(spec)
        self._kinds = tuple(spec.operands())
        self._same_as: tuple[str, ...] = same_as(spec) if of is None else of._same_as
        call = (self._json, self._same_as, batch_invariant)
        self._shortcut = Shortcut(self._json, batch_invariant, partial(repeat, call))
        self._asked = asked
        self._variants: dict[torch.dtype, CompiledMLP] = {torch_dtype(spec.dtype): self} if of is None else of._variants
        if of is None:
            for name in DTYPES:
                if name != spec.dtype:
                    precision = spec.precision if name == "float32" else "ieee"
                    self._variants[torch_dtype(name)] = CompiledMLP(
                        spec.replace(dtype=name, precision=precision), backend, asked, batch_invariant, of=self
                    )

    def __call__(self, x: Tensor, *params: Tensor, **operands: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return self._whole_way(x, params, operands)
        in_order = tuple(operands.values()) if tuple(operands) == self._kinds else None
        if in_order is not None:
            y = self._shortcut.call(x, params, in_order)
            if y is not None:
                return y
        y = self._whole_way(x, params, operands)
        if in_order is not None and choose_backend(self._backend, x.device.type, self._json) == "triton":
            self._shortcut.learn(x, params, in_order, y.requires_grad)
        return y

    def _whole_way(self, x: Tensor, params: tuple[Tensor, ...], operands: dict[str, Tensor]) -> Tensor:
        if isinstance(x, Tensor) and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            return self._autocast(x, params, operands)
        return self._run(x, params, operands)

    def _run(self, x: Tensor, params: tuple[Tensor, ...], operands: dict[str, Tensor]) -> Tensor:
        self._signature.check(x, params, operands)
        if choose_backend(self._backend, x.device.type, self._json) == "eager":
            return self._evaluation(x, params, operands)
        return run(self._json, self._same_as, self.batch_invariant, x, params, [operands[name] for name in self._kinds])

    def backend_for(self, device: torch.device | str) -> str:
        """Which backend a call with tensors on `device` runs: "triton" or "eager". Raises `UnsupportedError` where none can."""
        return choose_backend(self._backend, torch.device(device).type, self._json)

    def _autocast(self, x: Tensor, params: tuple[Tensor, ...], operands: dict[str, Tensor]) -> Tensor:
        """Cast, then run the variant of autocast's dtype with autocast off, so that nothing is cast twice."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if self.spec.dtype == "float32" else torch_dtype(self.spec.dtype)
        with torch.autocast(device, enabled=False):
            cast = [_cast(t, dtype) for t in (x, *params)]
            return self.with_dtype(dtype)(cast[0], *cast[1:], **{k: _cast(v, dtype) for k, v in operands.items()})

    def with_dtype(self, dtype: torch.dtype) -> CompiledMLP:
        """The same MLP in another dtype (float32, float16 or bfloat16). Raises `ShapeError` for any other."""
        found = self._variants.get(dtype)
        if found is None:
            allowed = ", ".join(str(d) for d in self._variants)
            raise ShapeError(describe("dtype", dtype, allowed, "Cast the module or the tensors, for example layer.float()."))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.spec, self._asked, self.batch_invariant)

    def __repr__(self) -> str:
        chosen = ", batch_invariant=True" if self.batch_invariant else ""
        chosen += f", backend={self.backend!r}" if self.backend else ""
        return f"mlpdsl.compile({self.spec!r}{chosen})"


def _restore(spec: MLPSpec, backend: str | None, batch_invariant: bool = False) -> CompiledMLP:
    return compile(spec, backend=backend, batch_invariant=batch_invariant)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Autocast's rule: floating tensors of another dtype are cast, float64 and integers are left for the check to refuse."""
    return t.to(dtype) if isinstance(t, Tensor) and t.dtype in (torch.float32, torch.float16, torch.bfloat16) else t


def compile(spec: MLPSpec, *, save: str = "preact", batch_invariant: bool = False, backend: str | None = None) -> CompiledMLP:
    """Return a callable for `spec`. Safe at import: no GPU is touched, nothing is compiled or tuned.

    Writes the generated source into the cache if it is not there yet and the architecture is known without a GPU context;
    else the first call does. `save` says what forward keeps for backward ("preact": the preactivations); `backend` is "triton",
    "eager" or None (MLPDSL_BACKEND, else by device).

    With `batch_invariant`, a row of y, and of the gradients of x and of operands of kind tile and row, has the same bits whatever
    batch it is in, wherever in it, and however the batch lies in memory: tile sizes do not follow the number of rows, and rows
    that tensor descriptors do not fit are copied. On one GPU, for the same weights. Only generated kernels can: where they cannot
    run, the call raises, and does not fall back to eager PyTorch.

    Raises `SpecError`, and `UnsupportedError` for what this release cannot do.
    """
    check_spec(spec)
    chosen = requested_backend(backend)
    _check_options(save, batch_invariant, chosen)
    if chosen != "eager":
        target = detect()
        # Where the target cannot do it, a backend asked for by hand says so here; else the first call logs it and runs eager.
        if target is not None and not source.present(spec, target, "triton") and (chosen == "triton" or _supported(spec, target)):
            source.publish(spec, target, "triton")
    return CompiledMLP(spec, chosen, backend, batch_invariant)


def _supported(spec: MLPSpec, target: Target) -> bool:
    from mlpdsl.codegen.lower import lower

    return not BACKENDS["triton"].supports(lower(spec, target), target)


def same_as(spec: MLPSpec) -> tuple[str, ...]:
    """The plan's `epilogue.same_as`: for each operand, whose gradient is its own. Specs of words are mostly answered without a
    plan, as what makes plans takes a third of the time that importing takes."""
    if not any(isinstance(entry, Function) for entry in (spec.activation, *spec.epilogue)):
        names = tuple(spec.operands())
        if "residual" not in names or spec.epilogue[-1] == "residual":  # what is added last has the gradient of y
            return tuple("grad" if name == "residual" else "" for name in names)
    from mlpdsl.codegen.lower import lower  # which refuses a function that has neither a formula nor text for Triton

    return lower(spec, TARGETS[source.DEFAULT_TARGET]).epilogue.same_as  # it depends on no target


def _check_options(save: object, batch_invariant: object, backend: str | None) -> None:
    if type(save) is not str or save not in ("preact", "input", "all"):
        raise SpecError(describe("save", save, "'preact', 'input', 'all'", "Leave it out to keep the preactivations."))
    if type(batch_invariant) is not bool:
        raise SpecError(describe("batch_invariant", batch_invariant, "True or False", "Leave it out for False."))
    reasons = []
    if save != "preact":
        reasons.append(f"save={save!r} comes in a later release; save='preact' is the one there is")
    if batch_invariant and backend == "eager":
        reasons.append(
            "batch_invariant=True with backend='eager': PyTorch's products depend on the batch; backend='triton' does not"
        )
    if reasons:
        raise UnsupportedError("mlpdsl.compile: options that are valid words and cannot be had", reasons)
