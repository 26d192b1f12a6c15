"""What there is to tune: the products of MLPs, each at some numbers of rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlpdsl.bench.suites import Row
from mlpdsl.codegen import narrow
from mlpdsl.codegen.candidates import candidates
from mlpdsl.codegen.lower import lower
from mlpdsl.codegen.plan import Config, products
from mlpdsl.spec import MLPSpec
from mlpdsl.tables import Product
from mlpdsl.target import Target

__all__ = ["Job", "jobs"]


@dataclass(frozen=True)
class Job:
    """One product at `rows` rows of x: of which MLP, which stage, and its M, N, K. `name` is the MLP's, for people."""

    name: str
    spec: MLPSpec
    target: Target
    product: Product
    rows: int
    stage: int
    m: int
    n: int
    k: int

    @property
    def key(self) -> str:
        """What tells it from other jobs: the product and the rows, whatever MLP they were first met in."""
        p = self.product
        words = (p.role, p.path, p.dtype, p.precision, f"planes={p.planes}", f"epilogue={int(p.epilogue)}", f"{p.n}x{p.k}")
        return f"{' '.join(words)} m={self.rows}"

    @property
    def train(self) -> bool:
        """Whether it belongs to backward."""
        return self.product.role not in ("hidden", "output")

    def candidates(self) -> list[Config]:
        """The rule's config, then everything else worth timing."""
        p = self.product
        words = {"dtype": p.dtype, "precision": p.precision, "planes": p.planes, "target": self.target, "epilogue": p.epilogue}
        return candidates(p.role, p.path, self.m, self.n, self.k, **words)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.name}, {self.product.role}[{self.stage}] {self.m}x{self.n}x{self.k}, M = {self.rows}"


def jobs(rows: Iterable[Row], target: Target) -> list[Job]:
    """Every product of the rows on a target, each once: forward's, but where all linears are one launch, and where a row's pass is
    "train" backward's too.

    A product that several MLPs have is measured in the first of them.
    """
    found: dict[str, Job] = {}
    for row in rows:
        plan = lower(row.spec, target)
        one_launch = narrow.network(plan, row.m) is not None
        for role, stage, m, n, k in products(plan, row.m):
            product, at = Product.of(plan, role, m, n, k)
            job = Job(row.name, row.spec, target, product, at, stage, m, n, k)
            if row.passes == "train" if job.train else not one_launch:
                found.setdefault(job.key, job)
    return list(found.values())
