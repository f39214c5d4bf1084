"""Attacks on networks, and what can be believed of their outcome."""
