"""What can go wrong in serving, beside what the library raises.

ServeError
├── SettingsError             a setting is missing or does not fit
├── RankerUnavailableError    the ranker is dead, saturated or too slow; the next rung answers
│   └── RankerSaturatedError  it has more to do than it can, which is no sickness
├── HistoryUnavailableError   the history store is, too; the caller goes on without histories
└── EventsUnavailableError    events cannot be made durable now; the shop has to send them again
"""


class ServeError(Exception):
    """Base of everything that this package raises on purpose."""


class SettingsError(ServeError):
    """The service cannot start with these settings; the message names each at fault."""


class RankerUnavailableError(ServeError):
    """No answer of the ranker is to be had."""


class RankerSaturatedError(RankerUnavailableError):
    """The ranker refuses more requests for now."""


class HistoryUnavailableError(ServeError):
    """No answer of the history store is to be had in time."""


class EventsUnavailableError(ServeError):
    """The event log takes nothing in: its file is locked, its disk is full or broken."""
