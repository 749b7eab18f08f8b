"""The show case: a real model on instructions whose constraints a program can verify."""
