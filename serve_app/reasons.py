"""Why an item is in a list: "because you viewed X". The link is co-visitation, which people know
from other shops; the model's own attention says little of causes.
"""

from collections.abc import Mapping, Sequence

from recsys.catalogue import PAD
from recsys.filters import ItemId
from recsys.ladder import Candidate, Source
from recsys.queries import Event
from serve_app.model import Model
from serve_app.schemas import Reason

_VERBS: Mapping[str | None, str] = {
    "view": "viewed",
    "click": "clicked",
    "add_to_cart": "put in the cart",
    "purchase": "bought",
    "rating": "rated",
}
_TEXTS: Mapping[Source, str] = {
    "model": "Chosen for you",
    "covisited": "Often seen after what you looked at",
    "popular_in_segment": "Popular with customers like you",
    "popular": "Popular now",
}


def explain(candidate: Candidate, history: Sequence[Event], model: Model) -> Reason:
    """The reason of one item; popular ones have none in the history."""
    because = None
    if candidate.source in ("model", "covisited"):
        items = model.index.encode([event.item_id for event in history])
        because = model.fallback.because(candidate.item_id, model.index.decode(items[items != PAD]))
    if because is None:
        return Reason(source=candidate.source, text=_TEXTS[candidate.source])
    verb = _VERBS.get(_last_type(history, because), "viewed")
    return Reason(source=candidate.source, because=because, text=f"Because you {verb} {because}")


def _last_type(history: Sequence[Event], item_id: ItemId) -> str | None:
    types = (event.event_type for event in reversed(history) if str(event.item_id) == str(item_id))
    return next(types, None)
