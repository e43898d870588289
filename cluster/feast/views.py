"""What `feast apply` finds in this repository; it is defined where it is used."""

from serve_app.history_stores.feast_views import (  # noqa: F401
    erasures,
    progress,
    recent_events,
    seeded_events,
    visitor,
)
