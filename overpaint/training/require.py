"""The one way in which settings say what is wrong with them."""


def require(owner: str, holds: bool, field: str, rule: str, value: object) -> None:
    """Raises an error that names the field, the rule and the value unless the rule holds.

    Args:
        owner: The class of the settings; empty where the field needs no more name.
        holds: Whether the rule holds.
        field: Name of the field.
        rule: What it must do or be, as in "be at least 1".
        value: What it is.

    Raises:
        ValueError: The rule does not hold.
    """
    if not holds:
        raise ValueError(f"{owner}{'.' if owner else ''}{field} must {rule}, got {value!r}")
