"""Training methods behind one interface: one file, one method."""
