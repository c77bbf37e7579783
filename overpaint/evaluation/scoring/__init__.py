"""What images and pairs of images are given: measures, scores, journals of both."""
