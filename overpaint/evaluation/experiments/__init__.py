"""What an experiment is about, the study's experiments, published numbers."""
