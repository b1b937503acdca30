"""Training: the codec, the clip cache, the generator."""
