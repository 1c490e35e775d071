"""Orthogonality-informed adaptive low rank (OIALR): weights as U Sigma V^h with frozen U and V."""
