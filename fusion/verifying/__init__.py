"""Verifying: the same inputs through two models."""
