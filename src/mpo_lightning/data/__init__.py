"""Scored groups: from files to batches."""
