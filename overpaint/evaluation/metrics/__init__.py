"""Numbers of many images: distances between sets, preference accuracy, statistics."""
