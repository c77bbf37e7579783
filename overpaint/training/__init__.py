"""What every training run needs: accelerate, optimizer, checkpoints and resume, trackers, progress."""

from .batch import draw_batch
from .checkpoint import Checkpoint, CheckpointFolder, DamagedCheckpointError, load_checkpoint
from .config import TrainingConfig
from .descent import NonFiniteError
from .ema import ExponentialMovingAverage
from .folder import check_output_dir
from .images import image_grid
from .metrics import MetricsFile, read_metrics
from .optimizer import make_optimizer
from .processes import from_main, process_state
from .require import require
from .run import TrainingRun, check_trainable
from .signals import TERMINATED
from .types import Stateful, Trainable

__all__ = [
    "TERMINATED",
    "Checkpoint",
    "CheckpointFolder",
    "DamagedCheckpointError",
    "ExponentialMovingAverage",
    "MetricsFile",
    "NonFiniteError",
    "Stateful",
    "Trainable",
    "TrainingConfig",
    "TrainingRun",
    "check_output_dir",
    "check_trainable",
    "draw_batch",
    "from_main",
    "image_grid",
    "load_checkpoint",
    "make_optimizer",
    "process_state",
    "read_metrics",
    "require",
]
