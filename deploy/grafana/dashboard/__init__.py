"""The panels of the dashboard, a module for each of its rows."""
