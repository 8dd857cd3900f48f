"""The public surface is this list, and everything on it is documented."""

import inspect
import types

import pytest

import ckpt_jax

PUBLIC = (
    # checkpoints of objects
    "Checkpoint",
    "LoadStatus",
    "Trackable",
    "AutoTrackable",
    "Variable",
    "PythonState",
    "NoDependency",
    "OptaxState",
    "optax_state",
    "PerProcess",
    "no_automatic_dependency_tracking",
    "SlotOwner",
    "DelegatingTrackable",
    "register_view",
    "CheckpointAdapter",
    "ReshardCallback",
    "FrozenSaver",
    # checkpoints of pytrees
    "save",
    "sync",
    "restore",
    "load",
    "plan_restore",
    "save_object",
    "load_object",
    "load_function",
    "LoadedFunction",
    "restore_nodes",
    "Transpose",
    "Cast",
    "Stack",
    "Unstack",
    "Reshape",
    "Pad",
    "Slice",
    "Split",
    "Concat",
    "Map",
    "Dequantize",
    "inverse",
    # looking into one
    "CheckpointReader",
    "load_checkpoint",
    "list_variables",
    "load_variable",
    "object_metadata",
    "list_objects",
    "TrackableView",
    "CheckpointView",
    "show",
    "verify",
    "VerifyReport",
    "Damage",
    "RestoreReport",
    "ReportEntry",
    # the checkpoints of a directory
    "latest_checkpoint",
    "get_checkpoint_state",
    "CheckpointState",
    "checkpoints_iterator",
    "CheckpointManager",
    "PreemptionHandler",
    "CheckpointRecord",
    "RetentionPolicy",
    "KeepLatest",
    "KeepEveryNSteps",
    "KeepBest",
    "KeepAny",
    "KeepFor",
    "Removal",
    # when to save
    "SaveAny",
    "SaveAtSteps",
    "SaveContinuously",
    "SaveEveryNSeconds",
    "SaveEveryNSteps",
    "SaveOccasion",
    "SaveOnPreemption",
    "SavePolicy",
    "evaluate_new",
    "preflight",
    # formats of other libraries, and of one's own
    "readers",
    "register_format",
    "export",
    "convert",
    # object stores
    "copy",
    "use_storage",
    # savers and classes of one's own
    "io",
    "register_checkpoint_saver",
    "register_serializable",
    "registration_scope",
    # what it costs
    "metrics",
    # options
    "CheckpointOptions",
    "ShardByDevice",
    "ShardByProcess",
    "MaxShardSize",
    "PlannedSlice",
    # errors
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "UnsupportedFormatError",
    "RestoreMismatchError",
    "UnsaveableError",
    "ShardError",
    "RegistrationError",
    "AsyncSaveError",
    "SupersededError",
    "CommitInDoubtError",
    "BarrierTimeoutError",
    "ProcessError",
    "PreflightError",
)


def test_the_public_names_are_these():
    assert sorted(ckpt_jax.__all__) == sorted(PUBLIC)


def test_nothing_else_is_visible():
    """What the namespace holds besides is private or a module of the package."""
    visible = {
        name
        for name, value in vars(ckpt_jax).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert visible <= {*PUBLIC, "annotations"}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name: str):
    value = getattr(ckpt_jax, name)
    text = (value.__doc__ or "").strip()
    assert text, f"{name} has no docstring"
    # What dataclasses write where a class has none is its signature.
    assert not text.startswith(f"{name}("), f"{name} has no docstring of its own"


@pytest.mark.parametrize(
    "name", [name for name in PUBLIC if inspect.isclass(vars(ckpt_jax).get(name))]
)
def test_the_public_methods_of_a_class_are_documented(name: str):
    cls = getattr(ckpt_jax, name)
    undocumented = [
        f"{name}.{attribute}"
        for attribute, member in vars(cls).items()
        if not attribute.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property | classmethod))
        and not inspect.getdoc(getattr(cls, attribute))
    ]
    assert not undocumented
