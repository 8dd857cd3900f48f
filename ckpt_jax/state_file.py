"""The `checkpoint` file of a directory, by the name under which programs import it; see `store`."""

from ckpt_jax.store.state_file import (
    STATE_FILE,
    CheckpointState,
    get_checkpoint_state,
    update_checkpoint_state,
)

__all__ = ["STATE_FILE", "CheckpointState", "get_checkpoint_state", "update_checkpoint_state"]
