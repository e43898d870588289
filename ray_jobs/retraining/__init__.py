"""The parts of `ray_jobs.retrain`: what a week must pass, and how far a retraining has come.

new_weeks what the lake says of the new weeks and those before
gates     what the data and the challenger must pass
challenge challenger and champion, on the same targets and on the same machine
state     what a retraining has done, in a file that outlives a kill
report    the same, to be read by a person
"""
