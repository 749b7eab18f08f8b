"""Apparatus of the studies: runs, training, grids of conditions, statistics, figures."""
