"""The policy: base model, adapter, log-probabilities of responses, reference."""
