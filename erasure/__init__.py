"""What must not appear: concepts, the methods that erase them, and the constraint that keeps them erased."""

from .concept import NUDITY, STRIPES, Concept
from .constraint import ErasureConstraint, ImageConstraint, ObjectiveConstraint
from .cost import ImageCost, ScoreCeiling
from .erased import Erasure
from .lagrangian import Lagrangian, LagrangianConfig
from .protocols import ConceptBatch, Edit, Objective
from .stay_erased import StayErased, StayErasedConfig
from .strength import AdjustableMethod, StrengthSearch, Trial, strongest_erasure, strongest_setting
from .uce import UCE, UCEConfig

__all__ = [
    "NUDITY",
    "STRIPES",
    "UCE",
    "AdjustableMethod",
    "Concept",
    "ConceptBatch",
    "Edit",
    "Erasure",
    "ErasureConstraint",
    "ImageConstraint",
    "ImageCost",
    "Lagrangian",
    "LagrangianConfig",
    "Objective",
    "ObjectiveConstraint",
    "ScoreCeiling",
    "StayErased",
    "StayErasedConfig",
    "StrengthSearch",
    "Trial",
    "UCEConfig",
    "strongest_erasure",
    "strongest_setting",
]
