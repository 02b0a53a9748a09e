"""One run: its folder and checkpoints, its start, and what a trained model can do."""
