"""From predictions to explanations: what is computed from them, what is dumped, and everything that is drawn.

Imports every other room. Only `stages` may import this one.
"""
