"""Forecasts for the sessions of a server."""
