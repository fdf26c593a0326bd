"""Quantizers, quantized modules and plans. Knows nothing of training stages."""
