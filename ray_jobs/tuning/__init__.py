"""The parts of `ray_jobs.tune`: what may be tried, who proposes it, what was tried, what it showed.

space     which values a recipe's keys may take, and on what that depends
trials    what was tried, in a file that outlives the driver
searchers who proposes the next trial: tpe, random, grid; `llm` asks a language model
asha      which trials are stopped early, and whether that was too early
training  one training of a recipe, in this process or with Ray Train
search    the trials on the cluster, with Ray Tune
verdict   winner and default, trained to the end and compared on users that no trial saw
outcome   the winner's configuration, the table of trials and the report
"""
