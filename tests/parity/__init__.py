"""Comparison of our networks with outputs that timm computed from the same synthetic weights."""
