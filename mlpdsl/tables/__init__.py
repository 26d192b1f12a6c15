"""Measured tables: which config a product gets where one was timed and beat the rule's beyond noise.

A table is a JSON file for one target. Those of the package lie beside this file. MLPDSL_TABLES names one more, or a folder of
`<target>.json` files, whose rows come first; "off" turns all tables off. Every process that reads the same files decides alike: no
GPU is asked. `mlpdsl tune` writes tables; docs/tuning.md says how.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mlpdsl.codegen import config as rule
from mlpdsl.codegen import float32
from mlpdsl.codegen.few_rows import PROCESSORS, tiles_of
from mlpdsl.codegen.plan import Config, Plan
from mlpdsl.errors import MLPError

__all__ = ["NOISE", "SCHEMA", "VARIABLE", "Decision", "Point", "Product", "Row", "TableError", "as_full", "best_path", "decide",
           "find", "forget", "has_rows", "merge", "read", "write"]  # fmt: skip

VARIABLE = "MLPDSL_TABLES"
"""The environment variable: a table's path, a folder of tables, or "off"."""

SCHEMA = 1
"""The version of the file's form."""

NOISE = 1.02
"""Two times of one thing may differ by this factor and mean the same: a config that gains less does not stand."""

_log = logging.getLogger("mlpdsl")


class TableError(MLPError, ValueError):
    """A file that is no table of this version."""


@dataclass(frozen=True, order=True)
class Product:
    """What a row is about. `n` and `k` are the two widths: the product's N and K; for `weight_grad`, which sums over the batch, its
    M and N. `path` is the best that the plan prints; `planes` is 2 where gate and up are computed, gone back through, or summed;
    `epilogue` whether anything follows the output's product. Activations are not told apart."""

    role: str
    path: str
    dtype: str
    precision: str
    planes: int
    epilogue: bool
    n: int
    k: int

    @classmethod
    def of(cls, plan: Plan, role: str, m: int, n: int, k: int) -> tuple[Product, int]:
        """The row of a launch with these M, N, K, and where in it: the number of rows of x."""
        rows, n, k = (k, m, n) if role == "weight_grad" else (m, n, k)
        planes = 2 if plan.gated and role in ("hidden", "hidden_grad", "input_grad") else 1
        follows = plan.finishes(role)
        return cls(role, best_path(plan, n, k), plan.dtype, plan.precision, planes, follows, n, k), rows


@dataclass(frozen=True)
class Point:
    """One measurement at `m` rows of x: microseconds a launch of `config` and of the rule's config (`default_us`), timed in turns.

    `config` is None where nothing beat the rule's, which then holds around this point."""

    m: int
    config: Config | None
    us: float
    default_us: float


@dataclass(frozen=True)
class Row:
    """A product's points, by m. `gpu` is the driver's name of it, `versions` what was installed, `date` in ISO form, UTC."""

    product: Product
    gpu: str
    versions: Mapping[str, str]
    date: str
    points: tuple[Point, ...]

    def nearest(self, m: int) -> Point | None:
        """The point nearest to m in log m (of two, that below), None outside the row's range: nothing was measured there."""
        if not self.points or not self.points[0].m <= m <= self.points[-1].m:
            return None
        return min(self.points, key=lambda p: (abs(math.log2(p.m) - math.log2(m)), p.m))


class Decision(NamedTuple):
    """A launch's config, and the row that says so; None where it is the rule's."""

    config: Config
    row: Row | None


def best_path(plan: Plan, n: int, k: int) -> str:
    """The path that aligned tensors take in a product of a linear with these two widths."""
    return "tma" if plan.uses_tma and n % 8 == k % 8 == 0 else "masked"


def decide(plan: Plan, role: str, path: str, m: int, n: int, k: int, batch_invariant: bool = False) -> Decision:
    """The config of one launch, by a table or else by the rule; `role`, `path` and M, N, K as in `config.choose`.

    Where batch-invariant, all but weight gradients get what a generated kernel gets at `INVARIANT_ROWS`. Whether the library
    multiplies does not depend on the path, because what is rounded must not depend on alignment. Where biases are added after its
    product the rule says, whoever chose it.
    """
    found = _decide(plan, role, path, m, n, k, batch_invariant)
    if found.config.strategy != "library":
        return found
    apart = plan.bias_pass and float32.bias_pass(role, m, n, k, plan.precision, plan.target, plan.finishes(role))
    return found._replace(config=replace(found.config, bias_pass=apart))


def _decide(plan: Plan, role: str, path: str, m: int, n: int, k: int, batch_invariant: bool) -> Decision:
    ours = batch_invariant and role != "weight_grad"
    rows = rule.INVARIANT_ROWS if ours else m
    product, at = Product.of(plan, role, rows, n, k)
    planes = product.planes
    words: dict[str, Any] = {"dtype": plan.dtype, "precision": plan.precision, "planes": planes, "target": plan.target}
    by_rule = rule.choose(role, path, rows, n, k, **words)
    found = find(plan.target.name, product, at)
    if found is not None and found[1].config is not None and as_full(plan.target.name, found[1].config, product, found[1].m, at):
        row, chosen = found[0], found[1].config
        if chosen.strategy == "library":
            fits = None if ours else rule.library(role, rows, n, dtype=plan.dtype, planes=planes) and chosen
        elif chosen.strategy == "skinny":
            fits = None if ours else rule.fitted(chosen, role, rows, dtype=plan.dtype, planes=planes, target=plan.target)
        elif path != product.path:
            return Decision(by_rule, None)
        elif chosen.strategy == "padded":
            copied = None if ours else rule.padded(role, rows, n, k, **words)
            fits = chosen if copied and rule.has_room(chosen, role, planes, plan.dtype, plan.target) else None
        else:
            fits = chosen
        if fits is not None:
            return Decision(fits, row)
    if ours:
        return Decision(by_rule, None)
    return Decision(rule.usual(role, path, rows, n, k, epilogue=product.epilogue, **words), None)


def as_full(target: str, config: Config, product: Product, measured: int, m: int) -> bool:
    """Whether a config that was timed with `measured` rows of x keeps processors about as busy with m: its tiles filled to eight
    ninths of what they were, and of persistent kernels on sm_90 all waves of them, the last one too. Else another config may be far
    faster, and nothing was measured.

    Up to 64 rows wait for weights, however full tiles are, and have kernels of their own: more rows say nothing of them, nor they
    of more. The library has tiles of its own; weight gradients have the same for every m.
    """
    if (m <= rule.SKINNY_ROWS) != (measured <= rule.SKINNY_ROWS) and product.role in ("hidden", "output"):
        return False
    if config.strategy not in ("two_stage", "padded") or product.role == "weight_grad" or max(m, measured) <= rule.SKINNY_ROWS:
        return True

    def waves(rows: int) -> int:
        tiles = tiles_of(config.block_m, config.block_n, rows, product.n)
        persistent = product.path == "tma" or config.strategy == "padded"
        at_once = PROCESSORS * config.residency if target == "sm_90" and persistent else 1
        return -(-tiles // at_once)

    return 9 * m * waves(measured) >= 8 * measured * waves(m)


def find(target: str, product: Product, m: int) -> tuple[Row, Point] | None:
    """The row that covers m rows of x, the user's before the package's, and its nearest point."""
    for row in _rows(target, _setting()).get(product, ()):
        point = row.nearest(m)
        if point is not None:
            return row, point
    return None


def has_rows(target: str) -> bool:
    """Whether any table has a row for the target."""
    return bool(_rows(target, _setting()))


def forget() -> None:
    """Read the files again at the next look-up."""
    _rows.cache_clear()


def _setting() -> str:
    return os.environ.get(VARIABLE, "").strip()


@lru_cache(maxsize=64)
def _rows(target: str, setting: str) -> dict[Product, tuple[Row, ...]]:
    """Every row of a target by its product, the user's first. A file that cannot be read is as good as none, and one warning."""
    if setting.lower() == "off":
        return {}
    found: dict[Product, tuple[Row, ...]] = {}
    for path in ([Path(setting).expanduser()] if setting else []) + [Path(__file__).parent]:
        ours = path == Path(__file__).parent
        if path.is_dir():
            path = path / f"{target}.json"
            if not path.exists():
                continue
        try:
            name, rows = read(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            _log.warning("mlpdsl: the table %s is not used, and configs follow the rule: %s", path, error)
            continue
        if name != target:
            if ours:
                _log.warning("mlpdsl: the table %s is not used: it is of %s", path, name)
            continue
        for row in rows:
            found[row.product] = (*found.get(row.product, ()), row)
    return found


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Both, one row a product, in order of products.

    Of two rows from one GPU with the same versions all points stay; at one m that which is faster beyond noise, else the old one.
    Times of other GPUs or versions do not compare: there the later row stays, of one date the new one.
    """
    found = {row.product: row for row in old}
    for row in new:
        before = found.get(row.product)
        if before is None or (before.gpu, dict(before.versions)) != (row.gpu, dict(row.versions)):
            if before is None or row.date >= before.date:
                found[row.product] = row
            continue
        points = {point.m: point for point in before.points}
        for point in row.points:
            if point.m not in points or point.us * NOISE < points[point.m].us:
                points[point.m] = point
        merged = tuple(points[m] for m in sorted(points))
        found[row.product] = Row(row.product, row.gpu, row.versions, max(before.date, row.date), merged)
    return [found[product] for product in sorted(found)]


def write(target: str, rows: Iterable[Row]) -> str:
    """The text of a table, canonical: a line a point, in order. Rows of which no point has a config do not stand."""
    lines = []
    for row in sorted(rows, key=lambda row: row.product):
        if not any(point.config for point in row.points):
            continue
        points = ",\n  ".join(_json(_point_to_dict(point)) for point in sorted(row.points, key=lambda p: p.m))
        head = _json({**asdict(row.product), "gpu": row.gpu, "versions": dict(row.versions), "date": row.date})
        lines.append(f'{head[:-1]}, "points": [\n  {points}]}}')
    body = ",\n ".join(lines)
    body = f"[\n {body}\n]" if lines else "[]"
    return f'{{"rows": {body}, "schema": {SCHEMA}, "target": {json.dumps(target)}}}\n'


def read(text: str) -> tuple[str, list[Row]]:
    """Target and rows of a table. Raises `TableError`, which names the row, for anything that `write` does not write."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TableError(f"it is not JSON ({error})") from error
    if type(data) is not dict or data.get("schema") != SCHEMA:
        said = data.get("schema") if type(data) is dict else type(data).__name__
        raise TableError(f"its schema is {said!r}, and {SCHEMA} is read")
    if set(data) != {"rows", "schema", "target"} or type(data["rows"]) is not list or type(data["target"]) is not str:
        raise TableError("it has other fields than rows (a list), schema and target (a name)")
    rows: list[Row] = []
    seen: set[Product] = set()
    for at, given in enumerate(data["rows"]):
        try:
            row = _row(given)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise TableError(f"row {at + 1}: {type(error).__name__}: {error}") from error
        if row.product in seen:
            raise TableError(f"row {at + 1}: a product that an earlier row has")
        seen.add(row.product)
        rows.append(row)
    return data["target"], rows


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _point_to_dict(point: Point) -> dict[str, Any]:
    return {"m": point.m, "config": _config_to_dict(point.config), "us": point.us, "default_us": point.default_us}


def _config_to_dict(config: Config | None) -> dict[str, int | str | bool] | None:
    """All that differs from a field's default, but where biases are added."""
    if config is None:
        return None
    given = config.to_dict()
    return {f.name: given[f.name] for f in fields(Config) if given[f.name] != f.default and f.name != "bias_pass"}


_KINDS = {"role": str, "path": str, "dtype": str, "precision": str, "planes": int, "epilogue": bool, "n": int, "k": int,
          "gpu": str, "versions": dict, "date": str, "points": list}  # fmt: skip


def _row(given: Any) -> Row:
    _check(given, _KINDS)
    product = Product(**{field.name: given[field.name] for field in fields(Product)})
    if min(product.n, product.k, product.planes) < 1 or not all(type(v) is str for v in given["versions"].values()):
        raise ValueError("a width below 1, or a version that is no text")
    points = tuple(map(_point, given["points"]))
    if (product.role, product.planes) != ("hidden", 2) and any(point.config and point.config.batched for point in points):
        raise ValueError("config: batched is said of gate and up alone")
    ms = [point.m for point in points]
    if not ms or ms != sorted(set(ms)):
        raise ValueError("points are in order of m, each once, and at least one")
    return Row(product, given["gpu"], given["versions"], given["date"], points)


def _point(given: Any) -> Point:
    _check(given, {"m": int, "config": (dict, type(None)), "us": (float, int), "default_us": (float, int)})
    us, default_us = float(given["us"]), float(given["default_us"])
    if given["m"] < 1 or not (0 < us < math.inf and 0 < default_us < math.inf):
        raise ValueError("m is 1 or more, and times are above 0")
    if given["config"] is None:
        return Point(given["m"], None, us, default_us)
    if us * NOISE > default_us * 1.0001:
        raise ValueError(f"a config stands only where it gains a factor of {NOISE} at least")
    return Point(given["m"], _config(given["config"]), us, default_us)


def _config(given: dict[str, Any]) -> Config:
    config = Config(**given)
    for name, value in config.to_dict().items():
        if name == "strategy":
            if value not in rule.STRATEGIES:
                raise ValueError(f"config: strategy {value!r} is none of {', '.join(rule.STRATEGIES)}")
            continue
        if name == "batched":
            if type(value) is not bool or (value and config.strategy != "library"):
                raise ValueError("config: batched is said, true or false, of the library alone")
            continue
        if name == "bias_pass":
            if value is not False:
                raise ValueError("config: bias_pass is the rule's to say")
            continue
        one_row = config.strategy == "skinny" and config.block_m == 1  # which may hold all of K
        least, most = (0, 512) if name == "registers" else (1, 32768 if name == "block_k" and one_row else 1024)
        whole = type(value) is int and least <= value <= most
        if not whole or (name in ("block_m", "block_n", "block_k", "num_warps") and value & (value - 1)):  # type: ignore[operator]
            raise ValueError(f"config: {name} cannot be {value!r}")
    return config


def _check(given: Any, kinds: Mapping[str, Any]) -> None:
    if type(given) is not dict or set(given) != set(kinds):
        raise ValueError(f"fields are {', '.join(kinds)}")
    for name, kind in kinds.items():
        if type(given[name]) not in (kind if isinstance(kind, tuple) else (kind,)):
            raise TypeError(f"{name} cannot be {given[name]!r}")
