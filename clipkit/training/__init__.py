"""Training: the loop (read it first), the engine under it, and checkpoints that know everything about themselves."""
