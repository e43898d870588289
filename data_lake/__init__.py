"""The lake: Delta tables of events, items and users, and the sequences built from them.

Pure pyarrow, numpy and deltalake: nothing in here knows Ray or torch. `ray_jobs` spreads these
functions over a cluster.
"""
