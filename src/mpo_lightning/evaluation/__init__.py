"""Evaluation: the table of metrics, prediction files, answer formats, win rates."""
