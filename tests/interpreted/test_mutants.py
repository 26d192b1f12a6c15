"""The mutation gate in CI: every wrong kernel of `tests.mutation` is refused by an ordinary property, and correct ones are not.

Each mutant here in one family; in full: `python -m tests.mutation`, whose table is committed and compared with the list here.
"""

from __future__ import annotations

import pytest

from tests import support

if not support.INTERPRETING:
    pytest.skip(support.NO_INTERPRETER, allow_module_level=True)

import torch

from mlpdsl import MLPSpec, source
from mlpdsl.names import ACTIVATIONS
from mlpdsl.testing.calls import CallError, check_call, make_call
from mlpdsl.testing.oracle import OracleError
from tests.mutation import gate, table
from tests.mutation.activations import CONSTANTS
from tests.mutation.families import FAMILIES
from tests.mutation.mutant import Mutant, mutant
from tests.mutation.properties import LawError, computed_again, laws, sweep
from tests.mutation.registry import MUTANTS, SURVIVORS, cases

torch.set_num_threads(1)

RECORD = table.read()


def soonest(mutant: Mutant) -> tuple[int, str]:
    """The fewest examples after which the committed table has the mutant refused, 0 where it has none, and the family."""
    numbers = {
        each["family"]: each["killer"]["example"] for each in RECORD["mutants"] if each["name"] == mutant.name and each["killer"]
    }
    return min((numbers.get(family, 0), family) for family in mutant.families)


# Every second one that the first example refuses; of the constants, which are much alike and take a sweep of a second or two each,
# every sixteenth. The full run has all of them.
TRIED = [
    m for m in MUTANTS if m.name not in SURVIVORS and soonest(m)[0] <= 1 and (m not in CONSTANTS or CONSTANTS.index(m) % 8 == 0)
][::2]


@pytest.mark.parametrize("wrong", TRIED, ids=lambda m: f"{m.name}, {m.families[0]}")
def test_refused(wrong: Mutant) -> None:
    assert gate.hunt(wrong, soonest(wrong)[1]) is not None


def test_more_partial_sums_than_fit_one_step() -> None:
    """`sum_rows` adds 16 at a time, each of 64 rows and more: what drawn calls, of 150 rows at most, do not reach."""
    spec = FAMILIES["gated"].replace(dims=(8, 9, 8))
    call = make_call(spec, (1100,), 3)
    check_call(call)
    (wrong,) = (m for m in MUTANTS if m.name in SURVIVORS)
    with gate.running(wrong.text), pytest.raises(OracleError, match="gradient of"):
        check_call(call)


def test_every_text_is_still_there() -> None:
    """Every family of every mutant, also those that only the full run tries."""
    texts = {mutant.text(FAMILIES[family]) for mutant, family in cases()}
    assert len(texts) == len(cases()), "two mutants are one"


@pytest.mark.parametrize("family", list(FAMILIES)[::2])  # the others are in the full run
def test_correct_cases_pass(family: str) -> None:
    tried, refused = gate.alarms(family, 2)  # the full run has many more
    assert not refused
    assert tried >= 3


def test_an_equal_kernel_survives() -> None:
    """The gate answers None where there is nothing to refuse, so a kill is the properties' doing and not the gate's."""
    same = mutant("the same sum", "relu", "hidden_masked", ("inside_k = k + ks < K", "inside_k = ks + k < K"))
    assert gate.hunt(same, "relu", 2) is None


def test_a_crash_is_no_kill() -> None:
    crash = mutant("a name that is not there", "relu", "hidden_masked", ("inside_k = k + ks < K", "inside_k = nowhere"))
    with pytest.raises(gate.Malformed, match="a name that is not there"):
        gate.hunt(crash, "relu", 5)


def test_text_that_is_gone_is_said() -> None:
    for old, within in (("text that nobody wrote", "hidden_masked"), ("inside_k", "no_such_kernel")):
        with pytest.raises(AssertionError, match="no longer has"):
            gate.hunt(mutant("gone", "relu", within, (old, "")), "relu", 5)


def test_a_change_stays_in_its_function() -> None:
    spec = FAMILIES["relu"]
    text, own = mutant("one", "relu", "output_masked", ("BLOCK_K", "OTHER")).text(spec), source.generate(spec).text
    start = own.index("def output_masked(")
    end = own.index("@triton.jit", start)
    assert text[:start] == own[:start] and text.endswith(own[end:]) and "OTHER" in text and "BLOCK_K" in text
    assert "BLOCK_K" not in text[start : len(text) - len(own) + end]


def test_each_law_can_fail() -> None:
    """The laws, each on kernels that break it and nothing that the oracle sees."""
    spec = FAMILIES["relu"]
    call = make_call(spec, (5,), 0, x="strided", requires_grad=("x",))
    broken = {
        "fewer gradients": ("backward", "grads[0] = launch_input_grad(grad, weight_tensors, pick)",
                            "grads[0] = launch_input_grad(grad, weight_tensors, pick) * (1.0 if all(needs) else 1.0000002)"),
        "dense copies": ("launch_output", "return out, None", "return out * (1.0 if kept_dense else 1.0000002), None"),
        "wrote what forward had saved": ("launch_hidden_grad", "preact_grad = launch.empty_like(preact)", "preact_grad = preact"),
        "NaN in another row": ("launch_output", "return out, None", "return out + 0.0 * out.sum(), None"),
        "1024 times x": ("launch_output", "return out, None", "return out + 0.25, None"),
    }  # fmt: skip
    for message, (within, old, new) in broken.items():
        edits = [(old, new.replace("kept_dense", "weights[0].is_contiguous()"))]
        used = make_call(spec, (5,), 0, weights="transposed") if "dense" in message else call
        with gate.running(mutant(message, "relu", within, *edits).text), pytest.raises(LawError, match=message):
            laws(used)
    laws(call)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_hidden_values_computed_again(name: str) -> None:
    """Every activation as backward emits it for the weight gradient, at every point of the sweep."""
    gated = ACTIVATIONS.index(name) % 2 == 0
    computed_again(MLPSpec(dims=(1, 1, 1), activation=name, gated=gated, bias=gated))


def test_the_sweep_can_fail() -> None:
    spec = MLPSpec(dims=(1, 1, 1), activation="silu")
    sweep(spec)
    again = mutant("again", "relu", "activate_grad", ("t4 * t3", "t4 * t3 * 1.00001"))
    with gate.running(again.text), pytest.raises(OracleError):
        sweep(spec)
    with gate.running(mutant("late", "relu", "activate", ("200.0", "2.0")).text), pytest.raises(OracleError):
        sweep(spec)


def test_verdicts_are_read() -> None:
    """What the table calls a refusal, from the errors as they are raised."""

    def said(within: str, old: str, new: str, **words: object) -> tuple[str, float | None]:
        spec = FAMILIES["plain"]
        with gate.running(mutant("said", "plain", within, (old, new)).text), pytest.raises(AssertionError) as raised:
            check_call(make_call(spec, (20,), 3, **words))
        return gate.verdict(raised.value)

    rule, ratio = said("output_masked", "acc.to(tl.float16)", "(acc * 1.01).to(tl.float16)")
    assert rule == "bound, y" and ratio is not None and ratio > 1
    rule, ratio = said("weight_grad_masked", "acc.to(tl.float16)", "(acc * 1.01).to(tl.float16)")
    assert rule.startswith("bound, gradient of ") and rule.endswith(".weight") and ratio is not None and ratio > 1
    assert said("output_masked", "mask=inside)", "mask=inside & (cols > 0)[None, :])") == ("NaN in y", None)
    assert said("launch_hidden_grad", "launch.empty_like(preact)", "preact", pattern="retained")[0].endswith(
        "has other bits the second time"
    )
    assert gate.verdict(CallError("3 elements written after a tensor of 6 torch.float32 elements")) == ("guard zone", None)
    rms = OracleError(
        "gradient of x of MLPSpec(…): every element is within its bound, but the root mean square error 0.3 exceeds 0.2, 3 …"
    )
    assert gate.verdict(rms) == ("root mean square, gradient of x", pytest.approx(1.5))


def test_the_committed_table() -> None:
    """The table is of the mutants that there are, and says what the gate promises."""
    listed = [(each["name"], each["family"], each["within"]) for each in RECORD["mutants"]]
    assert listed == [(mutant.name, family, mutant.within) for mutant, family in cases()], "run python -m tests.mutation"
    assert RECORD["families"] == {name: spec.to_json() for name, spec in FAMILIES.items()}
    assert RECORD["survivors"] == SURVIVORS
    left = {each["name"] for each in RECORD["mutants"] if each["killer"] is None}
    assert left == set(SURVIVORS)
    assert len(SURVIVORS) * 25 <= len(MUTANTS)
    assert all(each["killer"]["example"] <= RECORD["examples"] == 150 for each in RECORD["mutants"] if each["killer"])
    assert RECORD["false alarms"]["alarms"] == 0 and RECORD["false alarms"]["of"] >= 600
    assert table.PAGE.read_text(encoding="utf-8") == table.page(RECORD), "docs/mutants.md: run python -m tests.mutation"


def test_names_are_apart() -> None:
    named = [(mutant.name, family) for mutant, family in cases()]
    assert len(set(named)) == len(named)
    assert {mutant.name for mutant in MUTANTS} >= set(SURVIVORS)
