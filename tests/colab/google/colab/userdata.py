"""Secrets: there are none."""


class SecretNotFoundError(Exception):
    """What Colab raises."""


def get(key: str) -> str:
    """Refuse, as Colab does for a secret that is not there."""
    raise SecretNotFoundError(f"Secret {key} does not exist.")
