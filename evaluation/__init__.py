"""What came out: draw paired images, score them, compare models, report."""

from .compare import Comparison, Row, compare
from .curves import Curve, Panel
from .folder import ImageFolder, write_folder
from .generate import Drawable, draw, generate
from .grid import save_grid
from .images import DrawnImages, ImageSource, Pixels, to_images, to_pixels
from .plan import KINDS, DrawConfig, PlannedImage, plan
from .processes import gather, merge, shard
from .report import Report
from .score import Column, Measure, Metric, Scores, score
from .statistics import Estimate, mean_estimate, paired_difference, paired_rate_difference, rate_estimate
from .table import text_table

__all__ = [
    "KINDS",
    "Column",
    "Comparison",
    "Curve",
    "DrawConfig",
    "Drawable",
    "DrawnImages",
    "Estimate",
    "ImageFolder",
    "ImageSource",
    "Measure",
    "Metric",
    "Panel",
    "Pixels",
    "PlannedImage",
    "Report",
    "Row",
    "Scores",
    "compare",
    "draw",
    "gather",
    "generate",
    "mean_estimate",
    "merge",
    "paired_difference",
    "paired_rate_difference",
    "plan",
    "rate_estimate",
    "save_grid",
    "score",
    "shard",
    "text_table",
    "to_images",
    "to_pixels",
    "write_folder",
]
