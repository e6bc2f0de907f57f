"""Colours of classes on a map, as RGB bytes."""

__all__ = ["COLOURS"]

# The report's colours of arms, as the page has them by day, and four more.
_HEX = "0072b2 d55e00 008a65 b0558f 3a9fd6 b98200 5b4bb5 7a7f87 c7352f 7fa51b 1b1d20 e39ac0"
COLOURS = tuple(bytes.fromhex(c) for c in _HEX.split())
