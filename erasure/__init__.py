"""What must not appear: concepts, the methods that erase them, and the constraint that keeps them erased."""

from overpaint.checked import check_calls

from .changes import Change, WeightChange
from .concept import NUDITY, Concept
from .concept_prompts import ConceptPrompts, ConceptPromptsConfig
from .constraint import ErasureConstraint, ImageConstraint, ObjectiveConstraint
from .controllers import FixedWeight, Switch, WeightController
from .descend import DescentConfig, erase_by_descent
from .destruction import Destruction, DestructionConfig
from .erased import Erasure
from .floor import QualityConstraint, ReferenceDivergence, RewardFloor
from .gradient_conflict import gradient_cosine, project_conflicts
from .guards import GuardChange
from .lagrangian import Lagrangian, LagrangianConfig
from .methods.ac import AC, ACConfig
from .methods.ant import ANT, ANTConfig
from .methods.eraseflow import EraseFlow, EraseFlowConfig
from .methods.esd import ESD, ESDConfig
from .methods.mace import MACE, MACEConfig
from .methods.receler import AddedNetworks, Receler, RecelerConfig
from .methods.sa import SA, SAConfig
from .methods.safree import SAFREE, SAFREEConfig
from .methods.sld import SLD, SLDConfig
from .methods.uce import UCE, UCEConfig
from .official import load_erasure
from .protocols import ConceptBatch, Edit, Objective
from .reference_distance import ReferenceDistance, ReferenceDistanceConfig
from .registry import METHODS, ErasureMethod, erase, method_named
from .soft_attack import SoftAttack, SoftAttackConfig
from .strength import AdjustableMethod, StrengthSearch, Trial, strongest_erasure, strongest_setting

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
    "UCE",
    "ACConfig",
    "ANTConfig",
    "AddedNetworks",
    "AdjustableMethod",
    "Change",
    "Concept",
    "ConceptBatch",
    "ConceptPrompts",
    "ConceptPromptsConfig",
    "DescentConfig",
    "Destruction",
    "DestructionConfig",
    "ESDConfig",
    "Edit",
    "EraseFlow",
    "EraseFlowConfig",
    "Erasure",
    "ErasureConstraint",
    "ErasureMethod",
    "FixedWeight",
    "GuardChange",
    "ImageConstraint",
    "Lagrangian",
    "LagrangianConfig",
    "MACEConfig",
    "Objective",
    "ObjectiveConstraint",
    "QualityConstraint",
    "Receler",
    "RecelerConfig",
    "ReferenceDistance",
    "ReferenceDistanceConfig",
    "ReferenceDivergence",
    "RewardFloor",
    "SAConfig",
    "SAFREEConfig",
    "SLDConfig",
    "SoftAttack",
    "SoftAttackConfig",
    "StrengthSearch",
    "Switch",
    "Trial",
    "UCEConfig",
    "WeightChange",
    "WeightController",
    "erase",
    "erase_by_descent",
    "gradient_cosine",
    "load_erasure",
    "method_named",
    "project_conflicts",
    "strongest_erasure",
    "strongest_setting",
]

check_calls(__name__)
