"""Images: what to draw, drawing it, other systems' pictures, one reader of image files."""
