"""The offline world of the quick start: a small language, a small model, a gold score."""
