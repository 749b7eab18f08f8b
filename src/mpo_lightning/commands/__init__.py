"""What ``mpo-lightning`` can be told to do, one module a command."""
