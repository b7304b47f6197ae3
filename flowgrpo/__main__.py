"""``python -m flowgrpo`` is the ``flowgrpo`` command."""

from flowgrpo.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
