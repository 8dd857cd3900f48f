"""The way in: from a checkpoint to restored objects.

checkpoint_reader  a checkpoint by its keys, of this format or of another (`formats`)
rename      the saved graph under other names and in other shapes (`rules`, `transforms`)
formulas    how one value is made of others, box by box (`grids`: by the steps of a rule)
inverses    rules, read from the other side
adapters    the saved graph as a class says that its older checkpoints are read
derived     values that are made of stored ones
shardings   where arrays are placed, if the target does not say
run         one restore: plan, complete the report, require that it fits, execute
waiting     what waits for objects that do not exist yet (`identity`, `precedence`)
"""
