"""The parts of `ray_jobs.monitor`: what is compared, how it is counted, and what that says.

axes     groups of users, and the slots of time that both periods are cut into
items    what is known of each item, from a first pass over the events
plan     what all tasks of a run share, the measures among it
lists    the lists that visitors were shown, from the log of the endpoint
counts   what the users of one bucket did
answers  what lists cover, how they score, and what their visitors did next
gather   the tasks, on the cluster
verdict  thresholds, and which measures are beyond theirs
reference what stays the same for as long as a version serves
report   the same, to be read by a person
"""
