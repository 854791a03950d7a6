"""From predictions to explanations: what is computed from them, what is dumped, and everything that is drawn.

It imports `runs` to `probe`.
"""
