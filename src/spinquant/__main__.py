"""python -m spinquant, which is what torchrun starts."""

from spinquant.cli.main import main

main()
