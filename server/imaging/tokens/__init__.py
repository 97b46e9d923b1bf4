"""How many tokens a picture costs, and how to keep it within a cap; pure arithmetic.

Each family of models has a rule behind one protocol, `TokenRule`. The engine chooses a model's rule
by its processor's configuration (`server.engine.token_rules`).
"""

from server.imaging.tokens.budget import Claim, allocate_together, kv_bytes_per_token, share
from server.imaging.tokens.rule import (
    Count,
    Detail,
    MeasuredTokens,
    TokenAllocation,
    TokenRule,
    detail_cap,
)

__all__ = [
    "Claim",
    "Count",
    "Detail",
    "MeasuredTokens",
    "TokenAllocation",
    "TokenRule",
    "allocate_together",
    "detail_cap",
    "kv_bytes_per_token",
    "share",
]
