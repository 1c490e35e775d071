"""Data sets: every kind of data in a file of its own, behind the interface in ``base.py``."""
