"""What came out: draw paired images, score them, compare models, report."""

from .beside import Measured, beside_published
from .compare import Comparison, Row, compare
from .curves import Curve, Panel
from .figures import curve_section
from .folder import ImageFolder, write_folder
from .generate import Drawable, draw, generate
from .images import DrawnImages, ImageSource, Pixels, to_images, to_pixels
from .other_images import OtherImages
from .page import Section
from .pareto import Point, pareto_section
from .pipelines import PipelineDrawable
from .plan import KINDS, DrawConfig, PlannedImage, plan
from .processes import gather, merge, shard
from .prompt_sets import Prompt, PromptSet, prompt_set
from .published import Published
from .ranking import spearman
from .report import Report
from .score import Column, Measure, Metric, Scores, score
from .score_table import write_scores
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
