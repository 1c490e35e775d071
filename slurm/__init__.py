"""Submitting runs to a cluster, surviving there, and watching them."""
