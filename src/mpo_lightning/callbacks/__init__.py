"""Callbacks that watch a run: training health, progress bar, sampled responses."""
