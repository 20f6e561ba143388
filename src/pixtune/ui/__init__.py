"""The page in a browser: `pixtune ui`. Reads files and signals runs; owns nothing that a run needs.

`server` puts the routes together, `security` stands before them, `roots` decides which folders may be seen. A run is a
process of its own, started as a person would start it; what the page shows of it is read from the run's folder. The
room imports neither torch nor the loop.
"""
