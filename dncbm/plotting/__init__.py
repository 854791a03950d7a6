"""Figures, one module each. They draw what `explanations` computed and need no display and no LaTeX."""
