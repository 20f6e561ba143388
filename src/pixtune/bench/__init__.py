"""`pixtune bench`: what real training steps of a config cost on this machine, and against a stored result."""
