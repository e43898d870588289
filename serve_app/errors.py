"""What can go wrong in serving, beside what the library raises.

ServeError
├── SettingsError            a setting is missing or does not fit
├── HistoryUnavailableError  the history store does not answer; the request goes on without it
└── RankerUnavailableError   the ranker is dead, saturated or too slow; the next rung answers
    └── RankerSaturatedError     it has more to do than it can, which is no sickness
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
    """The history of a visitor is not to be had now."""
