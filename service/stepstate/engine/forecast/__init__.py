"""Forecasts: rollouts on copies of states, and their intervals."""
