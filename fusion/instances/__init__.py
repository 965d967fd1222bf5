"""Instances: graphs of a pattern, spelled as exporters might, and mutants of them."""
