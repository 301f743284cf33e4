"""What training costs: calibrated step times, speed-up bounds, energy, cost budgets."""
