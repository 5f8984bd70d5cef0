"""Imported first by the fork server: signals to a process group end the server, not this process,
which ends by itself once the server is gone."""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
