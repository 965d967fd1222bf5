"""Diffing: what differs between two models, in their structure."""
