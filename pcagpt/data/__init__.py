"""Corpora: from text or token files to batches."""
