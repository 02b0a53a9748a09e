"""One run: its folder and checkpoints, its initial weights, evaluation, generation."""
