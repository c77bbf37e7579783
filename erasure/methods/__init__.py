"""The ten methods, a file or a folder each, and what several of them share."""
