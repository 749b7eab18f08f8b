"""Studies of the paper's claims in a world where every response can be enumerated."""
