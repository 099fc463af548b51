"""Results: a run, and everything that is said of one."""
