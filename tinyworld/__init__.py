"""The tiny world."""
