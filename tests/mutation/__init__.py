"""The mutation gate: named wrong kernels, each of which the ordinary properties must refuse within 150 examples.

    python -m tests.mutation                     # every mutant; writes benchmarks/results/mutants.json and docs/mutants.md
    python -m tests.mutation --only bias         # those with "bias" in their name; prints, and writes nothing

`mutant` says what a mutant is, `families` of which specs; `forward`, `backward`, `epilogue` and `activations` list them and
`registry` puts the lists together; `properties` are what may refuse one; `gate` runs them; `table` writes what came of it.
`tests/interpreted/test_mutants.py` runs the gate in CI, and holds the committed table against the registry.

**To add a mutant,** append `mutant(name, families, within, (old, new), …)` to one of the four lists. `within` is the function of
the generated text whose every occurrence of `old` becomes `new`. The name says what is wrong. A strategy whose kernels or launchers
are new brings a module with a list of its own, adds it to `registry`, and a family to `families` if no spec there is generated
that way. Then run the command, and commit the table with the list: CI compares the two.

A mutant must be wrong for some call of its families, in the interpreter too: one that reads memory it may not on a GPU only,
or overflows int32 only past 2³¹ elements, has no place here. Neither has one that is right: results are dense, so that their
inner stride may be taken as 1; descriptors fill with zeros, so that sums of gradients need no mask there; the value of a residual
decides no gradient.

**What counts as a kill** is the word of a property: `OracleError` (a bound, or the root mean square), `CallError` (a guard zone, an
input written, other bits the second time), `LawError` (a bitwise law). Any other exception, errors of mlpdsl's own included, says
nothing about the properties: such a mutant is malformed, and the gate fails with its name.

A survivor is a finding about the strategies or the oracle. It is named in `registry.SURVIVORS`, with what would kill it, and is
not made easier.
"""
