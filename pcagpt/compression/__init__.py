"""Compression of a trained model's table without training."""
