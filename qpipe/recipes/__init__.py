"""Recipes that ship with qpipe."""
