"""The jobs: one file, one `ray job submit`. Each parses, connects to Ray, runs and reports."""
