"""What visitors did lately, in one of three stores that keep the same promises (`store.py`).

Shared by the ingress, which reads and pushes, and by the job that fills a store from the lake.
"""

from serve_app.errors import ServeError

__all__ = ["ServeError"]
