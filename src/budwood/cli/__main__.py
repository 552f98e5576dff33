"""`python -m budwood.cli`, which launchers of several processes need."""

from budwood.cli import main

main()
