"""Solvers: all of them get the same problem and the same number of evaluations, and report in the same way."""
