"""Forecasts for the sessions of a server.

`scenarios` is what a call asks for, `limits` what it may ask for, `origins` copies the states of
its sessions, and `forecaster` rolls them forward.
"""
