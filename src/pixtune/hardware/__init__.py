"""Properties of a machine: `facts.py` holds them, `read.py` reads this machine's, `cards.py` knows those of others."""
