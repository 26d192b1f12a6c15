"""A kernel in plain torch, right as it stands, and calls of it: what the oracle accepts, and wrong kernels are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlpdsl.spec import MLPSpec
from mlpdsl.testing import oracle
from mlpdsl.testing.functions import FUNCTIONS
from mlpdsl.testing.oracle import Bounded


def value32(name: str, x: Tensor) -> Tensor:
    return FUNCTIONS[name].value(x)


def slope32(name: str, x: Tensor) -> Tensor:
    return FUNCTIONS[name].derivative(x)


class Kernel:
    """mlpdsl's declared rounding points in plain float32 torch. Each wrong kernel below changes one method."""

    def __init__(self, spec: MLPSpec) -> None:
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)

    def round(self, t: Tensor) -> Tensor:
        return t.to(self.dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a.float() @ b.float()

    def linear(self, h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        acc = self.product(h, w.T)
        return acc if b is None else acc + b.float()

    def act(self, name: str, z: Tensor) -> Tensor:
        return value32(name, z)

    def slope(self, name: str, z: Tensor) -> Tensor:
        return slope32(name, z)

    def hidden(self, pre: list[Tensor]) -> Tensor:
        a = self.act(self.spec.activation, pre[0].float())
        return self.round(a * pre[1].float() if self.spec.gated else a)

    def step(self, name: str, t: Tensor, operand: Tensor | None) -> Tensor:
        if operand is None:
            return self.act(name, t)
        return t + operand.float() if name == "residual" else t * operand.float()

    def gate_gradients(self, dh: Tensor, pre: list[Tensor]) -> list[Tensor]:
        gate, up = (z.float() for z in pre)
        act = self.spec.activation
        return [dh * up * self.slope(act, gate), dh * self.act(act, gate)]

    def run(self, x: Tensor, params: dict[str, Tensor], ops: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
        spec, names = self.spec, [n.removesuffix(".weight") for n in params if n.endswith(".weight")]
        layers = [names[:2], names[2:]] if spec.gated else [[n] for n in names]
        bias = {n: params.get(f"{n}.bias") for n in names}
        h, saved = x.reshape(-1, spec.d_in), []
        hidden = [h]
        for layer in layers[:-1]:
            pre = [self.linear(hidden[-1], params[f"{n}.weight"], bias[n]) for n in layer]
            saved.append([self.round(z) for z in pre])
            hidden.append(self.hidden(pre))
        t = self.linear(hidden[-1], params[f"{layers[-1][0]}.weight"], bias[layers[-1][0]])
        flat = {n: o.reshape(-1, spec.d_out) if n == "residual" else o for n, o in ops.items()}
        tile = self.round(t).float()
        for name in spec.epilogue:
            t = self.step(name, t, flat.get(name))
        out = {"y": self.round(t).reshape(*x.shape[:-1], spec.d_out)}
        # backward
        steps = [tile]
        for name in spec.epilogue:
            steps.append(self.step(name, steps[-1], flat.get(name)))
        g = dy.reshape(-1, spec.d_out).float()
        for name, before in zip(reversed(spec.epilogue), reversed(steps[:-1]), strict=True):
            if name == "residual":
                out[name] = self.round(g).reshape(ops[name].shape)
            elif name in flat:
                out[name] = self.round((g * before).sum(0) if name == "layer_scale" else (g * before).sum())
                g = g * flat[name].float()
            else:
                g = g * self.slope(name, before)
        wide, hidden = [g], [hidden[0], *(self.hidden(pre) for pre in saved)]
        for i in reversed(range(len(layers))):
            rounded = [self.round(each) for each in wide]
            dh = torch.zeros(())
            for n, dz, unrounded in zip(layers[i], rounded, wide, strict=True):
                out[f"{n}.weight"] = self.round(self.product(dz.T, hidden[i]))
                if spec.bias:
                    out[f"{n}.bias"] = self.round(unrounded.sum(0))
                dh = dh + self.product(dz, params[f"{n}.weight"])
            if i == 0:
                out["x"] = self.round(dh).reshape(x.shape)
            elif spec.gated:
                wide = self.gate_gradients(dh, saved[0])
            else:
                wide = [dh * self.slope(spec.activation, saved[i - 1][0].float())]
        return out


class OtherFunction(Kernel):
    wrong: Callable[[Tensor], Tensor]

    def act(self, name: str, z: Tensor) -> Tensor:
        return type(self).wrong(z)


def other(f: Callable[[Tensor], Tensor]) -> type[Kernel]:
    return type("Other", (OtherFunction,), {"wrong": staticmethod(f)})


@dataclass
class Case:
    spec: MLPSpec
    x: Tensor
    params: dict[str, Tensor]
    ops: dict[str, Tensor]
    dy: Tensor

    def expected(self, replay: bool = False) -> dict[str, Bounded]:
        y = oracle.forward(self.spec, self.x, self.params, self.ops, replay=replay)
        params = list(self.params.values())
        return {"y": y, **oracle.backward(self.spec, self.x, params, self.ops, self.dy, replay=replay)}


def case(spec: MLPSpec, lead: tuple[int, ...] = (37,), seed: int = 0, scale: float = 1.0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (draw(*lead, spec.d_in) * scale).to(dtype)
    params = {
        name: (draw(*shape) * (shape[1] ** -0.5 if len(shape) == 2 else 0.5)).to(dtype)
        for name, shape in spec.parameter_shapes().items()
    }
    shapes = {"tile": (*lead, spec.d_out), "column": (spec.d_out,), "scalar": ()}
    ops = {name: (draw(*shapes[kind]) + 0.5).to(dtype) for name, kind in spec.operands().items()}
    return Case(spec, x, params, ops, draw(*lead, spec.d_out).to(dtype))


DTYPES = ("float32", "bfloat16", "float16")
SHAPES: dict[str, dict[str, Any]] = {
    "one linear": {"dims": (33, 20), "activation": "identity"},
    "one linear, gelu": {"dims": (33, 20), "activation": "identity", "bias": True, "epilogue": ("gelu",)},
    "mlp": {"dims": (24, 40, 16), "activation": "gelu", "bias": True},
    "gated": {"dims": (24, 40, 16), "activation": "silu", "gated": True, "bias": True, "epilogue": ("residual",)},
    "deep": {"dims": (16, 24, 8, 24, 16), "activation": "tanh", "bias": True, "epilogue": ("layer_scale", "residual")},
    "epilogues": {"dims": (9, 31, 7), "activation": "mish", "epilogue": ("scale", "silu", "residual", "layer_scale")},
}
