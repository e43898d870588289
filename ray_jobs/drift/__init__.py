"""What `ray_jobs.monitor` consists of: periods, counts, what they are gathered from, verdicts."""
