"""python -m spinquant, which is what torchrun starts."""

from spinquant.cli import main

main()
