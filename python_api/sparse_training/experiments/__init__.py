"""Experiments: methods compared at equal cost, over tasks, budgets and seeds."""
