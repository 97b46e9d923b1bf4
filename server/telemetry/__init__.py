"""Observability: records of requests, stages, metrics, logs and traces."""
