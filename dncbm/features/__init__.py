"""From images to features: data sets, encoders, extraction, the store, and the two stages that use them.

Imports `runs`. The rooms `concepts`, `probe` and `explain` may import this one.
"""
