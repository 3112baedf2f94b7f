"""How good a session's forecasts were: scores, interval widths, drift tests."""
