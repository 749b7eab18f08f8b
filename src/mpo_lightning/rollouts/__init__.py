"""Making of groups: sampling of responses to prompts, and scoring."""
