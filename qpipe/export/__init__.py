"""Packed checkpoints: writing, checking and describing them. Nothing here trains."""
