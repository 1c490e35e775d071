"""A run folder: its files, names, records and states, and who may write into it.

The bottom of the house. Training writes run folders, launching watches over them, and the
analysis reads them; what they must agree on stands here, once. Standard library, numpy and
YAML only, so that nothing here is slow to import.
"""
