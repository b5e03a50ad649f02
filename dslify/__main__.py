"""`python -m dslify`."""

from dslify.cli import main

main()
