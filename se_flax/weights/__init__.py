"""Weights of other frameworks and of our own, to and from variables."""
