"""One runnable file for each claim of the README; results lie in `benchmarks/results/`."""
