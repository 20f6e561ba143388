"""The queue of runs on one machine: which run comes next, and how it is started so that it outlives whoever started it.

`store` holds the entries in an SQLite file, `starting` decides what is due and starts it, `attendant` is the process
that stands beside each run until its end. The file and one lock for each entry are all there is: any number of servers
may serve a queue, and each may be killed at any moment.
"""
