"""How it starts: the command line, the composition root, local clusters."""
