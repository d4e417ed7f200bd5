"""A stand-in of Colab's package, which PyPI does not have: what the kit and its notebooks call of it."""
