"""The commands of mpo-lightning, one module each."""
