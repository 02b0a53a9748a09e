"""Training of one run: its setup, its step and its loop."""
