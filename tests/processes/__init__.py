"""Tests that start servers, workers and other processes of the project, but no engine."""
