"""Seconds and memory per optimizer step, beside TRL's DPOTrainer: `make bench`."""
