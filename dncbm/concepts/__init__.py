"""From features to named concepts: the sparse autoencoder, the vocabulary, names, and concept strengths.

Imports `runs` and `features`. The rooms `probe` and `explain` may import this one.
"""
