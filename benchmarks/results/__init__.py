"""Tables of results: one folder under `examples/` per table, in it one folder with a recipe per row.

    python -m benchmarks.results --path data=DIR --path small=DIR

trains what has not been measured, compares it with what was expected, and writes docs/results.md.
"""
