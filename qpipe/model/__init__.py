"""Access to models: their map, their attention, and taps at their sites. Knows nothing of quantizers' arithmetic."""
