"""The report of a run: one page that says what the run supports, and shows the figures that this rests on."""
