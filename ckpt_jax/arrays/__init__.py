"""Values of a program as arrays of bytes: what each kind of leaf is, and where slices lie."""
