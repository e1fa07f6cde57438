"""One sentence that lists the mismatches between a checkpoint and a network."""


def mismatch_report(
    name: str, missing: list[str], unexpected: list[str], shapes: list[str], what: str = "state dict"
) -> str:
    """The error message of a strict import.

    Args:
      name: the network.
      missing: keys that are missing in the checkpoint.
      unexpected: keys that the network does not have.
      shapes: keys of another shape, each with both shapes.
      what: kind of the checkpoint (`state dict`).

    Returns:
      The sentence; a long list is shortened to eight keys and their count.
    """
    parts = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)):
        if keys:
            shown = ", ".join(keys[:8]) + (f", ... ({len(keys)} in all)" if len(keys) > 8 else "")
            parts.append(f"{kind}: {shown}")
    return f"the {what} does not fit {name}; " + "; ".join(parts)
