"""`python -m routing.command`, and `python -m expertflow` of an installed wheel."""

from routing.command import main

main()
