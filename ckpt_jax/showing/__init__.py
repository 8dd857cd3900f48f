"""What people look at: the command `ckpt_jax`, and `ckpt.show` for notebooks.

`contents`, `listing`, `differences` and `statistics` find facts, as frozen values. `rows` and
`pages` make tables and HTML of them. `commands` reads the arguments of the command and prints.
"""
