"""What watches a run: speed, progress, samples, and the health of training."""
