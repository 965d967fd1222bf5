"""Matching: a plan against the values of a graph, and what keeps it from being there."""
