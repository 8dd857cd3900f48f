"""Fitting: a saved graph as another program wants it.

renaming     under other names, by rules; and in other shapes (transforms, derived)
adapting     as a class says that its older checkpoints are read
reading      the values, made of what is stored
placing      on other devices than the target says
"""
