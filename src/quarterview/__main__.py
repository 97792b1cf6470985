"""``python -m quarterview``, for torchrun."""

from quarterview.cli import main

main()
