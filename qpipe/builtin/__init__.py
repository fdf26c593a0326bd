"""The host's own features, written as plugins of itself."""
