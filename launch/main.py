"""Entry point of `rayhf`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; Ctrl-C during the imports ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launch import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        cli.main()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)  # it is ending: the exit code stands


if __name__ == "__main__":
    main()
