"""What can go wrong in serving, beside what the library raises.

ServeError
├── SettingsError            a setting is missing or does not fit
└── RankerUnavailableError   the ranker is dead, saturated or too slow; the next rung answers
"""


class ServeError(Exception):
    """Base of everything that this package raises on purpose."""


class SettingsError(ServeError):
    """The service cannot start with these settings; the message names each at fault."""


class RankerUnavailableError(ServeError):
    """No answer of the ranker is to be had."""
