"""Making groups: responses sampled to prompts, and their scores."""
