"""From files of scored responses to batches of groups."""
