"""``python -m mhaffn`` is the ``mhaffn`` command."""

from mhaffn.cli import main

main()
