"""All drawing: one module per kind of figure, and in `pages` what they share. It needs no display and no LaTeX."""

from dncbm.explain.plotting import global_explanations, local_explanations, meta_clusters, task_agnosticity

_PLOTS = (task_agnosticity.PLOT, meta_clusters.PLOT, local_explanations.PLOT, global_explanations.PLOT)
STAGES = tuple(stage for plot in _PLOTS for stage in (*plot.inputs, plot))
"""The two stages of every kind of explanation: its dump, then its plot."""
