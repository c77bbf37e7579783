"""Images: what to draw, drawing it, images of other systems, and their files."""
