"""Experiments of the TrAct paper: configuration, training and the scripts that start them."""
