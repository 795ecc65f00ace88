"""
structlog, set up once: lines for people on a terminal, JSON for machines elsewhere. Both go to standard error.
"""

from __future__ import annotations

import logging
import sys

import msgspec
import structlog


def set_up(log_format: str, level: str) -> None:
    """
    :param log_format: "console", "json", or "auto" (console on a terminal).
    :param level: the least that is shown.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    encode = msgspec.json.Encoder(enc_hook=str).encode
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso", utc=not console),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
            if console
            else structlog.processors.JSONRenderer(serializer=lambda line, **_: encode(line)),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr)
        if console
        else structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
