"""Training: the Lightning module, metrics, checkpoints and resuming, failures."""
