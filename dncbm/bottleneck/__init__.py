"""The trained bottleneck as one object, and what is exchanged with others: bundles, published files, other formats.

It imports the five rooms, the table of stages and their flags.
"""
