"""Formats of rows in public data sets, and their conversion to canonical rows."""
