"""Servers as a reader would write them first, after the official examples, to compare with."""
