"""The HTTP endpoint: a FastAPI ingress that reads histories, caches, filters and falls back, and a
ranker beside it under Ray Serve.
"""
