"""What every training run needs: accelerate, optimizer, checkpoints and resume, trackers, progress."""

from overpaint.checked import check_calls

from .checkpoint import Checkpoint, CheckpointFolder, DamagedCheckpointError, load_checkpoint
from .config import TrainingConfig
from .early_stopping import EarlyStopping, HeldOut
from .engine import from_main, process_state
from .folder import check_output_dir
from .launcher import default_precision
from .logging import MetricsFile, image_grid, read_metrics
from .loop import Trainer, draw_batch, evaluate_held_out, train
from .memory import MemoryExhaustedError
from .optimizer_step import AveragedWeights, NonFiniteError, make_optimizer
from .record import read_run_record
from .run import TrainingRun, check_trainable
from .signals import INTERRUPTED, TERMINATED
from .types import Stateful, Trainable

__all__ = [
    "INTERRUPTED",
    "TERMINATED",
    "AveragedWeights",
    "Checkpoint",
    "CheckpointFolder",
    "DamagedCheckpointError",
    "EarlyStopping",
    "HeldOut",
    "MemoryExhaustedError",
    "MetricsFile",
    "NonFiniteError",
    "Stateful",
    "Trainable",
    "Trainer",
    "TrainingConfig",
    "TrainingRun",
    "check_output_dir",
    "check_trainable",
    "default_precision",
    "draw_batch",
    "evaluate_held_out",
    "from_main",
    "image_grid",
    "load_checkpoint",
    "make_optimizer",
    "process_state",
    "read_metrics",
    "read_run_record",
    "train",
]

check_calls(__name__)
