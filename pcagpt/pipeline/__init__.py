"""From settings to results: plans, their jobs, and tasks on one trained model."""
