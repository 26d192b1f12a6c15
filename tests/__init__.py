"""A package, so that `tests.support` is this one even where some installed package brought a `tests` of its own."""
