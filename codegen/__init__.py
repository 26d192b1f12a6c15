"""Lowers an `MLPSpec` to a plan and prints the plan as source: `expr`, `plan`, `lower`, `emit`, `render`.

Imported as `mlpdsl.codegen`. Knows the ground floor (spec, errors, target) and jinja2; torch only to trace a function.
"""
