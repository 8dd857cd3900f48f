"""How Flax's objects are shown to the object graph: nnx in `modules`, Linen in `linen`.

`trackable.lazy_flax` imports either when a program first shows such an object. `TrainState` and
flax.struct classes are pytrees and need nothing here.
"""
