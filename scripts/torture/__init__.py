"""The parts of `scripts/torture.py`: cases of what can go wrong, and their judging."""
