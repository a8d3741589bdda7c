"""``python -m kvroute.cli``."""

from kvroute.cli import main

main()
