"""Making data: responses sampled from a model, their scores, and merged models between rounds."""
