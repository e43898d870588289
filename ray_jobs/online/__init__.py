"""Versions compared by what their visitors did, for `ray_jobs.experiment` and `ray_jobs.canary`.

visitors          lists that were shown and what followed, brought together by visitor
experiment_report uplift between two versions, to be read by a person
canary_rules      when a canary is promoted or rolled back
canary_state      what was seen of a canary, look by look
"""
