"""``python -m codeact``."""

from codeact.cli import main

main()
