"""Entry point of `rayhf`."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; Ctrl-C during the imports ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from launch import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
