"""`pixtune bench`: measures real training steps of a config on this machine, and compares them with a stored result."""
