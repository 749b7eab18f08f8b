"""The world of the studies: a grammar, its responses, judges, exact measures."""
