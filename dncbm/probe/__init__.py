"""From concept strengths to predictions: the linear probe, its solvers, baselines, accuracy at NEC, the results table.

Imports `runs`, `features` and `concepts`. The room `explain` may import this one.
"""
