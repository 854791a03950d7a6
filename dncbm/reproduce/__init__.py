"""The paper's experiment, and sweeps over it, as one plan: steps that call the stages, what they will take, tables.

Imports every room above it but `bottleneck`; only command lines import it.
"""
