"""Values between a program and its bytes: what each kind of leaf is, and devices and host memory."""
