"""What ends a command besides wrong input (ValueError) and trouble with files (OSError)."""


class JobFailed(Exception):
    """The job can't be done: the loss is no longer finite, another process has ended, no mirror delivers the archive."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, whose number is the argument, ended the training; the run folder holds every whole epoch."""
