"""Declared jobs: what is trained (`job`), and the loop that trains it without losing work."""
