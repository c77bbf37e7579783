"""What came out: draw paired images, score them, compare models, report."""

from overpaint.checked import check_calls

from .experiments.published import Measured, Published, published_comparison
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
from .prompts import Prompt, PromptSet, prompt_set
from .report.charts import Chart, Curve, Panel, series_chart
from .report.model_card import ModelCard, push_to_hub
from .report.page import Report, Section, chart_section
from .report.pareto import Point, pareto_chart
from .report.table import Table, text_table
from .report.verdict import Verdict, verdict
from .scoring.compare import Comparison, Row, compare
from .scoring.score import Column, Measure, Metric, Scores, gather, merge, score, write_scores

__all__ = [
    "KINDS",
    "Chart",
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
    "ModelCard",
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
    "Table",
    "Verdict",
    "chart_section",
    "compare",
    "draw",
    "gather",
    "generate",
    "mean_estimate",
    "merge",
    "paired_difference",
    "paired_rate_difference",
    "pareto_chart",
    "plan",
    "prompt_set",
    "published_comparison",
    "push_to_hub",
    "rate_estimate",
    "score",
    "series_chart",
    "shard",
    "spearman",
    "text_table",
    "to_images",
    "to_pixels",
    "verdict",
    "write_folder",
    "write_scores",
]

check_calls(__name__)
