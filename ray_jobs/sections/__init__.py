"""Sections of a configuration file, for `ray_jobs.config`; each job reads its own.

base     what all sections share
storage  where everything is written
models   training, search, evaluation, export, publishing
serving  the endpoint, lists for everybody, experiments and canaries
upkeep   the lake, drift, retraining, monitoring
"""
