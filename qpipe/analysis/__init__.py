"""What quantization does to a model and where: what `qpipe analyze` measures. Every part returns plain JSON values."""
