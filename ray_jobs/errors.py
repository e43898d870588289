"""What can go wrong in a job, beside what the leaves raise.

JobError
└── ConfigError    a configuration file or an override does not fit
"""


class JobError(Exception):
    """A job cannot go on; the message says what to do."""


class ConfigError(JobError):
    """A configuration does not fit; every wrong key is named."""
