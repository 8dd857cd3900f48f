"""Object-based checkpoints for JAX and Flax.

    import ckpt_jax as ckpt

    checkpoint = ckpt.Checkpoint(model=model, optimizer=optimizer)
    path = checkpoint.save("runs/a/ckpt")
    checkpoint.restore(ckpt.latest_checkpoint("runs/a")).assert_consumed()

Objects are saved as a graph, and a restore matches them by the names of the edges between them.
See `Checkpoint` for objects, `save`, `restore` and `load` for trees, and `io` to write savers.
"""

from ckpt_jax import io, metrics, readers
from ckpt_jax.api.checkpoint import Checkpoint
from ckpt_jax.api.copying import copy
from ckpt_jax.api.export import convert, export
from ckpt_jax.api.frozen import FrozenSaver
from ckpt_jax.api.functions import LoadedFunction, load_function
from ckpt_jax.api.inspect import (
    CheckpointView,
    TrackableView,
    list_objects,
    list_variables,
    load_checkpoint,
    load_variable,
    object_metadata,
)
from ckpt_jax.api.latest import checkpoints_iterator, latest_checkpoint
from ckpt_jax.api.per_process import PerProcess
from ckpt_jax.api.preflight import preflight
from ckpt_jax.api.restore_nodes import restore_nodes
from ckpt_jax.api.revive import load_object, save_object
from ckpt_jax.api.status import LoadStatus
from ckpt_jax.api.tree import load, plan_restore, restore, save, sync
from ckpt_jax.api.verify import Damage, VerifyReport, verify
from ckpt_jax.errors import (
    AsyncSaveError,
    BarrierTimeoutError,
    CheckpointError,
    CheckpointNotFoundError,
    CommitInDoubtError,
    CorruptCheckpointError,
    PreflightError,
    ProcessError,
    RegistrationError,
    RestoreMismatchError,
    ShardError,
    SupersededError,
    UnsaveableError,
    UnsupportedFormatError,
)
from ckpt_jax.manage.due import (
    SaveAny,
    SaveAtSteps,
    SaveContinuously,
    SaveEveryNSeconds,
    SaveEveryNSteps,
    SaveOccasion,
    SaveOnPreemption,
    SavePolicy,
)
from ckpt_jax.manage.evaluate import evaluate_new
from ckpt_jax.manage.manager import CheckpointManager
from ckpt_jax.manage.preemption import PreemptionHandler
from ckpt_jax.manage.removal import Removal
from ckpt_jax.manage.retention import (
    CheckpointRecord,
    KeepAny,
    KeepBest,
    KeepEveryNSteps,
    KeepFor,
    KeepLatest,
    RetentionPolicy,
)
from ckpt_jax.objects.delegate import DelegatingTrackable
from ckpt_jax.objects.optax_states import OptaxState, optax_state
from ckpt_jax.objects.python_state import PythonState
from ckpt_jax.objects.registry import (
    register_checkpoint_saver,
    register_serializable,
    registration_scope,
)
from ckpt_jax.objects.state import NoDependency
from ckpt_jax.objects.trackable import (
    AutoTrackable,
    SlotOwner,
    Trackable,
    no_automatic_dependency_tracking,
)
from ckpt_jax.objects.variable import Variable
from ckpt_jax.objects.views import register_view
from ckpt_jax.options import (
    CheckpointOptions,
    MaxShardSize,
    PlannedSlice,
    ShardByDevice,
    ShardByProcess,
)
from ckpt_jax.readers import register_format
from ckpt_jax.report import ReportEntry, RestoreReport
from ckpt_jax.restoring.adapters import CheckpointAdapter, ReshardCallback
from ckpt_jax.restoring.checkpoint_reader import CheckpointReader
from ckpt_jax.restoring.inverses import inverse
from ckpt_jax.restoring.transforms import (
    Cast,
    Concat,
    Dequantize,
    Map,
    Pad,
    Reshape,
    Slice,
    Split,
    Stack,
    Transpose,
    Unstack,
)
from ckpt_jax.showing.overview import show
from ckpt_jax.store.objects import use_storage
from ckpt_jax.store.state_file import CheckpointState, get_checkpoint_state
from ckpt_jax.version import __version__ as __version__

__all__ = [
    "AsyncSaveError",
    "SupersededError",
    "AutoTrackable",
    "BarrierTimeoutError",
    "Cast",
    "Checkpoint",
    "CheckpointAdapter",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CheckpointOptions",
    "CheckpointReader",
    "CheckpointRecord",
    "CheckpointState",
    "CheckpointView",
    "CommitInDoubtError",
    "Concat",
    "CorruptCheckpointError",
    "Damage",
    "DelegatingTrackable",
    "Dequantize",
    "FrozenSaver",
    "KeepAny",
    "KeepBest",
    "KeepEveryNSteps",
    "KeepFor",
    "KeepLatest",
    "LoadStatus",
    "LoadedFunction",
    "Map",
    "MaxShardSize",
    "NoDependency",
    "OptaxState",
    "Pad",
    "PerProcess",
    "PlannedSlice",
    "PreemptionHandler",
    "PreflightError",
    "ProcessError",
    "PythonState",
    "RegistrationError",
    "Removal",
    "ReportEntry",
    "Reshape",
    "ReshardCallback",
    "RestoreMismatchError",
    "RestoreReport",
    "RetentionPolicy",
    "SaveAny",
    "SaveAtSteps",
    "SaveContinuously",
    "SaveEveryNSeconds",
    "SaveEveryNSteps",
    "SaveOccasion",
    "SaveOnPreemption",
    "SavePolicy",
    "ShardByDevice",
    "ShardByProcess",
    "ShardError",
    "Slice",
    "SlotOwner",
    "Split",
    "Stack",
    "Trackable",
    "TrackableView",
    "Transpose",
    "UnsaveableError",
    "Unstack",
    "UnsupportedFormatError",
    "Variable",
    "VerifyReport",
    "checkpoints_iterator",
    "convert",
    "copy",
    "evaluate_new",
    "export",
    "get_checkpoint_state",
    "inverse",
    "io",
    "latest_checkpoint",
    "list_objects",
    "list_variables",
    "load",
    "load_checkpoint",
    "load_function",
    "load_object",
    "load_variable",
    "metrics",
    "no_automatic_dependency_tracking",
    "object_metadata",
    "optax_state",
    "plan_restore",
    "preflight",
    "readers",
    "register_checkpoint_saver",
    "register_format",
    "register_serializable",
    "register_view",
    "registration_scope",
    "restore",
    "restore_nodes",
    "save",
    "save_object",
    "show",
    "sync",
    "use_storage",
    "verify",
]
