"""Cost of training: calibrated step times, speed-up bounds, energy, cost budgets."""
