"""What must not appear: concepts, the methods that erase them, and the constraint that keeps them erased."""

from .ac import AC, ACConfig
from .ant import ANT, ANTConfig
from .changes import Change, WeightChange
from .concept import NUDITY, STRIPES, Concept
from .constraint import ErasureConstraint, ImageConstraint, ObjectiveConstraint
from .cost import ImageCost, ScoreCeiling
from .descend import DescentConfig
from .erased import Erasure
from .erasers import AddedNetworks
from .esd import ESD, ESDConfig
from .lagrangian import Lagrangian, LagrangianConfig
from .mace import MACE, MACEConfig
from .methods import METHODS, ErasureMethod, erase, method_named
from .protocols import ConceptBatch, Edit, Objective
from .receler import Receler, RecelerConfig
from .sa import SA, SAConfig
from .safree import SAFREE, SAFREEConfig
from .sld import SLD, SLDConfig
from .stay_erased import StayErased, StayErasedConfig
from .strength import AdjustableMethod, StrengthSearch, Trial, strongest_erasure, strongest_setting
from .uce import UCE, UCEConfig

__all__ = [
    "AC",
    "ANT",
    "ESD",
    "MACE",
    "METHODS",
    "NUDITY",
    "SA",
    "SAFREE",
    "SLD",
    "STRIPES",
    "UCE",
    "ACConfig",
    "ANTConfig",
    "AddedNetworks",
    "AdjustableMethod",
    "Change",
    "Concept",
    "ConceptBatch",
    "DescentConfig",
    "ESDConfig",
    "Edit",
    "Erasure",
    "ErasureConstraint",
    "ErasureMethod",
    "ImageConstraint",
    "ImageCost",
    "Lagrangian",
    "LagrangianConfig",
    "MACEConfig",
    "Objective",
    "ObjectiveConstraint",
    "Receler",
    "RecelerConfig",
    "SAConfig",
    "SAFREEConfig",
    "SLDConfig",
    "ScoreCeiling",
    "StayErased",
    "StayErasedConfig",
    "StrengthSearch",
    "Trial",
    "UCEConfig",
    "WeightChange",
    "erase",
    "method_named",
    "strongest_erasure",
    "strongest_setting",
]
