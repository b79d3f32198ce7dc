"""Deliberately broken variants."""
BROKEN = {}
