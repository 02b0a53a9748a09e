"""From settings to results: plans, the jobs in them, and the tasks of one model."""
