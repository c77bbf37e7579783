"""What came out: draw paired images, score them, compare models, report."""

from .experiments.compare import Comparison, Row, compare
from .experiments.published import Published
from .experiments.published_comparison import Measured, beside_published
from .images.drawable import Drawable, PipelineDrawable
from .images.drawing import draw, generate
from .images.files import DrawnImages, ImageFolder, ImageSource, Pixels, to_images, to_pixels, write_folder
from .images.pairs import OtherImages
from .images.plan import KINDS, DrawConfig, PlannedImage, plan, shard
from .metrics.statistics import (
    Estimate,
    mean_estimate,
    paired_difference,
    paired_rate_difference,
    rate_estimate,
    spearman,
)
from .prompts.prompt_sets import Prompt, PromptSet, prompt_set
from .report.curves import Curve, Panel
from .report.figures import curve_section
from .report.page import Section
from .report.pareto import Point, pareto_section
from .report.report import Report
from .report.table import text_table
from .scoring.score import Column, Measure, Metric, Scores, gather, merge, score, write_scores

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
    "Measured",
    "Metric",
    "OtherImages",
    "Panel",
    "PipelineDrawable",
    "Pixels",
    "PlannedImage",
    "Point",
    "Prompt",
    "PromptSet",
    "Published",
    "Report",
    "Row",
    "Scores",
    "Section",
    "beside_published",
    "compare",
    "curve_section",
    "draw",
    "gather",
    "generate",
    "mean_estimate",
    "merge",
    "paired_difference",
    "paired_rate_difference",
    "pareto_section",
    "plan",
    "prompt_set",
    "rate_estimate",
    "score",
    "shard",
    "spearman",
    "text_table",
    "to_images",
    "to_pixels",
    "write_folder",
    "write_scores",
]
